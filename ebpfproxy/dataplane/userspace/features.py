"""What this machine has of what the userspace dataplane needs, and what that can't do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.capabilities import named
from ebpfproxy.model.services import FrontendKind, Policy, Protocol

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState, Service


def usable() -> str | None:
    """Return why VIPs can't lead to the proxy on this machine, None if they can."""
    from ebpfproxy.dataplane.userspace import rules

    found, reason = rules.find()
    return None if found else no_rules(reason)


def no_rules(reason: str) -> str:
    """Return what to do where netfilter can't be used."""
    return (
        f"no rule can lead VIPs to the proxy: {reason}; without privileges it serves the addresses of "
        "--listen (ebpfproxy.userspace.listenAddresses)"
    )


def unsupported(state: DesiredState, *, is_listening: bool) -> list[str]:
    """Return one sentence for each thing in ``state`` that this dataplane does not do. Pure."""
    sentences = []
    sctp = [each for each in state.services if each.protocol is Protocol.SCTP]
    if sctp:
        sentences.append(f"SCTP needs sockets that Python and many kernels do not have: {named(sctp)}")
    local = [each for each in state.services if _keeps_sources(each)]
    if local:
        sentences.append(
            "externalTrafficPolicy Local chooses this node's backends, but they see the proxy's address, not "
            f"the client's: {named(local)}"
        )
    if is_listening:
        others = [
            each
            for each in state.services
            if any(f.kind in (FrontendKind.LOAD_BALANCER, FrontendKind.EXTERNAL_IP) for f in each.frontends)
        ]
        if others:
            sentences.append(
                "without rules, external and load-balancer IPs are served only where they are listed as "
                f"addresses to listen on: {named(others)}"
            )
    return sentences


def _keeps_sources(service: Service) -> bool:
    return service.external_policy is Policy.LOCAL and any(
        each.kind is not FrontendKind.CLUSTER_IP for each in service.frontends
    )
