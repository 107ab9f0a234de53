"""kube-proxy's feature gates: what each would switch is on here, off here, or not kube-proxy's business.

Source: Kubernetes' page of feature gates, and that of removed ones; those that kube-proxy looks at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What these bring is always on: true changes nothing and needs no word, false can't be had.
_ALWAYS_ON = frozenset(
    (
        "EndpointSlice",
        "EndpointSliceProxying",
        "EndpointSliceTerminatingCondition",
        "IPv6DualStack",
        "KubeProxyDrainingTerminatingNodes",
        "LoadBalancerIPMode",
        "MinimizeIPTablesRestore",  # a sync costs what changed
        "MixedProtocolLBService",
        "NFTablesProxyMode",
        "PreferSameTrafficDistribution",
        "ProxyTerminatingEndpoints",
        "ServiceInternalTrafficPolicy",
        "ServiceLBNodePortControl",
        "ServiceTrafficDistribution",
        "SCTPSupport",
        "TopologyAwareHints",
    )
)


def without_effect(gates: Mapping[str, bool]) -> list[str]:
    """Return one note for each gate whose value changes nothing here although it asks for a change."""
    notes = []
    for name, is_on in sorted(gates.items()):
        if name not in _ALWAYS_ON:
            notes.append(f"featureGates.{name}")
        elif not is_on:
            notes.append(f"featureGates.{name}: false (it is always on here)")
    return notes
