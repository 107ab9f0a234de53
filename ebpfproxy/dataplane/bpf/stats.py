"""What the programs counted: connections, packets and bytes of Services, backends and verdicts, as rows.

A flow counts its packets in its own conntrack entry and adds them to the totals about once a second. A look
from here adds what waits there, so the rows are exact at once, and also for a flow that fell silent.
Sockets that ``sock_lb`` connects count as connections only: no program sees their packets, which is why they
cost nothing.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND_STATS,
    FLOW,
    FLOW_KEY,
    SERVICE_STATS,
    Flow,
    FlowKey,
    protocol_name,
    unpack_address,
    unpack_port,
)
from ebpfproxy.libbpf import lib

if TYPE_CHECKING:
    from ebpfproxy.dataplane.bpf.view import Chosen, Maps


class ServiceStatsRow(msgspec.Struct, frozen=True):
    """What is counted of one port of a Service in one IP family; all since it was made, but ``ejected``."""

    service: str
    protocol: str
    family: int
    connections: int  # accepted
    refused: int  # rejected or dropped
    retried: int  # openings that were not answered and went to another backend
    ejected: int  # backends that are passed over now
    packets: int  # to backends; none of sockets that sock_lb connects
    bytes: int  # of whole IP packets
    reply_packets: int
    reply_bytes: int


class BackendStatsRow(msgspec.Struct, frozen=True):
    """What is counted of one backend."""

    service: str
    protocol: str
    address: str
    port: int
    connections: int
    open: int  # now
    packets: int
    bytes: int
    reply_packets: int
    reply_bytes: int


class Traffic:
    """Packets and bytes, forth and back, that wait in conntrack entries."""

    def __init__(self) -> None:
        self.of_services: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self.of_backends: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def add(self, key: FlowKey, flow: Flow) -> None:
        """Add what one entry holds."""
        at = 0 if key.dir == lib.FLOW_FORWARD else 2
        for counts in (self.of_services[flow.service], self.of_backends[flow.backend]):
            counts[at] += flow.packets
            counts[at + 1] += flow.octets


def waiting(maps: Maps) -> Traffic:
    """Return what flows have not yet added to the totals."""
    traffic = Traffic()
    for key, value in itertools.chain(maps["conntrack"].items(), maps["new_flows"].items()):
        flow = FLOW.read(value)
        if flow.packets:
            traffic.add(FLOW_KEY.read(key), flow)
    return traffic


def services(maps: Maps, chosen: Chosen | None = None) -> list[ServiceStatsRow]:
    """Return the counters of every Service port, or of the ``chosen`` of them, by name."""
    memory, size = maps["service_stats"].mmap(), SERVICE_STATS.size
    # The totals first: what moves there meanwhile is missed once, not counted twice.
    totals = {
        number: (name, SERVICE_STATS.read(bytes(memory[number * size : (number + 1) * size])))
        for number, name in maps.service_names().items()
        if chosen is None or chosen(name[0])
    }
    more = waiting(maps).of_services
    rows = []
    for number, ((name, proto, family), stats) in totals.items():
        packets, octets, reply_packets, reply_octets = more.get(number, (0, 0, 0, 0))
        rows.append(
            ServiceStatsRow(
                service=name,
                protocol=protocol_name(proto),
                family=family,
                connections=stats.connections,
                refused=stats.refused,
                retried=stats.retried,
                ejected=max(0, stats.ejected),
                packets=stats.packets + packets,
                bytes=stats.octets + octets,
                reply_packets=stats.reply_packets + reply_packets,
                reply_bytes=stats.reply_octets + reply_octets,
            )
        )
    return sorted(rows, key=lambda row: (row.service, row.protocol, row.family))


def backends(maps: Maps, chosen: Chosen | None = None) -> list[BackendStatsRow]:
    """Return the counters of all backends, or those of the ``chosen`` services, by service and address."""
    names = {
        number: name for number, name in maps.service_names().items() if chosen is None or chosen(name[0])
    }
    memory, size = maps["backend_stats"].mmap(), BACKEND_STATS.size
    found = sorted(maps.backends(names).items(), key=lambda item: (item[1].address, item[1].port))
    totals = {
        number: BACKEND_STATS.read(bytes(memory[number * size : (number + 1) * size])) for number, _ in found
    }
    more = waiting(maps).of_backends
    rows = []
    for number, backend in found:
        stats = totals[number]
        packets, octets, reply_packets, reply_octets = more.get(number, (0, 0, 0, 0))
        rows.append(
            BackendStatsRow(
                service=names[backend.service][0],
                protocol=protocol_name(backend.proto),
                address=unpack_address(backend.address),
                port=unpack_port(backend.port),
                connections=stats.connections,
                open=max(0, stats.open),
                packets=stats.packets + packets,
                bytes=stats.octets + octets,
                reply_packets=stats.reply_packets + reply_packets,
                reply_bytes=stats.reply_octets + reply_octets,
            )
        )
    return sorted(rows, key=lambda row: (row.service, row.protocol))
