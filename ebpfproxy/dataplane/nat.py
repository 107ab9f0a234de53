"""Keeps the kernel's NAT at work for connections that a mode of netfilter rules translated, after its end.

The kernel translates the packets of an established connection without any rule, but only as long as somebody
has a chain of NAT. A table of ours is one until the last such connection ended.
"""

from __future__ import annotations

import socket

from ebpfproxy import conntrack
from ebpfproxy.dataplane import kube_proxy
from ebpfproxy.dataplane.nftables import kernel
from ebpfproxy.dataplane.nftables.render import header


def hold() -> None:
    """Make the table; may be repeated.

    Raises:
        DataplaneError: nft can't.
    """
    kernel.run(kube_proxy.keeper_script(map(header, kernel.families())))


def is_needed() -> bool:
    """Return whether any connection is translated still.

    Raises:
        KernelError: the kernel does not say.
    """
    return any(
        flow.to != flow.served_by
        for family in kernel.families()
        for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
        for flow in conntrack.flows(family, protocol)
    )


def release() -> list[str]:
    """Remove the table; return one line for each family where it was."""
    return kube_proxy.remove_keeper()
