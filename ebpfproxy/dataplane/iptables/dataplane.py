"""The iptables dataplane: render -> diff -> one iptables-restore for each IP family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import sysctl
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
from ebpfproxy.dataplane.xtables import XtablesDataplane, XtablesOptions
from ebpfproxy.metrics import RuleCounts
from ebpfproxy.model.services import Protocol

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState
    from ebpfproxy.xtables.programmer import Programmer

MODE = "iptables"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
BRIDGED = "net/bridge/bridge-nf-call-iptables"


class IptablesDataplane(XtablesDataplane):
    """Makes the kernel serve a desired state through iptables rules.

    Args:
        options: of every mode that is made of iptables rules.
        allows_localhost: NodePorts answer on 127.0.0.1, if that is one of their addresses.
        drops_invalid: packets that conntrack calls invalid are dropped.
    """

    mode = MODE
    unordered = SHARED

    def __init__(
        self, options: XtablesOptions, *, allows_localhost: bool = True, drops_invalid: bool = True
    ) -> None:
        super().__init__(options)
        self._allows_localhost, self._drops_invalid = allows_localhost, drops_invalid
        self._renderers = {4: Renderer(), 6: Renderer()}
        self._lacking: dict[int, frozenset[str]] = {}  # family -> matches that it is without
        self._is_large = False

    def _why_not(self) -> str | None:
        return features.usable(self.options.variant)

    def _prepare(self) -> None:
        """Find out which matches are missing."""
        for each in self._programmers:
            lacking = features.lacking(each.tool)
            self._lacking[each.tool.family] = frozenset(match.name for match in lacking)
            self.problems += features.problems(each.tool, lacking)
        if sysctl.read(BRIDGED) == "0":
            self.problems.append(
                "pods on one bridge do not reach each other through Services: "
                "net.bridge.bridge-nf-call-iptables is 0, set it to 1"
            )

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return unsupported(
            state,
            families=self._served,
            has_affinity=not any("recent" in lacking for lacking in self._lacking.values()),
            has_sctp=not any("sctp" in lacking for lacking in self._lacking.values()),
        )

    @property
    def rule_counts(self) -> RuleCounts:
        """How many rules there are, and how often some were refused."""
        families = {f"IPv{each.tool.family}": each for each in self._programmers}
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

    def _program(self, state: DesiredState) -> None:
        # Once large, it stays so: else all is written anew whenever the number passes this one.
        self._is_large |= sum(len(service.backends) for service in state.services) > LARGE_ENDPOINTS
        for each in self._programmers:
            self._program_family(each, state)

    def _program_family(self, programmer: Programmer, state: DesiredState) -> None:
        family = programmer.tool.family
        lacking = self._lacking[family]
        host = host_of(
            state.addresses,
            family,
            has_random_fully=self._has_random_fully,
            allows_localhost=self._allows_localhost,
            drops_invalid=self._drops_invalid,
        )
        context = context_of(
            state,
            family,
            mark=1 << self.options.masquerade_bit,
            is_large=self._is_large,
            has_recent="recent" not in lacking,
        )
        services = [
            each for each in state.services if each.protocol is not Protocol.SCTP or "sctp" not in lacking
        ]
        want = self._renderers[family].chains(services, context, host)
        programmer.apply(want, (*JUMPS, *LOCALHOST_JUMPS) if host.has_localhost else JUMPS)
        if host.has_localhost:
            # Only now: without the rule in KUBE-FIREWALL it lets neighbours in.
            for problem in self._ledger.set({ROUTE_LOCALNET: "1"}):
                if problem not in self.problems:
                    self.problems.append(f"no NodePorts on 127.0.0.1: {problem}")
