"""A node with pods behind it and a client outside, all in one kernel.

    outside 192.0.2.100 ---- eth0 192.0.2.1  node  10.244.0.1 pod1 ---- eth0 10.244.0.11 pod 1
            2001:db8::100    2001:db8::1           fd00:244::1 pod2 --- eth0 10.244.0.12 pod 2 ...

Each pod hangs on a veth of its own with a /32 and /128 route, as CNI's ptp plugin does it. The node
forwards; the outside client sends everything through the node and nothing translates sources, so a
backend sees the client's own address.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from rig.kernel import Netns, new_bpffs, new_cgroup, new_netns
from rig.names import temporary_directory
from rig.process import HERE, Place
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NODE_NAME = "node-1"
NODE_IPS = ("192.0.2.1", "2001:db8::1")
OUTSIDE_IPS = ("192.0.2.100", "2001:db8::100")
GATEWAYS = ("10.244.0.1", "fd00:244::1")
POD_CIDRS = ("10.244.0.0/24", "fd00:244::/64")


@dataclass(frozen=True)
class Pod:
    """A namespace behind the node."""

    name: str
    number: int
    netns: Netns
    node: int = 0  # number of its node, where there are several

    @property
    def v4(self) -> str:
        return f"10.244.{self.node}.{10 + self.number}"

    @property
    def v6(self) -> str:
        subnet = f":{self.node}" if self.node else ""
        return f"fd00:244{subnet}::{10 + self.number}"

    @property
    def ips(self) -> tuple[str, str]:
        return self.v4, self.v6

    @property
    def device(self) -> str:
        """The node's end of its veth."""
        return self.name

    @property
    def place(self) -> Place:
        return self.netns.place()


@dataclass
class Topology:
    """What one test has: use as ``with Topology(pods=3) as net``."""

    pod_count: int = 3
    pods: list[Pod] = field(default_factory=list)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as made:
            self._made = made
            self.directory = temporary_directory("files")
            made.callback(HERE.run, "rm", "-rf", self.directory)
            self.cgroup: Path = made.enter_context(new_cgroup())
            self.bpffs: Path = made.enter_context(new_bpffs())
            self.node: Netns = made.enter_context(new_netns("node"))
            self.outside: Netns = made.enter_context(new_netns("outside"))
            self.connect_outside()
            for _ in range(self.pod_count):
                self.add_pod()
            self._made = made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    @property
    def node_name(self) -> str:
        return NODE_NAME

    @property
    def on_node(self) -> Place:
        """The node with the cgroup whose sockets are load-balanced."""
        return self.node.place(self.cgroup)

    @property
    def on_node_bare(self) -> Place:
        """The node, outside that cgroup: where the agent itself runs."""
        return self.node.place()

    @property
    def from_outside(self) -> Place:
        return self.outside.place()

    def in_cgroup(self, pod: Pod) -> Place:
        """A process of the pod that does sit in the load-balanced cgroup."""
        return pod.netns.place(self.cgroup)

    def add_pod(self, name: str = "") -> Pod:
        """Make one more pod; its device appears on the node."""
        number = len(self.pods) + 1
        name = name or f"pod{number}"
        pod = Pod(name, number, self._made.enter_context(new_netns(name)))
        self._link(pod.netns, "eth0", self.node, pod.device)
        pod.netns.shell(
            f"""
            ip link set eth0 up
            ip addr add {pod.v4}/32 dev eth0
            ip addr add {pod.v6}/128 dev eth0 nodad
            ip route add {GATEWAYS[0]} dev eth0; ip route add default via {GATEWAYS[0]}
            ip route add {GATEWAYS[1]} dev eth0; ip route add default via {GATEWAYS[1]}
            """
        )
        self.node.shell(
            f"""
            ip link set {pod.device} up
            ip addr add {GATEWAYS[0]}/32 dev {pod.device}
            ip addr add {GATEWAYS[1]}/128 dev {pod.device} nodad
            ip route add {pod.v4} dev {pod.device}
            ip route add {pod.v6} dev {pod.device}
            """
        )
        self.pods.append(pod)
        return pod

    def connect_outside(self) -> None:
        self._link(self.node, "eth0", self.outside, "eth0")
        self.node.shell(
            f"""
            echo 1 > /proc/sys/net/ipv4/ip_forward
            echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            ip link set eth0 up
            ip addr add {NODE_IPS[0]}/24 dev eth0
            ip addr add {NODE_IPS[1]}/64 dev eth0 nodad
            """
        )
        self.outside.shell(
            f"""
            ip link set eth0 up
            ip addr add {OUTSIDE_IPS[0]}/24 dev eth0; ip route add default via {NODE_IPS[0]}
            ip addr add {OUTSIDE_IPS[1]}/64 dev eth0 nodad; ip route add default via {NODE_IPS[1]}
            """
        )

    def add_default_route(self) -> None:
        """Give the node a default route, to the outside; may be repeated.

        Nobody limits its ICMP errors then: tests send many, and redirects count.
        """
        self.node.shell(
            f"""
            ip route replace default via {OUTSIDE_IPS[0]}
            ip route replace default via {OUTSIDE_IPS[1]}
            echo 0 > /proc/sys/net/ipv4/icmp_ratelimit
            echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
            """
        )

    @staticmethod
    def _link(left: Netns, left_device: str, right: Netns, right_device: str) -> None:
        HERE.run(
            *["ip", "link", "add", left_device, "netns", left.name, "type", "veth"],
            *["peer", "name", right_device, "netns", right.name],
        )


def offloads(place: Place, device: str, state: str, features: Sequence[str]) -> None:
    """Turn ``features`` of a device "on" or "off", as ``ethtool -K`` names them."""
    place.run("ethtool", "-K", device, *[word for feature in features for word in (feature, state)])


def wait_listening(place: Place, port: int, *, udp: bool = False, timeout_s: float = 30) -> None:
    """Wait until something in the namespace listens on ``port``."""
    eventually(
        lambda: place.run("ss", "-Hln", "-u" if udp else "-t", f"sport = :{port}").stdout,
        f"a listener on port {port}",
        timeout_s=timeout_s,
    )
