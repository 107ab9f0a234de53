"""The iptables dataplane: render -> diff -> one iptables-restore for each IP family."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebpfproxy import sysctl
from ebpfproxy.conntrack import UdpCleaner
from ebpfproxy.dataplane.iptables import features
from ebpfproxy.dataplane.iptables.render import (
    JUMPS,
    LARGE_ENDPOINTS,
    LOCALHOST_JUMPS,
    SHARED,
    Renderer,
    context_of,
    host_of,
)
from ebpfproxy.dataplane.iptables.unsupported import unsupported
from ebpfproxy.errors import DataplaneError, UnsupportedError
from ebpfproxy.metrics import RuleCounts
from ebpfproxy.xtables.programmer import Programmer
from ebpfproxy.xtables.tool import Tool, can_read, choose_variant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ebpfproxy.model.services import DesiredState

log = logging.getLogger(__name__)

MODE = "iptables"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
BRIDGED = "net/bridge/bridge-nf-call-iptables"


@dataclass(frozen=True)
class IptablesOptions:
    """How to run the iptables dataplane."""

    sysctls: Path  # the file that keeps the settings as they were
    variant: str = "auto"  # auto | nft | legacy
    masquerade_bit: int = 14
    allows_localhost: bool = True  # NodePorts on 127.0.0.1
    drops_invalid: bool = True
    check_s: float = 30.0  # how often it is looked whether somebody flushed the rules
    settings: Mapping[str, str] = field(default_factory=dict)  # of the kernel, to be made so


class _Family:
    """One IP family: its tool, its renderer, its chains."""

    def __init__(self, tool: Tool) -> None:
        self.tool = tool
        self.renderer = Renderer()
        self.programmer = Programmer(tool, MODE, SHARED)
        self.lacking = features.lacking(tool)
        self.has_random_fully = tool.has_random_fully()

    def lacks(self, name: str) -> bool:
        return any(match.name == name for match in self.lacking)


class IptablesDataplane:
    """Makes the kernel serve a desired state through iptables rules."""

    def __init__(self, options: IptablesOptions) -> None:
        self.options = options
        self.problems: list[str] = []  # what is missing on this machine, one sentence each
        self._families: list[_Family] = []
        self._ledger = sysctl.Ledger(options.sysctls)
        self._cleaner = UdpCleaner()
        self._state: DesiredState | None = None  # as it was last programmed
        self._is_large = False
        self._has_localhost = False
        self._checked_s = 0.0

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Choose the variant of the tools, and find out what they and the kernel can do.

        Raises:
            UnsupportedError: this machine can't run it; the message says why.
        """
        why_not = features.usable(self.options.variant)
        if why_not is not None:
            raise UnsupportedError(why_not)
        variant = choose_variant(self.options.variant)
        self.problems = []
        for family in (4, 6):
            tool = Tool(family, variant)
            if not (tool.is_installed() and can_read(tool)):
                self.problems.append(f"no IPv6: {tool.name} can't be used here")
                continue
            made = _Family(tool)
            self._families.append(made)
            self.problems += [
                each for each in features.problems(tool, made.lacking) if each not in self.problems
            ]
        self.problems += self._ledger.set(self.options.settings)
        if sysctl.read(BRIDGED) == "0":
            self.problems.append(
                "pods on one bridge do not reach each other through Services: "
                "net.bridge.bridge-nf-call-iptables is 0, set it to 1"
            )
        self._checked_s = time.monotonic()
        log.info("iptables: variant %s", variant)

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
        self._families = []
        self._state = None

    # -- work ------------------------------------------------------------------------------------

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change.

        Raises:
            DataplaneError: only a part was programmed; call again.
        """
        if not self._families:
            raise DataplaneError("the iptables dataplane is not started")
        self._state = None
        # Once large, it stays so: else all is written anew whenever the number passes this one.
        self._is_large |= sum(len(service.backends) for service in state.services) > LARGE_ENDPOINTS
        for each in self._families:
            self._program(each, state)
        self._cleaner.clean(state)
        self._state = state

    def tick(self) -> None:
        """Look, every now and then, whether somebody flushed the rules, and write them again.

        Raises:
            DataplaneError: they could not be written; the next sync does it.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s < self.options.check_s or self._state is None:
            return
        self._checked_s = now_s
        for each in self._families:
            if not each.programmer.is_intact():
                log.warning("somebody flushed the rules of %s: writing them again", each.tool.name)
                each.programmer.forget()
                self._program(each, self._state)

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return unsupported(
            state,
            families=frozenset(each.tool.family for each in self._families),
            has_affinity=not any(each.lacks("recent") for each in self._families),
            has_sctp=not any(each.lacks("sctp") for each in self._families),
        )

    @property
    def rule_counts(self) -> RuleCounts:
        """How many rules there are, and how often some were refused."""
        families = {f"IPv{each.tool.family}": each.programmer for each in self._families}
        return RuleCounts(
            iptables_total={
                (family, table): count
                for family, each in families.items()
                for table, count in each.totals().items()
            },
            iptables_last={
                (family, table): count
                for family, each in families.items()
                for table, count in each.written.items()
            },
            restore_failures={(family,): each.failures for family, each in families.items()},
        )

    # -- inside ----------------------------------------------------------------------------------

    def _program(self, each: _Family, state: DesiredState) -> None:
        options, family = self.options, each.tool.family
        host = host_of(
            state.addresses,
            family,
            has_random_fully=each.has_random_fully,
            allows_localhost=options.allows_localhost,
            drops_invalid=options.drops_invalid,
        )
        context = context_of(
            state,
            family,
            mark=1 << options.masquerade_bit,
            is_large=self._is_large,
            has_recent=not each.lacks("recent"),
        )
        services = [
            service for service in state.services if service.protocol != "SCTP" or not each.lacks("sctp")
        ]
        want = each.renderer.chains(services, context, host)
        jumps = (*JUMPS, *LOCALHOST_JUMPS) if host.has_localhost else JUMPS
        each.programmer.apply(want, jumps)
        if host.has_localhost:
            # Only now: without the rule in KUBE-FIREWALL it lets neighbours in.
            for problem in self._ledger.set({ROUTE_LOCALNET: "1"}):
                if problem not in self.problems:
                    self.problems.append(f"no NodePorts on 127.0.0.1: {problem}")
