"""The nftables dataplane: render -> diff -> one transaction."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebpfproxy.conntrack import UdpCleaner
from ebpfproxy.dataplane import capabilities
from ebpfproxy.dataplane.nftables import kernel
from ebpfproxy.dataplane.nftables.render import TABLE, base, header
from ebpfproxy.dataplane.nftables.tables import Tables, transaction
from ebpfproxy.errors import DataplaneError, KernelError, UnsupportedError
from ebpfproxy.metrics import RuleCounts
from ebpfproxy.model.services import FrontendKind, Scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ebpfproxy.model.services import DesiredState
    from ebpfproxy.sysctl import Ledger

log = logging.getLogger(__name__)

ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"


@dataclass(frozen=True)
class NftablesOptions:
    """How to run the nftables dataplane."""

    mark: int = 1 << 14  # bit of the packet mark that asks for masquerade
    settings: Mapping[str, str] | None = None  # of the kernel, "net/netfilter/..." -> value
    serves_loopback: bool = True  # NodePorts answer on 127.0.0.1, if that is one of their addresses
    check_s: float = 30.0  # after a change by others all is read again, but not more often than this


class NftablesDataplane:
    """Makes the kernel serve a desired state through one nftables table for each IP family."""

    def __init__(self, options: NftablesOptions, ledger: Ledger) -> None:
        self.options = options
        self.problems: list[str] = []
        self._ledger = ledger
        self._families = kernel.families()
        self._tables: Tables | None = None  # None: what the kernel holds has to be read
        self._base: tuple[str, ...] = ()  # as it was last programmed, by family
        self._generation: int | None = None  # None: somebody else may have changed something
        self._looked_at = 0  # generation in which our tables were there
        self._read_s = 0.0  # when all was read
        self._cleaner = UdpCleaner()
        self._state: DesiredState | None = None
        self._setting_problems: list[str] = []
        self._failures = 0

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find out whether this machine can do it, and set what the configuration asks of the kernel.

        Raises:
            UnsupportedError: it can't; the message says why.
        """
        reason = kernel.why_not()
        if reason:
            raise UnsupportedError(reason)
        self.problems = self._ledger.set(self.options.settings or {})

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
        self._tables = None

    # -- work ------------------------------------------------------------------------------------

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change.

        Raises:
            DataplaneError: nothing was programmed; call again.
        """
        self._state = state
        try:
            self._program(state)
        except BaseException as error:
            self._tables, self._generation = None, None
            self._failures += isinstance(error, DataplaneError)
            raise
        try:
            self._cleaner.clean(state)
        except KernelError as error:
            raise DataplaneError(
                f"Services are programmed, but some UDP flows may be stale: {error}"
            ) from error

    def tick(self) -> None:
        """Notice that somebody flushed our tables, and program them again."""
        if self._tables is None or self._state is None:
            return
        generation = kernel.generation()
        if generation in (self._generation, self._looked_at):
            return
        self._looked_at = generation
        if kernel.has_tables(self._families):
            return  # looked at closely at the next full sync
        log.warning("somebody removed table %s: it is programmed again", TABLE)
        self._tables = None
        self.sync(self._state)

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return unsupported(state)

    @property
    def rule_counts(self) -> RuleCounts:
        """How often a transaction was refused; one is for both families."""
        return RuleCounts(
            nftables_sync_failures={(f"IPv{family}",): self._failures for family in self._families}
        )

    # -- inside ----------------------------------------------------------------------------------

    def _program(self, state: DesiredState) -> None:
        generation = kernel.generation()
        if self._tables is not None and generation != self._generation:
            is_due = time.monotonic() - self._read_s >= self.options.check_s
            if is_due or not kernel.has_tables(self._families):
                self._tables = None
        commands, is_clean = "", generation == self._generation
        if self._tables is None:
            commands, is_clean = self._read(), True
        tables = self._tables
        assert tables
        wanted = tuple(
            base(
                family,
                self.options.mark,
                masquerades_all=state.masquerades_all,
                masquerades_outside=state.masquerades_outside,
            )
            for family in self._families
        )
        if wanted != self._base:
            commands += "".join(wanted)
        delta, bodies = tables.update(state)
        commands += transaction(delta, bodies, tables.have)
        if commands:
            kernel.run(commands)
        tables.commit(delta)
        self._base = wanted
        now = kernel.generation()
        # One more is our own transaction; else somebody else had one in between.
        self._generation = now if is_clean and now == generation + bool(commands) else None
        self._serve_loopback(state)

    def _read(self) -> str:
        """Read what is programmed; return commands that make room where it is not ours or not whole."""
        found = kernel.read(self._families)
        self._read_s = time.monotonic()
        self._base = ()
        self._tables = Tables(
            found or {},
            self._families,
            self.options.mark,
            serves_loopback=self.options.serves_loopback,
        )
        return "" if found is not None else remove(self._families)

    def _serve_loopback(self, state: DesiredState) -> None:
        """Let packets from 127.0.0.1 leave this node, if there are NodePorts there."""
        if not self.options.serves_loopback:
            return
        if any(each.startswith("127.") for each in state.addresses.serving) and any(
            frontend.kind is FrontendKind.NODE_PORT
            for service in state.services
            if service.name.family == 4
            for frontend in service.frontends
        ):
            self._setting_problems = self._ledger.set({ROUTE_LOCALNET: "1"})


def unsupported(state: DesiredState) -> list[str]:
    """Return one sentence for each thing in ``state`` that the nftables dataplane does not do. Pure."""
    counting = (Scheduler.LC, Scheduler.WLC, Scheduler.SED, Scheduler.NQ)
    found = [each for each in state.services if each.scheduler in counting]
    if not found:
        return []
    return [f"{capabilities.limit('nftables', 'lc')}: {capabilities.named(found)}"]


def remove(families: tuple[int, ...]) -> str:
    """Return the commands that remove our tables, whether they are there or not."""
    tables = [f"{header(family)} {TABLE}" for family in families]
    return "".join(f"add table {table}\ndelete table {table}\n" for table in tables)
