"""The proxy process of mode userspace, over real sockets on loopback."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import struct
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane.userspace import client, protocol
from ebpfproxy.dataplane.userspace.protocol import Fate, Listener, ServicePort, Settings, Target, Update
from ebpfproxy.dataplane.userspace.proxy import raise_limits
from rig.names import temporary_directory
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
RESET = struct.pack("ii", 1, 0)
TIMEOUT_S = 20.0


class Bench:
    """A proxy process, and backends that tests write themselves."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self.stack = directory, stack
        self.proxy = client.Proxy(directory)
        self.settings = Settings()

    def bound(self, kind: int, address: str = "127.0.0.1") -> socket.socket:
        """Return a bound socket; TCP listens."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = self.stack.enter_context(socket.socket(family, kind))
        made.settimeout(TIMEOUT_S)
        made.bind((address, 0))
        if kind == TCP:
            made.listen(1024)
        return made

    def serve(
        self,
        targets: Sequence[Target],
        protocol_name: str = "TCP",
        *,
        key: str = "s",
        local: Sequence[Target] = (),
        known: Sequence[Target] | None = None,
        family: int = 4,
        scheduler: str = "rr",
        affinity_s: int = 0,
        inside: Fate = Fate.CLUSTER,
        outside: Fate = Fate.CLUSTER,
        ranges: tuple[str, ...] | None = None,
        settings: Settings | None = None,
    ) -> tuple[str, int]:
        """Serve a Service port; return where."""
        all_known = frozenset(target[:2] for target in (targets if known is None else known))
        port = ServicePort(
            protocol_name, family, scheduler, affinity_s, tuple(targets), tuple(local), all_known
        )
        address = "::1" if family == 6 else "127.0.0.1"
        listener = Listener(key, address, 0, inside, outside, ranges)
        done = self.proxy.update(Update(settings, {key: port}, {key: listener}))
        assert not done.problems
        return address, done.ports[key]

    def connect(self, where: tuple[str, int], source: str = "") -> socket.socket:
        return self.stack.enter_context(
            socket.create_connection(where, TIMEOUT_S, (source, 0) if source else None)
        )

    def pair(self, **more: object) -> tuple[socket.socket, socket.socket]:
        """Return a client and its backend's end, joined by the proxy."""
        backend = self.bound(TCP)
        where = self.serve([target(backend)], **more)  # type: ignore[arg-type]
        here = self.connect(where)
        there, _ = backend.accept()
        there.settimeout(TIMEOUT_S)
        return here, self.stack.enter_context(there)


def target(backend: socket.socket, weight: int = 1) -> Target:
    address, port = backend.getsockname()[:2]
    return Target(address, port, weight)


@pytest.fixture
def bench() -> Iterator[Bench]:
    directory = temporary_directory("proxy")  # its name tells whose the proxy is, if we are killed
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        made = Bench(directory, stack)
        try:
            yield made
        finally:
            made.proxy.close()
            client.stop(directory)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(partial(sock.recv, 65536), b""))


def closed_port(bench: Bench, kind: int = TCP) -> Target:
    """Return a backend that refuses."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return target(sock)


def silent(bench: Bench) -> Target:
    """Return a TCP backend that answers nothing: with a full queue the kernel drops what asks."""
    sock = bench.bound(TCP)
    sock.listen(0)
    bench.connect(target(sock)[:2])
    return target(sock)


# --- half-close, resets, back pressure


def test_each_direction_ends_alone(bench: Bench) -> None:
    here, there = bench.pair()
    here.sendall(b"question")
    here.shutdown(socket.SHUT_WR)
    assert read_all(there) == b"question", "the client's FIN came through"
    there.sendall(b"answer, ")
    there.sendall(b"after the client has ended")
    there.shutdown(socket.SHUT_WR)
    assert read_all(here) == b"answer, after the client has ended"
    eventually(lambda: bench.proxy.counts().open_connections == 0, "the connection to end")


def test_backend_may_end_first(bench: Bench) -> None:
    here, there = bench.pair()
    there.sendall(b"banner")
    there.shutdown(socket.SHUT_WR)
    assert read_all(here) == b"banner"
    here.sendall(b"still sending")
    here.shutdown(socket.SHUT_WR)
    assert read_all(there) == b"still sending"


@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_reset_is_passed_on_as_a_reset(bench: Bench, who: str) -> None:
    here, there = bench.pair()
    first, other = (here, there) if who == "client" else (there, here)
    here.sendall(b"x")
    assert there.recv(1) == b"x"
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    first.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_a_receiver_that_does_not_read_stops_its_sender(bench: Bench) -> None:
    here, there = bench.pair()
    here.setblocking(False)
    sent, block = 0, bytes(1 << 16)
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        try:
            sent += here.send(block)
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        assert sent < 1 << 28, "nobody holds a quarter of a gigabyte"
    memory_kib = int(_field(bench.proxy.hello.pid, "VmRSS").split()[0])
    assert memory_kib < 100_000, "what is held is in the kernel, bounded by the sockets and one pipe"
    here.shutdown(socket.SHUT_WR)
    assert len(read_all(there)) == sent


def test_much_data_both_ways_at_once(bench: Bench) -> None:
    here, there = bench.pair()
    sizes = (20_000_003, 10_000_019)
    blobs = [os.urandom(1024) * (size // 1024) + bytes(size % 1024) for size in sizes]

    def send(sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    got: list[bytes] = [b"", b""]
    threads = [
        threading.Thread(target=send, args=(here, blobs[0])),
        threading.Thread(target=send, args=(there, blobs[1])),
        threading.Thread(target=lambda: got.__setitem__(0, read_all(there))),
        threading.Thread(target=lambda: got.__setitem__(1, read_all(here))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == blobs


# --- backends that do not answer


def test_a_backend_that_refuses_is_passed_over(bench: Bench) -> None:
    good = bench.bound(TCP)
    where = bench.serve([closed_port(bench), target(good), closed_port(bench)])
    for _ in range(3):
        here = bench.connect(where)
        there, _ = good.accept()
        with there:
            here.sendall(b"x")
            assert there.recv(1) == b"x"
    assert bench.proxy.counts().retries >= 2
    assert bench.proxy.counts().failures == 0


def test_a_backend_that_says_nothing_is_passed_over(bench: Bench) -> None:
    good = bench.bound(TCP)
    where = bench.serve([silent(bench), silent(bench), target(good)])
    here = bench.connect(where)
    here.sendall(b"patience")
    there, _ = good.accept()
    with there:
        assert there.recv(8) == b"patience"
    assert bench.proxy.counts().retries == 2


def test_nobody_answers_so_the_client_is_reset(bench: Bench) -> None:
    where = bench.serve([closed_port(bench), closed_port(bench)])
    with pytest.raises(ConnectionResetError):  # it may come before connect() is through
        bench.connect(where).recv(1)
    eventually(lambda: bench.proxy.counts().failures == 1, "the failure to be counted")


def test_udp_backend_that_refuses_is_passed_over_with_the_same_datagram(bench: Bench) -> None:
    good = bench.bound(UDP)
    where = bench.serve([closed_port(bench, UDP), target(good)], "UDP")
    here = bench.bound(UDP)
    here.sendto(b"once", where)
    data, peer = good.recvfrom(100)
    assert data == b"once"
    good.sendto(b"answer", peer)
    assert here.recvfrom(100) == (b"answer", where)
    assert bench.proxy.counts().retries == 1


# --- who gets the connection


def accepted(bench: Bench, backend: socket.socket) -> int:
    """Accept all that waits; return how many that was."""
    backend.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            bench.stack.enter_context(backend.accept()[0])
            count += 1
    return count


@pytest.mark.parametrize(
    ("scheduler", "weights", "count", "shares"),
    [
        ("rr", (1, 1, 1), 9, [3, 3, 3]),
        ("wrr", (4, 3, 2), 9, [4, 3, 2]),  # the LVS documentation's example
        ("lc", (1, 1, 1), 9, [3, 3, 3]),
        ("wlc", (1, 2, 1), 8, [2, 4, 2]),
    ],
)
def test_schedulers_share_connections_that_stay(
    bench: Bench, scheduler: str, weights: tuple[int, ...], count: int, shares: list[int]
) -> None:
    backends = [bench.bound(TCP) for _ in weights]
    targets = [target(backend, weight) for backend, weight in zip(backends, weights, strict=True)]
    where = bench.serve(targets, scheduler=scheduler)

    def joined(wanted: int) -> bool:
        return bench.proxy.counts().open_connections == wanted

    for number in range(count):
        bench.connect(where)
        eventually(partial(joined, number + 1), "the connection to be joined")
    assert [accepted(bench, backend) for backend in backends] == shares


def test_affinity_binds_clients_until_its_timeout(bench: Bench) -> None:
    backends = [bench.bound(TCP) for _ in range(3)]
    where = bench.serve([target(each) for each in backends], affinity_s=3600)
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        for _ in range(4):
            bench.connect(where, source)  # at once, before the one before has its backend
    shares = [0, 0, 0]

    def all_accepted() -> bool:
        shares[:] = [
            share + accepted(bench, backend) for share, backend in zip(shares, backends, strict=True)
        ]
        return sum(shares) == 12

    eventually(all_accepted, "all to be joined")
    assert shares == [4, 4, 4], "each client has one of them"


def test_a_client_whose_backend_does_not_answer_gets_another_and_stays(bench: Bench) -> None:
    gone, good, third = closed_port(bench), bench.bound(TCP), bench.bound(TCP)
    where = bench.serve([gone, target(good), target(third)], affinity_s=3600)
    for _ in range(3):
        here = bench.connect(where, "127.0.0.2")
        there = bench.stack.enter_context(good.accept()[0])
        here.sendall(b"x")
        assert there.recv(1) == b"x", "joined: the proxy knows who answered"
    assert bench.proxy.counts().retries == 1, "the first connection found out, the others knew"


def test_who_comes_from_outside_gets_the_other_pool(bench: Bench) -> None:
    inner, outer = bench.bound(UDP), bench.bound(UDP)
    # Everything on loopback is inside, so here the two fates change places.
    where = bench.serve(
        [target(outer)], "UDP", local=[target(inner)], known=[target(inner), target(outer)], inside=Fate.LOCAL
    )
    bench.bound(UDP).sendto(b"?", where)
    assert inner.recv(10) == b"?"


# --- drop, refuse, source ranges


@pytest.mark.root  # newer kernels: CAP_NET_ADMIN for a filter on TCP
@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_sources_outside_the_ranges_are_dropped(bench: Bench, kind: int) -> None:
    backend = bench.bound(kind)
    name = "TCP" if kind == TCP else "UDP"
    where = bench.serve([target(backend)], name, ranges=("127.0.0.8/30", "127.1.0.0/16"))
    for source, may in [
        ("127.0.0.8", True), ("127.0.0.11", True), ("127.0.0.12", False),
        ("127.0.0.7", False), ("127.1.2.3", True), ("127.2.0.1", False),
    ]:  # fmt: skip
        with socket.socket(socket.AF_INET, kind) as here:
            here.bind((source, 0))
            here.settimeout(TIMEOUT_S if may else 0.3)
            if kind == UDP:
                here.sendto(source.encode(), where)
                backend.settimeout(TIMEOUT_S if may else 0.3)
                got: Callable[[], object] = partial(backend.recv, 100)
            else:
                got = partial(here.connect, where)
            if may:
                got()
            else:
                with pytest.raises(TimeoutError):
                    got()


@pytest.mark.root
def test_a_listener_that_drops_answers_nothing(bench: Bench) -> None:
    backend = bench.bound(TCP)
    where = bench.serve([target(backend)], inside=Fate.DROP, outside=Fate.DROP)
    with socket.socket() as here:
        here.settimeout(0.3)
        with pytest.raises(TimeoutError):
            here.connect(where)
    bench.serve([target(backend)])  # the same listener, open again
    here = bench.connect((where[0], where[1]))
    here.sendall(b"x")


def test_a_listener_that_goes_refuses_and_established_connections_stay(bench: Bench) -> None:
    here, there = bench.pair()
    where = here.getpeername()
    bench.proxy.update(Update(gone_services=["s"], gone_listeners=["s"]))
    with pytest.raises(ConnectionRefusedError):
        bench.connect(where)
    here.sendall(b"still here")
    assert there.recv(100) == b"still here"


def test_changed_endpoints_leave_connections_where_they_are(bench: Bench) -> None:
    here, there = bench.pair()
    other = bench.bound(TCP)
    bench.serve([target(other)])
    bench.connect(here.getpeername())
    other.accept()[0].close()
    here.sendall(b"same as before")
    assert there.recv(100) == b"same as before"


# --- UDP flows


def test_udp_flow_stays_with_its_backend_until_that_is_gone(bench: Bench) -> None:
    first, second = bench.bound(UDP), bench.bound(UDP)
    where = bench.serve([target(first)], "UDP")
    here = bench.bound(UDP)
    here.sendto(b"1", where)
    _, peer = first.recvfrom(10)
    first.sendto(b"a", peer)
    assert here.recv(10) == b"a"
    # It gets no new flows, but it is there still: it terminates.
    bench.serve([target(second)], "UDP", known=[target(first), target(second)])
    here.sendto(b"2", where)
    assert first.recv(10) == b"2"
    bench.serve([target(second)], "UDP")
    here.sendto(b"3", where)
    assert second.recv(10) == b"3", "the very next datagram"


@pytest.mark.parametrize("family", [4, 6])
def test_udp_answers_come_from_where_the_client_wrote_to(bench: Bench, family: int) -> None:
    backend = bench.bound(UDP, "::1" if family == 6 else "127.0.0.1")
    port = ServicePort("UDP", family, "rr", 0, (target(backend),), (), frozenset({target(backend)[:2]}))
    listener = Listener("any", "", 0, Fate.CLUSTER, Fate.CLUSTER)  # bound to no address
    done = bench.proxy.update(Update(None, {"any": port}, {"any": listener}))
    for address in ["::1"] if family == 6 else ["127.0.0.1", "127.0.0.77"]:
        here = bench.bound(UDP, "::1" if family == 6 else "127.0.0.1")
        here.sendto(b"?", (address, done.ports["any"]))
        data, peer = backend.recvfrom(10)
        backend.sendto(data, peer)
        assert here.recvfrom(10)[1][:2] == (address, done.ports["any"])


def test_datagrams_of_every_size_go_through_whole(bench: Bench) -> None:
    backend = bench.bound(UDP)
    where = bench.serve([target(backend)], "UDP")
    here = bench.bound(UDP)
    for size in (0, 1, 1472, 9000, 65507):  # RFC 768: 65535 less the headers
        here.sendto(bytes(size), where)
        data, peer = backend.recvfrom(70_000)
        backend.sendto(data, peer)
        assert len(here.recv(70_000)) == size


# --- time


@pytest.mark.parametrize(
    ("settings", "is_half_closed", "ends"),
    [
        (Settings(tcp_idle_s=0.5), False, True),
        (Settings(tcp_half_closed_s=0.5), True, True),
        (Settings(tcp_half_closed_s=0.5), False, False),
        (Settings(tcp_idle_s=0.5), True, False),
    ],
)
def test_idle_connections_end(bench: Bench, settings: Settings, is_half_closed: bool, ends: bool) -> None:
    here, there = bench.pair(settings=settings)
    if is_half_closed:
        here.shutdown(socket.SHUT_WR)
        assert read_all(there) == b""
    if ends:
        with pytest.raises(ConnectionResetError):
            here.recv(1)
    else:
        here.settimeout(2.5)
        with pytest.raises(TimeoutError):
            here.recv(1)


def test_idle_udp_flows_end(bench: Bench) -> None:
    backend = bench.bound(UDP)
    where = bench.serve([target(backend)], "UDP", settings=Settings(udp_s=0.2, udp_stream_s=3600))
    quiet, busy = bench.bound(UDP), bench.bound(UDP)
    for here in (quiet, busy):
        here.sendto(b"?", where)
        _, peer = backend.recvfrom(10)
        if here is busy:
            backend.sendto(b"!", peer)
            assert here.recv(10) == b"!"
    eventually(lambda: bench.proxy.counts().open_flows == 1, "the unanswered flow to end")


# --- the life of the process


def test_an_agent_that_comes_back_finds_everything(bench: Bench) -> None:
    here, there = bench.pair()
    before = bench.proxy.hello.pid
    bench.proxy.close()  # the agent is gone
    here.sendall(b"who cares")
    assert there.recv(100) == b"who cares"
    bench.proxy = client.Proxy(bench.directory)
    assert bench.proxy.hello.pid == before
    assert bench.proxy.hello.listeners["s"].service == "s"
    assert bench.proxy.hello.ports["s"] == here.getpeername()[1]


def test_another_build_takes_over_and_nothing_notices(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections go on in the old process, new ones come to the new one, and none is refused in between."""
    backend, datagrams = bench.bound(TCP), bench.bound(UDP)
    where = bench.serve([target(backend)])
    udp = bench.serve([target(datagrams)], "UDP", key="u")
    old_pid = bench.proxy.hello.pid
    here = bench.connect(where)
    there = bench.stack.enter_context(backend.accept()[0])
    failures: list[OSError] = []
    ended = threading.Event()

    def knock() -> None:
        while not ended.is_set():
            try:
                with socket.create_connection(where, TIMEOUT_S) as sock:
                    sock.sendall(b"x")
                    backend.accept()[0].close()
            except OSError as error:
                failures.append(error)

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        monkeypatch.setattr(protocol, "build", lambda: "another")
        bench.proxy.close()
        bench.proxy = client.Proxy(bench.directory)
        assert bench.proxy.hello.pid != old_pid
        assert bench.proxy.hello.ports == {"s": where[1], "u": udp[1]}, "the same sockets"
        # Nobody has told it anything: an agent may wait for its Services.
        bench.bound(UDP).sendto(b"?", udp)
        assert datagrams.recv(10) == b"?"
        eventually(lambda: bench.proxy.counts().connections > 20, "connections through the new process")
    finally:
        ended.set()
        knocking.join()
    assert not failures
    here.sendall(b"old")
    assert there.recv(10) == b"old"
    assert _is_alive(old_pid)
    here.close()
    there.close()
    eventually(lambda: not _is_alive(old_pid), "the old process to end with its last connection")


def test_sigterm_lets_connections_end(bench: Bench) -> None:
    here, there = bench.pair()
    pid = bench.proxy.hello.pid
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: _is_free(here.getpeername()), "the listener to close")
    here.sendall(b"last words")
    assert there.recv(100) == b"last words"
    here.close()
    there.close()
    eventually(lambda: not _is_alive(pid), "the process to end")


def test_many_connections_at_once(bench: Bench) -> None:
    """As many as this process may have descriptors for, 2,000 at most; the benchmark has 10,000."""
    count = min(2000, (raise_limits() - 200) // 2)
    backend = bench.bound(TCP)
    where = bench.serve([target(backend)])
    ends = []
    for number in range(count):
        here = bench.connect(where)
        there = bench.stack.enter_context(backend.accept()[0])
        there.settimeout(TIMEOUT_S)
        ends.append((here, there))
        here.sendall(struct.pack("!I", number))
    assert bench.proxy.counts().open_connections == count
    for number, (here, there) in enumerate(ends):
        assert there.recv(4) == struct.pack("!I", number)
        there.sendall(b"ok")
        assert here.recv(2) == b"ok"
    assert count == 2000, f"this machine allows only {count} connections in one test process"


def test_clients_wait_where_descriptors_are_short(bench: Bench) -> None:
    """No client is turned away: who has no room waits in the kernel's queue until others end."""
    backend = bench.bound(TCP)
    where = bench.serve([target(backend)])
    resource.prlimit(bench.proxy.hello.pid, resource.RLIMIT_NOFILE, (48, 48))
    clients = [bench.connect(where) for _ in range(40)]
    eventually(lambda: bench.proxy.counts().limits, "the shortage")
    for number, here in enumerate(clients):
        here.sendall(struct.pack("!I", number))
    seen = set()
    for _ in clients:
        there, _ = backend.accept()
        with there:
            there.settimeout(TIMEOUT_S)
            seen.add(struct.unpack("!I", there.recv(4))[0])
        # The backend has closed; when its client does, there is room for another.
        for number in seen:
            clients[number].close()
    assert seen == set(range(40))
    assert bench.proxy.counts().failures == 0


def _is_free(where: tuple[str, int]) -> bool:
    """Return whether nobody listens there; a connection to find out would be one more to wait for."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(where)
            sock.listen()
        except OSError:
            return False
        return True


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # it may be our child
    try:
        return _field(pid, "State")[0] != "Z"
    except FileNotFoundError:
        return False


def _field(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(f"{name}:"))
