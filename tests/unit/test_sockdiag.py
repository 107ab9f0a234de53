"""UDP sockets that the kernel ends for us: those that are named, in the namespaces where they are."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import pytest

from ebpfproxy import sockdiag
from ebpfproxy.sockdiag import Peer
from rig.kernel import new_netns
from rig.probe import Probe

if TYPE_CHECKING:
    from pathlib import Path

    from rig.kernel import Netns
    from rig.probe import RemoteSocket

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(sockdiag.why_not() is not None, reason="this kernel ends no sockets for others"),
]

PORT = 5353
LOOPBACK = {
    socket.AF_INET: ("127.0.0.1", bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1])),
    socket.AF_INET6: ("::1", bytes(15) + b"\x01"),
}


def peer(family: socket.AddressFamily, port: int = PORT) -> Peer:
    return Peer(LOOPBACK[family][1], port.to_bytes(2, "big"))


def cookie(client: RemoteSocket) -> int:
    so_cookie = 57  # asm-generic/socket.h
    return int.from_bytes(client.getsockopt(socket.SOL_SOCKET, so_cookie, 8), sys.byteorder)


@pytest.mark.parametrize("family", LOOPBACK)
def test_the_named_one_ends_and_no_other(netns: Netns, cgroup: Path, family: socket.AddressFamily) -> None:
    with Probe(netns.place(cgroup)) as probe:
        opened = [probe.socket(socket.SOCK_DGRAM, family) for _ in range(3)]
        for client in opened:
            client.connect(LOOPBACK[family][0], PORT)
        named, moved, other = opened
        numbers = [cookie(client) for client in opened]
        moved.connect(LOOPBACK[family][0], PORT + 1)
        doomed = {numbers[0]: peer(family), numbers[1]: peer(family)}
        where = sockdiag.namespaces(cgroup)
        assert len(where) == 1
        assert sockdiag.close_udp(doomed, where.values()) == 1
        with pytest.raises(ConnectionAbortedError):
            named.recv()
        assert moved.getpeername() == (LOOPBACK[family][0], PORT + 1)
        assert other.getpeername() == (LOOPBACK[family][0], PORT)
        assert sockdiag.close_udp(doomed, where.values()) == 0, "it is over"


def test_namespaces_of_a_cgroup_and_those_below(netns: Netns, cgroup: Path) -> None:
    assert sockdiag.namespaces(cgroup) == {}
    (cgroup / "below").mkdir()
    with (
        new_netns() as another,
        Probe(netns.place(cgroup)) as one,
        Probe(netns.place(cgroup / "below")) as two,
        Probe(another.place(cgroup / "below")) as three,
    ):
        for probe in (one, two, three):
            probe.call("timeout", 1.0)  # it answers: by now it is where it belongs
        found = sockdiag.namespaces(cgroup)
        assert set(found) == {
            (status.st_dev, status.st_ino) for status in (netns.path.stat(), another.path.stat())
        }


def test_a_namespace_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    assert sockdiag.close_udp({1: peer(socket.AF_INET)}, [tmp_path / "gone"]) == 0
