"""Real servers, started in a place and awaited until they answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rig.topology import wait_listening
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rig.process import Place, Process

CHILD = Path(__file__).with_name("server_child.py")


def start_name_server(place: Place, name: str, *ports: int) -> Process:
    """Start a server that answers ``name`` over HTTP and UDP; await with :func:`ready`."""
    return place.start(sys.executable, "-I", "-S", CHILD, name, *map(str, ports), pipes=True)


def ready(server: Process) -> None:
    """Wait until a name server listens."""
    line = server.stdout.readline()
    assert line, f"{server.name} ended:\n{server.output()}"


@contextlib.contextmanager
def name_servers(places: Iterable[tuple[str, Place]], *ports: int) -> Iterator[dict[str, Process]]:
    """Run a server of its name in each place, started side by side."""
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(start_name_server(place, name, *ports)) for name, place in places
        }
        for server in servers.values():
            ready(server)
        yield servers


@contextlib.contextmanager
def dns_server(place: Place, records: Mapping[str, Sequence[str]]) -> Iterator[Process]:
    """Run dnsmasq on port 53 with these address records and nothing else."""
    answers = [f"--host-record={name},{','.join(addresses)}" for name, addresses in records.items()]
    with place.start(
        *[
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--no-daemon",
        ],
        *["--log-facility=-", "--pid-file=", "--user=root", *answers],
    ) as server:
        wait_listening(place, 53)
        wait_listening(place, 53, udp=True)
        yield server


@contextlib.contextmanager
def iperf3_server(place: Place, port: int = 5201) -> Iterator[Process]:
    """Run an iperf3 server."""
    with place.start("iperf3", "--server", "--port", str(port), "--forceflush") as server:
        eventually(lambda: "listening" in server.output(), "iperf3 to listen")
        yield server
