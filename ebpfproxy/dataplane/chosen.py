"""The dataplane of the mode that was asked for, or of the first mode that can run here.

It also ends what an earlier run in another mode left: the new mode is complete before the old one goes.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ebpfproxy import files, metrics, status
from ebpfproxy.dataplane import capabilities, modes
from ebpfproxy.errors import ConfigError, DataplaneError, EbpfproxyError, UnsupportedError
from ebpfproxy.model.services import Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.config import Config
    from ebpfproxy.dataplane.modes import Runnable, Site
    from ebpfproxy.model.services import DesiredState

log = logging.getLogger(__name__)

#: In the state directory: mode -> BPF file system, of every mode that may have something in the kernel.
RECORD = "modes.json"
#: In the record beside modes: what keeps connections of an earlier mode, see ebpfproxy.dataplane.nat.
KEEPER = "nat"
#: Modes whose connections the kernel's NAT translates; they have chains of NAT themselves.
_TRANSLATING = ("nftables", "ipvs", "iptables")
#: How often is looked whether an earlier mode's last connection ended.
KEEPER_CHECK_S = 5.0


class PassedOver(NamedTuple):
    """A mode that ``auto`` did not take."""

    mode: str
    reason: str

    def __str__(self) -> str:
        """Return both, for people."""
        return f"{self.mode}: {self.reason}"


class ChosenDataplane:
    """Makes the kernel serve a desired state in one of the modes.

    Attributes:
        mode: the one that runs; "" before ``start``.
        passed_over: what ``auto`` tried before, with the reasons.
        site: where it works.
    """

    def __init__(self, settings: Config, site: Site) -> None:
        self.mode = ""
        self.passed_over: list[PassedOver] = []
        self.site = site
        self._settings = settings
        self._stack = ExitStack()
        self._dataplane: Runnable | None = None
        self._leftovers: dict[str, str] = {}  # mode -> BPF file system: what earlier runs may have left
        self._is_synced = False
        self._look_at = 0.0  # when to look at the keeper
        self._problems: list[str] = []

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the mode that was asked for, or with ``auto`` the first that can run here.

        Raises:
            LockedError: another agent is at work here.
            EbpfproxyError: it can't run on this machine; the message says why.
        """
        wanted = self._settings.mode
        known = modes.names()
        if wanted not in {modes.AUTO, *known}:
            raise ConfigError(f"mode: {wanted}: this version has {', '.join((modes.AUTO, *known))}")
        for name in known if wanted == modes.AUTO else [wanted]:
            try:
                self._start(name)
            except (files.LockedError, ConfigError):
                raise
            except EbpfproxyError as error:
                if wanted != modes.AUTO:
                    raise
                self.passed_over.append(PassedOver(name, str(error)))
                log.warning("mode %s can't be used here: %s", name, error)
            else:
                self.mode = name
                log.info("serving in mode %s%s", name, _place(self.site))
                return
        reasons = "; ".join(map(str, self.passed_over))
        raise UnsupportedError(f"no dataplane can run on this machine: {reasons}")

    def _start(self, name: str) -> None:
        with ExitStack() as stack:
            plug = modes.load(name)
            made = plug.make(self._settings, self.site, stack)
            stack.callback(made.dataplane.close)
            found = read_record(self.site.state_dir)
            write_record(self.site.state_dir, found | {name: str(made.site.bpffs or "")})
            made.dataplane.start()
            self._leftovers = {mode: bpffs for mode, bpffs in found.items() if mode != name}
            self._dataplane, self.site = made.dataplane, made.site
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
        self._stack.close()
        self._dataplane = None

    @property
    def problems(self) -> list[str]:
        """What is missing on this machine, or can't be removed."""
        return [*(self._dataplane.problems if self._dataplane else ()), *self._problems]

    @property
    def usual_scheduler(self) -> Scheduler:
        """The scheduler of Services that name none, if the configuration does not."""
        found = modes.find(self.mode)
        return found.scheduler if found else Scheduler.RANDOM

    @property
    def loader(self) -> str:
        """Which loader of BPF programs is in use; "" for none."""
        return str(getattr(self._dataplane, "loader", ""))

    @property
    def devices(self) -> Sequence[str]:
        """The devices whose packets are looked at, where the mode chooses them."""
        return tuple(getattr(self._dataplane, "devices", ()))

    @property
    def rule_counts(self) -> metrics.RuleCounts | None:
        """What a mode that is made of rules counts of them."""
        return getattr(self._dataplane, "rule_counts", None)

    # -- work ------------------------------------------------------------------------------------

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change."""
        self._running().sync(state)
        self._is_synced = True

    def tick(self) -> None:
        """Do periodic work; after the first sync also end what other modes left."""
        self._running().tick()
        if self._is_synced and self._leftovers:
            self._problems = self._end_leftovers()

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that the mode does not do."""
        sentences = self._running().unsupported(state)
        # The same for all modes but one.
        found = [each for each in state.services if each.is_dsr]
        if found and (why := capabilities.limit(self.mode, "dsr")):
            sentences.append(f"forwarding dsr: {why}: {capabilities.named(found)}")
        return sentences

    def reading(self) -> metrics.Reading:
        """Return what the mode counts in the kernel; may be called from another thread."""
        return modes.load(self.mode).reading(self.site) if self.mode else metrics.Reading()

    def _running(self) -> Runnable:
        if self._dataplane is None:
            raise DataplaneError("the dataplane is not started")
        return self._dataplane

    def _end_leftovers(self) -> list[str]:
        """Remove what other modes left; return what could not be, to be tried again."""
        problems = []
        for name, bpffs in list(self._leftovers.items()):
            try:
                if name == KEEPER:
                    self._end_keeper()
                else:
                    self._end_mode(name, bpffs)
            except EbpfproxyError as error:
                problems.append(f"mode {name}, used earlier, still has something in the kernel: {error}")
        return problems

    def _end_mode(self, name: str, bpffs: str) -> None:
        """Remove what a mode left; see to it that the connections that it translated go on."""
        if name in _TRANSLATING and self.mode not in _TRANSLATING:
            from ebpfproxy.dataplane import nat
            from ebpfproxy.dataplane.nftables import kernel

            if not kernel.is_missing():
                self._record(add=KEEPER)
                nat.hold()
        removed = cleanup(name, self.site, bpffs)
        self._record(drop=name)
        log.info("switched from mode %s to %s: %d things removed", name, self.mode, len(removed))

    def _end_keeper(self) -> None:
        """Remove the chain of NAT once no connection needs it."""
        from ebpfproxy.dataplane import nat

        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + KEEPER_CHECK_S
        if not nat.is_needed():
            nat.release()
            self._record(drop=KEEPER)
            log.info("the last connection of an earlier mode ended")

    def _record(self, *, add: str = "", drop: str = "") -> None:
        """Note what is in the kernel; also what is to be ended later."""
        found = read_record(self.site.state_dir)
        if add:
            found[add] = self._leftovers[add] = ""
        found.pop(drop, None)
        self._leftovers.pop(drop, None)
        write_record(self.site.state_dir, found)


def cleanup(name: str, site: Site, bpffs: str = "") -> list[str]:
    """Remove what a mode made; ``bpffs`` is where it was when the mode ran, "" = as the site says."""
    if name not in modes.names():
        return []
    return modes.load(name).cleanup(site._replace(bpffs=Path(bpffs)) if bpffs else site)


def read_record(state_dir: Path) -> dict[str, str]:
    """Return which modes may have something in the kernel, each with its BPF file system."""
    try:
        return msgspec.json.decode((state_dir / RECORD).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        said = status.read(state_dir)  # of a version that kept no record
        return {said.mode: said.bpffs} if said and said.mode else {}


def write_record(state_dir: Path, record: dict[str, str]) -> None:
    """Keep which modes may have something in the kernel.

    Raises:
        DataplaneError: the file can't be written.
    """
    if record == read_record(state_dir) and (state_dir / RECORD).exists():
        return
    path = state_dir / RECORD
    try:
        files.write_atomic(path, msgspec.json.encode(record))
    except OSError as error:
        raise DataplaneError(f"save the mode in {path}: {error.strerror}") from error


def _place(site: Site) -> str:
    """Return where a mode works, for the log."""
    parts = [f"cgroup {site.cgroup}"] if site.cgroup else []
    parts += [f"BPF file system {site.bpffs}"] if site.bpffs else []
    return f": {', '.join(parts)}" if parts else ""
