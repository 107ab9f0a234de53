"""The ipvs dataplane: render -> diff -> netlink, ipset and iptables-restore."""

from __future__ import annotations

import ipaddress
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ebpfproxy import netlink
from ebpfproxy.dataplane.ipvs import features
from ebpfproxy.dataplane.ipvs import sets as rules
from ebpfproxy.dataplane.ipvs.render import PROTOCOLS, Rendered, Renderer, context_of
from ebpfproxy.dataplane.ipvs.unsupported import unsupported
from ebpfproxy.dataplane.xtables import XtablesDataplane, XtablesOptions
from ebpfproxy.diff import diff
from ebpfproxy.errors import DataplaneError
from ebpfproxy.model.addresses import family
from ebpfproxy.model.services import Protocol, Scheduler
from ebpfproxy.netlink.ipvs import (
    Destination,
    Ipvs,
    Operation,
    Server,
    Timeouts,
    remove_destination,
    remove_server,
    set_destination,
    set_server,
    set_timeouts,
)
from ebpfproxy.xtables import sets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.model.services import DesiredState

MODE = "ipvs"
DEVICE = netlink.VIP_DEVICE
#: How often destinations that get no new connections are looked at.
DRAIN_S = 5.0
_LISTED = Path("/proc/net/ip_vs")
# Connections of a destination that is taken away must end: only TCP has an end.
_DRAINED = PROTOCOLS[Protocol.TCP]


@dataclass(frozen=True)
class IpvsOptions:
    """How to run the ipvs dataplane, beside what all that are made of rules have."""

    scheduler: Scheduler = Scheduler.RANDOM  # of Services that name none
    further_scheduler: str = ""  # for those: one that only IPVS has
    node_ports: tuple[int, int] = (30000, 32767)  # both inclusive
    exclude_cidrs: Sequence[str] = ()  # virtual servers in there are somebody else's
    timeouts: Timeouts = field(default_factory=Timeouts)


def sysctls(*, has_strict_arp: bool, release: str) -> dict[str, str]:
    """Return the kernel's settings that IPVS needs.

    Source: kube-proxy's ipvs mode. Until Linux 5.9, conn_reuse_mode 1 costs some connections a second.
    """
    wanted = {
        "net/ipv4/vs/conntrack": "1",  # masquerading is netfilter's
        "net/ipv4/vs/expire_nodest_conn": "1",
        "net/ipv4/vs/expire_quiescent_template": "1",
        "net/ipv4/ip_forward": "1",
    }
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < (5, 9):
        wanted["net/ipv4/vs/conn_reuse_mode"] = "0"
    if has_strict_arp:
        wanted |= {"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"}
    return wanted


class IpvsDataplane(XtablesDataplane):
    """Makes the kernel serve a desired state through IPVS."""

    mode = MODE

    def __init__(self, options: XtablesOptions, own: IpvsOptions) -> None:
        super().__init__(options)
        self._own = own
        self._excluded = [ipaddress.ip_network(each) for each in own.exclude_cidrs]
        self._renderer = Renderer()
        self._have: Rendered | None = None  # None: has to be read
        self._draining: set[Destination] = set()  # weight 0 until their connections have ended
        self._drained_s = 0.0

    def _why_not(self) -> str | None:
        return features.usable(self.options.variant)

    def _prepare(self) -> None:
        """Leave a sign, and set the timeouts of IPVS."""
        try:
            self._ledger.mark()  # cleanup has to know that what has kube-proxy's names may be ours
        except OSError as error:
            raise DataplaneError(f"write {self.options.sysctls}: {error.strerror}") from error
        if any(self._own.timeouts):
            with Ipvs() as ipvs:
                ipvs.run([set_timeouts(self._own.timeouts)])

    def tick(self) -> None:
        """Remove destinations whose connections have ended; look whether somebody flushed what was made.

        Raises:
            DataplaneError: what was flushed could not be written; the next sync does it.
        """
        now_s = time.monotonic()
        if self._have is not None and self._draining and now_s - self._drained_s >= DRAIN_S:
            self._drained_s = now_s
            with Ipvs() as ipvs, self._forget_on_error():
                self._drain(ipvs)
        super().tick()

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return unsupported(state, self._served)

    def _program(self, state: DesiredState) -> None:
        context = context_of(
            state,
            default_scheduler=self._own.scheduler,
            further_scheduler=self._own.further_scheduler,
        )
        want = self._renderer.render(
            [service for service in state.services if service.name.family in self._served], context
        )
        with Ipvs() as ipvs:
            self._apply(ipvs, self._have or self._read(ipvs, want, state), want, state)

    def _read(self, ipvs: Ipvs, want: Rendered, state: DesiredState) -> Rendered:
        """Return what the kernel has of ours, and of kube-proxy's."""
        addresses = netlink.addresses_of(DEVICE)
        first, last = self._own.node_ports

        def is_ours(server: Server) -> bool:
            address = ipaddress.ip_address(server.address)
            if any(address in network for network in self._excluded):
                return server in want.servers
            is_node_port = server.address in state.addresses.local and first <= server.port <= last
            return server in want.servers or server.address in addresses or is_node_port

        servers = {server: found for server, found in ipvs.servers().items() if is_ours(server)}
        return Rendered(
            servers,
            {
                destination: load.weight
                for server in servers
                for destination, load in ipvs.destinations(server).items()
            },
            {each: None for each in addresses if not ipaddress.ip_address(each).is_link_local},
            sets.save([name for number in (4, 6) for name in rules.kinds(number)]),
            {},
        )

    def _apply(self, ipvs: Ipvs, have: Rendered, want: Rendered, state: DesiredState) -> None:
        """Write what is new from the back to the front, then remove the other way round."""
        entries = diff(have.entries, want.entries)
        kinds = [kind for each in self._programmers for kind in rules.kinds(each.tool.family).items()]
        added, deleted = sets.script([] if have is self._have else kinds, entries)
        sets.restore(added)
        for programmer in self._programmers:
            programmer.apply(rules.rules(*self._firm(programmer.tool.family, want, state)), rules.JUMPS)
        addresses = diff(have.addresses, want.addresses)
        if addresses.upsert or have is not self._have:
            netlink.add_addresses(DEVICE, addresses.upsert)
        servers = diff(have.servers, want.servers)
        written, left = self._destinations(have, want, servers.delete)
        ipvs.run(
            [
                *(
                    set_server(server, settings, is_there=server in have.servers)
                    for server, settings in servers.upsert.items()
                ),
                *written,
                *map(remove_server, servers.delete),
            ]
        )
        self._draining = left
        if addresses.delete:
            netlink.remove_addresses(DEVICE, addresses.delete)
        sets.restore(deleted)
        self._have = want._replace(destinations={**want.destinations, **dict.fromkeys(left, 0)})

    @staticmethod
    def _destinations(
        have: Rendered, want: Rendered, gone: Sequence[Server]
    ) -> tuple[list[Operation], set[Destination]]:
        """Return what to do to destinations, and which stay with weight 0 until their connections end."""
        delta = diff(have.destinations, want.destinations)
        written = [
            set_destination(destination, weight, is_there=destination in have.destinations)
            for destination, weight in delta.upsert.items()
        ]
        lost = set(gone)
        left = set()
        for destination in delta.delete:
            if destination.server in lost:
                continue
            if destination.server.protocol != _DRAINED:
                written.append(remove_destination(destination))
                continue
            left.add(destination)
            if have.destinations[destination] != 0:
                written.append(set_destination(destination, 0, is_there=True))
        return written, left

    def _drain(self, ipvs: Ipvs) -> None:
        """Remove destinations of weight 0 that have no connections."""
        assert self._have is not None
        for server in {destination.server for destination in self._draining}:
            loads = ipvs.destinations(server)
            for destination in [each for each in self._draining if each.server == server]:
                if destination in loads and loads[destination].connections:
                    continue
                ipvs.run([remove_destination(destination)])
                self._draining.discard(destination)
                self._have.destinations.pop(destination, None)

    def _firm(self, number: int, want: Rendered, state: DesiredState) -> tuple[rules.Firm, set[str]]:
        """Return what the rules of one family depend on, and which sets have entries."""
        firm = rules.Firm(
            family=number,
            mark=f"{1 << self.options.masquerade_bit:#x}",
            masquerades_all=state.masquerades_all,
            masquerades_outside=state.masquerades_outside,
            local_sources=sorted(each for each in state.local_sources if family(each) == number),
            has_random_fully=self._has_random_fully,
            barred=want.barred[number],
        )
        used = {entry.set for entry in want.entries}
        return firm, {name for name in rules.NAMES if rules.full_name(name, number) in used}

    def _forget_flushed(self) -> bool:
        if self._is_listed() and not super()._forget_flushed():
            return False
        self._forget()
        return True

    def _is_listed(self) -> bool:
        """Return whether as many virtual servers are there as were made, and their addresses."""
        if self._have is None:
            return False
        listed = sum(
            line.startswith(("TCP", "UDP", "SCTP")) for line in _LISTED.read_text("ascii").splitlines()
        )
        return listed >= len(self._have.servers) and (
            self._have.addresses.keys() <= netlink.addresses_of(DEVICE)
        )

    def _forget(self) -> None:
        super()._forget()
        self._have = None
