"""Several nodes, a router between them, and a client behind it, all in one kernel.

    client 198.51.100.100 --- router ---+--- eth0 10.1.1.1 node-1 --- pod11 10.244.1.11, pod12 10.244.1.12
           2001:db8:c::100              |         fd00:1:1::1         fd00:244:1::11     fd00:244:1::12
                                        +--- eth0 10.1.2.1 node-2 --- pod21 10.244.2.11, ...
                                        +--- ...

Every link is a subnet of its own, so all that leaves a node goes through the router. It has routes to the
pods of each node, and to the VIPs through one node at a time (:meth:`Cluster.route_vips`). Each node has a
cgroup and a BPF file system of its own, which is all that an agent needs to be on its own.

Devices behave as network cards do: checksums are finished before a packet leaves, so that XDP programs see
whole packets, and the router's ends have an XDP program that passes everything, so that they take what one
on a node sends back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from ebpfproxy.libbpf import Program, lib
from ebpfproxy.libbpf.probes import has_xdp_frags
from ebpfproxy.libbpf.programs import XDP_HAS_FRAGS
from rig.kernel import Netns, new_bpffs, new_cgroup, new_netns
from rig.names import temporary_directory
from rig.process import HERE, Place
from rig.topology import Pod

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

CLIENT_IPS = ("198.51.100.100", "2001:db8:c::100")
OTHER_CLIENT_IPS = (
    "198.51.100.101",
    "2001:db8:c::101",
)  # of the same client, used where a test binds to them
ROUTER_IPS = ("198.51.100.1", "2001:db8:c::1")  # its address on the client's link
XDP_PASS = 2  # linux/bpf.h
CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:244::/32")
VIP_CIDRS = ("10.96.0.0/16", "203.0.113.0/24", "fd00:96::/112", "2001:db8:f::/64")


@dataclass(frozen=True)
class Node:
    """A namespace with a cgroup and a BPF file system, and pods behind it."""

    number: int
    netns: Netns
    cgroup: Path
    bpffs: Path
    directory: Path  # for files
    pods: list[Pod] = field(default_factory=list)

    @property
    def node_name(self) -> str:
        return f"node-{self.number}"

    @property
    def ips(self) -> tuple[str, str]:
        return f"10.1.{self.number}.1", f"fd00:1:{self.number}::1"

    @property
    def router_ips(self) -> tuple[str, str]:
        """The router's addresses on the node's link."""
        return f"10.1.{self.number}.254", f"fd00:1:{self.number}::fe"

    @property
    def gateways(self) -> tuple[str, str]:
        """The node's addresses towards its pods."""
        return f"10.244.{self.number}.1", f"fd00:244:{self.number}::1"

    @property
    def pod_cidrs(self) -> tuple[str, str]:
        return f"10.244.{self.number}.0/24", f"fd00:244:{self.number}::/64"

    @property
    def on_node(self) -> Place:
        """The node with the cgroup whose sockets are load-balanced."""
        return self.netns.place(self.cgroup)

    @property
    def on_node_bare(self) -> Place:
        return self.netns.place()

    def in_cgroup(self, pod: Pod) -> Place:
        """A process of the pod that does sit in the load-balanced cgroup."""
        return pod.netns.place(self.cgroup)


@dataclass
class Cluster:
    """What one test has: use as ``with Cluster(nodes=2) as cluster``.

    Args:
        node_count: how many nodes.
        pods_per_node: how many pods each has.
        mtus: of links that are not 1500, by the name of the router's device: ``client``, ``node-1``, ...
        families: 0 for IPv4, 1 for IPv6; both is dual stack.
        offloads: whether devices leave checksums and segmentation to the next one, as between virtual
            machines of one host; then an XDP program sees unfinished packets.
    """

    node_count: int = 2
    pods_per_node: int = 2
    mtus: Mapping[str, int] = field(default_factory=dict)
    families: tuple[int, ...] = (0, 1)
    offloads: bool = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as made:
            self._made = made
            self.directory = temporary_directory("files")
            made.callback(HERE.run, "rm", "-rf", self.directory)
            self.client = made.enter_context(new_netns("client"))
            self.router = made.enter_context(new_netns("router"))
            self.nodes = [self._new_node(number + 1) for number in range(self.node_count)]
            self._pass = self.nodes[0].bpffs / "pass"
            flags = XDP_HAS_FRAGS if has_xdp_frags() else 0
            with Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_XDP, flags, XDP_PASS)) as program:
                program.pin(self._pass)
            self._link()
            self._configure_client()
            self._configure_router()
            for node in self.nodes:
                self._configure_node(node)
            self.route_vips(self.nodes[0])
            self._made = made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    @property
    def pods(self) -> dict[str, Pod]:
        """Every pod by name."""
        return {pod.name: pod for node in self.nodes for pod in node.pods}

    def node_of(self, pod: Pod) -> Node:
        return self.nodes[pod.node - 1]

    def place(self, name: str) -> Place:
        """Return where a process of that host runs: ``client``, ``router``, ``node-1``, ``pod11``.

        On a node in its cgroup, in a pod in none: its packets are translated, not its sockets.
        ``pod11+`` is in its node's cgroup.
        """
        if name in ("client", "router"):
            return getattr(self, name).place()  # type: ignore[no-any-return]
        if name.startswith("node-"):
            return self.nodes[int(name[5:]) - 1].on_node
        pod = self.pods[name.rstrip("+")]
        return self.node_of(pod).in_cgroup(pod) if name.endswith("+") else pod.place

    def route_vips(self, node: Node) -> None:
        """Make the router send VIPs to ``node`` from now on."""
        self._ip(
            self.router,
            *(
                f"route replace {cidr} via {node.ips[':' in cidr]}"
                for cidr in VIP_CIDRS
                if (":" in cidr) in self.families
            ),
        )

    def narrow(self, destinations: Iterable[str], mtu: int) -> None:
        """Let only packets of ``mtu`` bytes through from the router to ``destinations``, routes that it has.

        The kernel answers what is larger by an ICMP error, as at a smaller link.
        """
        for destination in destinations:
            route = self.router.shell(f"ip {_family(destination)} route show {destination}").strip()
            assert route, destination
            self._ip(self.router, f"route change {route} mtu lock {mtu}")

    # --- making it

    def _new_node(self, number: int) -> Node:
        made = self._made
        directory = self.directory / f"node-{number}"
        directory.mkdir()
        cgroup, bpffs = made.enter_context(new_cgroup()), made.enter_context(new_bpffs())
        node = Node(number, made.enter_context(new_netns(f"node{number}")), cgroup, bpffs, directory)
        for index in range(self.pods_per_node):
            name = f"pod{number}{index + 1}"
            node.pods.append(Pod(name, index + 1, made.enter_context(new_netns(name)), number))
        return node

    def _link(self) -> None:
        """Make all veth pairs at once."""
        ends = [(self.client, "eth0", self.router, "client")]
        for node in self.nodes:
            ends.append((node.netns, "eth0", self.router, node.node_name))
            ends += [(pod.netns, "eth0", node.netns, pod.device) for pod in node.pods]
        lines = []
        for left, left_device, right, right_device in ends:
            mtu = self.mtus.get(right_device, 1500)
            lines.append(
                f"link add {left_device} mtu {mtu} netns {left.name} type veth"
                f" peer name {right_device} mtu {mtu} netns {right.name}"
            )
        HERE.run("ip", "-batch", "-", text="\n".join(lines))

    def _configure_client(self) -> None:
        lines = ["link set eth0 up"]
        for family in self.families:
            lines += [
                f"address add {CLIENT_IPS[family]}/{(24, 64)[family]} dev eth0",
                f"address add {OTHER_CLIENT_IPS[family]}/{(24, 64)[family]} dev eth0"
                + (" preferred_lft 0" if family else ""),
                f"route add default via {ROUTER_IPS[family]}",
            ]
        self._ip(self.client, *lines)
        self._devices(self.client, ["eth0"])

    def _configure_router(self) -> None:
        lines = [
            "link set client up",
            *(f"address add {ROUTER_IPS[family]}/{(24, 64)[family]} dev client" for family in self.families),
        ]
        for node in self.nodes:
            lines += [
                f"link set {node.node_name} up",
                *(
                    f"address add {node.router_ips[family]}/{(24, 64)[family]} dev {node.node_name}"
                    for family in self.families
                ),
                *(f"route add {node.pod_cidrs[family]} via {node.ips[family]}" for family in self.families),
            ]
        self._forward(self.router)
        self._ip(self.router, *lines)
        self._devices(self.router, ["client", *(node.node_name for node in self.nodes)], polls=True)

    def _configure_node(self, node: Node) -> None:
        lines = [
            "link set eth0 up",
            *(f"address add {node.ips[family]}/{(24, 64)[family]} dev eth0" for family in self.families),
            *(f"route add default via {node.router_ips[family]}" for family in self.families),
        ]
        for pod in node.pods:
            lines.append(f"link set {pod.device} up")
            for family in self.families:
                lines += [
                    f"address add {node.gateways[family]}/{(32, 128)[family]} dev {pod.device}",
                    f"route add {pod.ips[family]} dev {pod.device}",
                ]
        self._forward(node.netns)
        self._ip(node.netns, *lines)
        self._devices(node.netns, ["eth0", *(pod.device for pod in node.pods)])
        for pod in node.pods:
            lines = ["link set eth0 up"]
            for family in self.families:
                lines += [
                    f"address add {pod.ips[family]}/{(32, 128)[family]} dev eth0",
                    f"route add {node.gateways[family]} dev eth0",
                    f"route add default via {node.gateways[family]}",
                ]
            self._ip(pod.netns, *lines)
            self._devices(pod.netns, ["eth0"])

    @staticmethod
    def _forward(netns: Netns) -> None:
        # Replies may take another way than requests. Nobody limits its ICMP errors: tests send many.
        netns.shell(
            """
            echo 1 > /proc/sys/net/ipv4/ip_forward
            echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
            echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter
            echo 0 > /proc/sys/net/ipv4/icmp_ratelimit
            echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
            """
        )

    @staticmethod
    def _ip(netns: Netns, *lines: str) -> None:
        for family in ("-4", "-6"):
            mine = [line for line in lines if _family(line) == family]
            netns.place().run("ip", family, "-batch", "-", text="\n".join(mine))

    def _devices(self, netns: Netns, names: Sequence[str], *, polls: bool = False) -> None:
        """Make veths behave as network cards."""
        # An XDP program polls, too; GRO alone does not take what XDP sends back (seen with Linux 6.18).
        lines = [f"ip link set {name} xdpdrv pinned {self._pass}" for name in names if polls]
        if not self.offloads:
            lines += [f"ethtool -K {name} tx off tso off gso off" for name in names]
        netns.shell("\n".join(lines))


def _family(line: str) -> str:
    """Return the flag of ``ip`` for a line's IP family; what names no address is said once, with IPv4."""
    return "-6" if ":" in line else "-4"
