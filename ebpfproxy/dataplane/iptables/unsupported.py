"""What Services ask for and iptables rules don't do. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.capabilities import named
from ebpfproxy.model.services import FrontendKind, Protocol, Scheduler

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState

SCHEDULERS = (Scheduler.RANDOM, Scheduler.RR, Scheduler.WRR)
#: xt_recent remembers this many clients of one backend unless its module is loaded with ip_list_tot.
AFFINITY_CLIENTS = 100


def unsupported(
    state: DesiredState, *, families: frozenset[int], has_affinity: bool, has_sctp: bool
) -> list[str]:
    """Return one sentence for each thing in ``state`` that is not done.

    Args:
        state: what is wanted.
        families: IP families that can be served.
        has_affinity: the kernel has the match recent.
        has_sctp: the kernel has the match sctp.
    """
    sentences = []
    if found := [s for s in state.services if s.name.family not in families]:
        sentences.append(f"IPv6 is not served, as ip6tables can't be used: {named(found)}")
    if found := [s for s in state.services if s.scheduler not in SCHEDULERS]:
        kinds = ", ".join(sorted({s.scheduler for s in found}))
        sentences.append(f"scheduler {kinds}: a backend is picked at random: {named(found)}")
    if found := [s for s in state.services if s.affinity_s]:
        sentences.append(
            f"sessionAffinity: the last {AFFINITY_CLIENTS} clients of each backend are remembered "
            f"(module xt_recent, ip_list_tot): {named(found)}"
            if has_affinity
            else f"sessionAffinity: the kernel has no match recent: {named(found)}"
        )
    if not has_sctp and (found := [s for s in state.services if s.protocol is Protocol.SCTP]):
        sentences.append(f"SCTP is not served, as the kernel has no match sctp: {named(found)}")
    serves_loopback = "::1" in state.addresses.serving
    if serves_loopback and (
        found := [
            s
            for s in state.services
            if s.name.family == 6 and any(f.kind is FrontendKind.NODE_PORT for f in s.frontends)
        ]
    ):
        sentences.append(f"NodePorts do not answer on ::1, for IPv6 has no route_localnet: {named(found)}")
    return sentences
