"""What Services ask for and IPVS does otherwise. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.capabilities import named
from ebpfproxy.model.services import FrontendKind, Policy

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState


def unsupported(state: DesiredState, families: frozenset[int]) -> list[str]:
    """Return one sentence for each thing in ``state`` that is not done."""
    sentences = []
    if found := [s for s in state.services if s.name.family not in families]:
        sentences.append(f"IPv6 is not served, as ip6tables can't be used: {named(found)}")
    if found := [
        s
        for s in state.services
        if s.external_policy is Policy.LOCAL
        and s.local.backends
        and any(f.kind is not FrontendKind.CLUSTER_IP for f in s.frontends)
    ]:
        sentences.append(
            "externalTrafficPolicy Local: clients on this node and its pods get endpoints of this node too, "
            f"as in kube-proxy's ipvs mode: {named(found)}"
        )
    if {"127.0.0.1", "::1"} & state.addresses.serving and (
        found := [s for s in state.services if any(f.kind is FrontendKind.NODE_PORT for f in s.frontends)]
    ):
        sentences.append(f"NodePorts do not answer on 127.0.0.1 and ::1: {named(found)}")
    return sentences
