"""What each mode does, feature by feature, and why not where it does not.

The one source of ``ebpfproxy check --capabilities``, of docs/dataplanes.md and of the marks in the tests that
run for every mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ebpfproxy.model.services import Service


class Feature(NamedTuple):
    """Something that a dataplane does, or not."""

    name: str  # for tests
    what: str  # for people
    limits: Mapping[str, str] = {}  # mode -> why not, or what it does instead

    def limit(self, mode: str) -> str | None:
        """Return why ``mode`` does not do it, None if it does."""
        return self.limits.get(mode)


_NETFILTER = ("nftables", "ipvs", "iptables")


def _each(modes: tuple[str, ...], reason: str) -> dict[str, str]:
    return dict.fromkeys(modes, reason)


_NO_COUNT = "netfilter counts no open connections of a backend: {instead} is used"

FEATURES = (
    Feature("cluster-ip", "cluster IPs, external IPs, load-balancer IPs and NodePorts"),
    Feature("node-clients", "clients on the node"),
    Feature("pod-clients", "clients in pods, and outside"),
    Feature(
        "without-route",
        "clients on the node need no route to the VIP",
        _each(
            ("nftables", "iptables", "userspace"),
            "a packet is routed before it is looked at: the node needs a route to VIPs, a default route "
            "for instance",
        ),
    ),
    Feature("tcp", "TCP"),
    Feature("udp", "UDP"),
    Feature("sctp", "SCTP that enters the node", {"userspace": "Python has no SCTP sockets"}),
    Feature(
        "sctp-sockets",
        "SCTP from sockets on the node",
        {"bpf": "sock_lb looks at TCP and UDP sockets", "userspace": "Python has no SCTP sockets"},
    ),
    Feature("dual-stack", "IPv4, IPv6, dual stack"),
    Feature("policies", "traffic policies Cluster and Local"),
    Feature(
        "short-circuit",
        "under externalTrafficPolicy Local, the node and its pods reach endpoints of all nodes",
        {"ipvs": "as in kube-proxy, only if there is none on this node"},
    ),
    Feature("terminating", "terminating endpoints, topology hints, publishNotReadyAddresses"),
    Feature(
        "reject", "a Service without endpoints is refused at once; policy Local without local ones drops"
    ),
    Feature(
        "drop-sockets",
        "what is dropped is silent for sockets on the node, too",
        {"bpf": "connect() and send() fail at once: there is no packet yet that could be dropped"},
    ),
    Feature(
        "past-the-vip",
        "a client's port that went through a VIP may go past it to the same backend at once",
        {"ipvs": "for 10 s IPVS takes the backend's answers for those of the closed connection"},
    ),
    Feature(
        "reject-unused",
        "a VIP's port that no Service uses is refused at once",
        {"iptables": "as in kube-proxy the packet goes on to where the VIP is routed"},
    ),
    Feature(
        "reject-unconnected",
        "an unconnected UDP socket on the node is refused at once",
        _each((*_NETFILTER, "userspace"), "the kernel does not tell it of the ICMP error"),
    ),
    Feature(
        "reject-errno",
        "a connected UDP socket on the node that is refused gets ECONNREFUSED",
        _each(
            (*_NETFILTER, "userspace"), "send() fails with EPERM, and what comes after it with ECONNREFUSED"
        ),
    ),
    Feature(
        "error-source",
        "an ICMP error that refuses comes from the VIP",
        _each((*_NETFILTER, "userspace"), "it comes from the node; clients look at the packet in it"),
    ),
    Feature("source-ranges", "loadBalancerSourceRanges"),
    Feature("affinity", "session affinity by client address"),
    Feature(
        "one-affinity",
        "TCP affinity outlives a restart of the agent",
    ),
    Feature("random", "scheduler random", {"ipvs": "IPVS has none: rr is used"}),
    Feature(
        "random-weights",
        "weights for scheduler random",
        {"ipvs": "rr is used, which has none; use wrr"},
    ),
    Feature("rr", "scheduler rr"),
    Feature(
        "wrr",
        "scheduler wrr, with exact shares",
        {"iptables": "backends are picked at random: shares are right on average"},
    ),
    Feature(
        "sh",
        "schedulers sh and dh",
        {"iptables": "iptables has no match that hashes an address: random is used"},
    ),
    Feature(
        "maglev",
        "scheduler maglev",
        {"iptables": "iptables has no match that hashes an address: random is used"},
    ),
    Feature(
        "lc",
        "schedulers lc, wlc, sed and nq",
        {
            "nftables": _NO_COUNT.format(instead="rr for lc, wrr for the others"),
            "iptables": _NO_COUNT.format(instead="random"),
        },
    ),
    Feature(
        "loopback-node-ports",
        "NodePorts on 127.0.0.1",
        {"ipvs": "IPVS does not take packets from 127.0.0.1 to another host"},
    ),
    Feature(
        "loopback-node-ports-6",
        "NodePorts on ::1",
        _each(_NETFILTER, "the kernel sends nothing from ::1 to another host; IPv6 has no route_localnet"),
    ),
    Feature(
        "bind",
        "no process can bind a NodePort",
        _each(
            (*_NETFILTER, "userspace"),
            "a process may bind it, and gets nothing on the node's addresses: the Service does",
        ),
    ),
    Feature(
        "hairpin-address",
        "a pod that reaches itself by a socket sees its own address",
        _each(
            (*_NETFILTER, "userspace"), "it sees the node's: else the reply would not come back through it"
        ),
    ),
    Feature(
        "client-address",
        "the client's address reaches a backend on this node",
        {
            "ipvs": "as in kube-proxy, only under externalTrafficPolicy Local",
            "iptables": "as in kube-proxy, only under externalTrafficPolicy Local",
            "userspace": "the proxy opens a connection of its own",
        },
    ),
    Feature(
        "client-address-local",
        "the client's address reaches the backend under externalTrafficPolicy Local",
        {"userspace": "the proxy opens a connection of its own"},
    ),
    Feature(
        "snat",
        "outside traffic to a backend on another node gets this node's address",
    ),
    Feature(
        "dsr",
        "forwarding dsr and hybrid: replies go straight to the client",
        _each((*_NETFILTER, "userspace"), "only BPF programs encapsulate: snat is used"),
    ),
    Feature(
        "masquerade-all",
        "masqueradeAll; outside traffic to a cluster IP gets this node's address",
    ),
    Feature(
        "no-cost",
        "no cost a packet for clients on the node",
        {
            **_each(
                _NETFILTER, "every packet is translated, with an entry in the kernel's connection tracking"
            ),
            "userspace": "every byte goes through a process",
        },
    ),
    Feature(
        "flush",
        "other tools can't flush it away",
        _each(
            (*_NETFILTER, "userspace"),
            "rules can be flushed by others; that is noticed and mended, by nftables within a second, by "
            "others within syncPeriod",
        ),
    ),
    Feature(
        "udp-cleanup",
        "UDP flows to a backend that is gone end at once",
    ),
    Feature(
        "retry",
        "the next backend is tried when one does not answer",
        _each(("bpf", *_NETFILTER), "the kernel picks once for each connection"),
    ),
    Feature(
        "upgrade",
        "connections outlive the agent, and its upgrade",
    ),
)

BY_NAME = {each.name: each for each in FEATURES}


def limit(mode: str, name: str) -> str | None:
    """Return why ``mode`` does not do the feature ``name``, None if it does."""
    return BY_NAME[name].limit(mode)


def by_reason(limits: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the modes that share a reason, reason by reason."""
    found: dict[str, list[str]] = {}
    for mode, reason in limits.items():
        found.setdefault(reason, []).append(mode)
    return found


def named(services: Iterable[Service]) -> str:
    """Return the names of the first few, for the end of a sentence."""
    names = sorted({str(service.name) for service in services})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
