"""What the modes made of iptables rules have in common: how they begin, sync and watch over their rules."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebpfproxy import conntrack
from ebpfproxy.errors import DataplaneError, UnsupportedError
from ebpfproxy.sysctl import Ledger
from ebpfproxy.xtables.programmer import Programmer
from ebpfproxy.xtables.tool import Tool, can_read, choose_variant

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from ebpfproxy.config import Config
    from ebpfproxy.dataplane.modes import Site
    from ebpfproxy.model.services import DesiredState
    from ebpfproxy.xtables.chains import Chain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class XtablesOptions:
    """How to run a mode that is made of iptables rules."""

    sysctls: Path  # the file that keeps the settings as they were
    variant: str = "auto"  # of iptables: auto | nft | legacy
    masquerade_bit: int = 14
    check_s: float = 30.0  # how often it is looked whether somebody flushed what was made
    settings: Mapping[str, str] = field(default_factory=dict)  # of the kernel, to be made so


def sysctls_file(site: Site, mode: str) -> Path:
    """Return the file that keeps the kernel's settings as they were before a mode."""
    return site.state_dir / f"sysctls-{mode}.json"


def options_of(
    settings: Config, site: Site, mode: str, sysctls: Mapping[str, str] | None = None
) -> XtablesOptions:
    """Return what the configuration says, with kernel settings that the mode needs by itself."""
    return XtablesOptions(
        sysctls=sysctls_file(site, mode),
        variant=settings.iptables_variant,
        masquerade_bit=settings.masquerade_bit,
        check_s=settings.max_sync_s,
        settings={**(sysctls or {}), **conntrack.settings_of(settings)},
    )


class XtablesDataplane(ABC):
    """A dataplane that is made of iptables rules, and of what else a mode adds."""

    mode: str
    #: Chains where only the rules count, not their order.
    unordered: Collection[Chain] = ()

    def __init__(self, options: XtablesOptions) -> None:
        self.options = options
        self.problems: list[str] = []  # what is missing on this machine, one sentence each
        self._ledger = Ledger(options.sysctls)
        self._programmers: list[Programmer] = []  # one for each IP family that can be served
        self._has_random_fully = False
        self._cleaner = conntrack.UdpCleaner()
        self._state: DesiredState | None = None  # as it was last programmed
        self._checked_s = 0.0

    # -- what a mode adds ------------------------------------------------------------------------

    @abstractmethod
    def _why_not(self) -> str | None:
        """Return in one sentence why this machine can't run the mode, None if it can."""

    @abstractmethod
    def _prepare(self) -> None:
        """Do once what comes before the first sync; note what is missing."""

    @abstractmethod
    def _program(self, state: DesiredState) -> None:
        """Make exactly ``state`` be in the kernel.

        Raises:
            DataplaneError: only a part is.
        """

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Choose the variant of the tools, find out what they can do, and set what the mode needs.

        Raises:
            UnsupportedError: this machine can't run it; the message says why.
        """
        reason = self._why_not()
        if reason is not None:
            raise UnsupportedError(reason)
        variant = choose_variant(self.options.variant)
        log.info("%s: variant %s of iptables", self.mode, variant)
        self.problems = []
        for number in (4, 6):
            tool = Tool(number, variant)
            if not (tool.is_installed() and can_read(tool)):
                self.problems.append(f"no IPv6: {tool.name} can't be used here")
                continue
            self._has_random_fully = tool.has_random_fully()
            self._programmers.append(Programmer(tool, self.mode, self.unordered))
        self._prepare()
        self.problems += self._ledger.set(self.options.settings)
        self._checked_s = time.monotonic()

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
        self._forget()
        self._programmers = []
        self._state = None

    # -- work ------------------------------------------------------------------------------------

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change.

        Raises:
            DataplaneError: only a part was programmed; call again.
        """
        if not self._programmers:
            raise DataplaneError(f"the {self.mode} dataplane is not started")
        self._state = None
        with self._forget_on_error():
            self._program(state)
        self._cleaner.clean(state)
        self._state = state

    def tick(self) -> None:
        """Look, every now and then, whether somebody flushed what was made, and make it again.

        Raises:
            DataplaneError: it could not be made; the next sync does it.
        """
        now_s = time.monotonic()
        if self._state is None or now_s - self._checked_s < self.options.check_s:
            return
        self._checked_s = now_s
        if self._forget_flushed():
            log.warning("somebody flushed what mode %s had made: writing it again", self.mode)
            self.sync(self._state)

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _served(self) -> frozenset[int]:
        """The IP families that can be served."""
        return frozenset(each.tool.family for each in self._programmers)

    def _forget_flushed(self) -> bool:
        """Forget what somebody flushed, as far as it costs little to see; return whether anybody did."""
        flushed = [each for each in self._programmers if not each.is_intact()]
        for each in flushed:
            each.forget()
        return bool(flushed)

    def _forget(self) -> None:
        """Read at the next sync what the kernel has."""
        for each in self._programmers:
            each.forget()

    @contextmanager
    def _forget_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._forget()
            raise
