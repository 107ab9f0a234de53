"""The one home of netlink: this host's devices and addresses, their changes, and clsact filters.

pyroute2 is imported where it is used: that takes 0.15 s, which commands that only read must not pay.
"""

from __future__ import annotations

import errno
import fnmatch
import ipaddress
import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpfproxy.errors import KernelError
from ebpfproxy.model.services import NodePortAddresses, NodeSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from pyroute2.iproute.linux import IPRoute

VIP_DEVICE = "kube-ipvs0"  # kube-proxy's name, and ours in mode ipvs
_IFA_F_NODAD, _FOREVER = 0x2, 0xFFFFFFFF
PRIMARY = "primary"  # the special value of nodePortAddresses

# Multicast groups of rtnetlink that say that a device, an address or a route came, went or changed
# (rtnetlink.h).
_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100
_RTMGRP_ROUTES = 0x40 | 0x400  # of both families
_RTMGRP_NEIGH = 0x4
_RTM_NEWNEIGH, _RTM_DELNEIGH = 28, 29
# linux/neighbour.h: attributes, and the states incomplete and failed.
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_NOT_VALID = 0x01 | 0x20
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_IFA_F_SECONDARY = 0x1  # of IPv6: temporary (RFC 8981)
_RT_SCOPE_UNIVERSE = 0
_RT_TABLE_MAIN = 254

# TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS or TC_H_MIN_EGRESS), pkt_sched.h
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
# Our place among the filters of a device: a number that people don't choose, before the default 49152.
_FILTER_PRIO, _FILTER_HANDLE = 47100, 1


class Device(NamedTuple):
    """A network device."""

    number: int
    name: str
    kind: str  # "veth", "bridge", "vlan", ...; "" for hardware
    port_of: str  # kind of the device that it is a port of: "bridge", "bond", "vrf", ...; "" = none
    is_loopback: bool
    is_up: bool


class Address(NamedTuple):
    """An address of this host."""

    address: str  # canonical
    family: int  # 4 | 6
    device: int  # index
    is_global: bool  # neither link-local nor host scope
    is_secondary: bool  # a further address of a subnet, or a temporary one


class Filter(NamedTuple):
    """A BPF filter of ours on a device's clsact."""

    device: int  # index
    parent: int  # INGRESS | EGRESS
    name: str


class _Listener:
    """A socket that rtnetlink tells of changes.

    Args:
        groups: bits of RTMGRP_*.
    """

    def __init__(self, groups: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, groups))

    def fileno(self) -> int:
        """Return what to wait for with select or poll."""
        return self._socket.fileno()

    def changed(self) -> bool:
        """Return whether anything changed since the last call; does not block."""
        is_changed = False
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return is_changed
            except OSError:  # ENOBUFS: more changes than the socket could hold
                self._forget()
                return True
            is_changed |= self._matters(data)

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def _matters(self, data: bytes) -> bool:
        """Return whether messages are a change: where no more is said, every one is."""
        return bool(data)

    def _forget(self) -> None:
        """Messages were lost."""


class Watch(_Listener):
    """Tells that a device or an address changed; what changed has to be read anew.

    Args:
        routes: tell of routes, too.
    """

    def __init__(self, *, routes: bool = False) -> None:
        groups = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR
        super().__init__(groups | _RTMGRP_ROUTES if routes else groups)


class RouteChanges(_Listener):
    """Tells that a way changed: routes, addresses, devices, and neighbours' MAC addresses."""

    def __init__(self) -> None:
        groups = _RTMGRP_LINK | _RTMGRP_NEIGH | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR
        super().__init__(groups | _RTMGRP_ROUTES)
        self._neighbours: dict[tuple[int, bytes], bytes] = {}  # device, address -> MAC address

    def _matters(self, data: bytes) -> bool:
        is_changed = False
        for kind, body in _messages(data):
            if kind in (_RTM_NEWNEIGH, _RTM_DELNEIGH):
                is_changed |= self._has_moved(kind, body)
            else:
                is_changed = True
        return is_changed

    def _forget(self) -> None:
        self._neighbours.clear()

    def _has_moved(self, kind: int, body: bytes) -> bool:
        """Return whether a neighbour has another MAC address, or none any more. Its states change often.

        Source: struct ndmsg, linux/neighbour.h.
        """
        _, device, state, _, _ = struct.unpack_from("=B3xiHBB", body)
        found = dict(_attributes(body[12:]))
        key = device, found.get(_NDA_DST, b"")
        before = self._neighbours.get(key)
        if kind == _RTM_DELNEIGH or state & _NUD_NOT_VALID:
            return self._neighbours.pop(key, None) is not None
        now = found.get(_NDA_LLADDR, b"")
        self._neighbours[key] = now
        return now != before


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of each message (struct nlmsghdr, linux/netlink.h)."""
    while len(data) >= 16:
        size, kind = struct.unpack_from("=IH", data)
        if size < 16:
            return
        yield kind, data[16:size]
        data = data[(size + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute (struct nlattr)."""
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            return
        yield kind, data[4:size]
        data = data[(size + 3) & ~3 :]


@contextmanager
def _iproute(what: str) -> Iterator[IPRoute]:
    """Yield a netlink socket; its errors become ours."""
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise KernelError(f"{what}: {os.strerror(error.code)}", error.code) from error
    except OSError as error:
        raise KernelError(f"{what}: {error.strerror}", error.errno or 0) from error


def devices() -> list[Device]:
    """Return the devices of this network namespace."""
    with _iproute("list network devices") as route:
        return [_device(link) for link in route.get_links()]


def _device(link: Any) -> Device:
    info = link.get("linkinfo") or {}
    return Device(
        number=link["index"],
        name=link.get("ifname"),
        kind=info.get("kind") or "",
        port_of=info.get("slave_kind") or "",
        is_loopback=bool(link["flags"] & _IFF_LOOPBACK),
        is_up=bool(link["flags"] & _IFF_UP),
    )


def select_devices(found: Iterable[Device], patterns: Sequence[str]) -> list[Device]:
    """Return the devices that ``patterns`` (shell globs) name.

    Without patterns: all but loopback and the ports of a bridge, bond or team, whose traffic is seen on the
    device above them.
    """
    if patterns:
        return [device for device in found if _is_named(device.name, patterns)]
    return [d for d in found if not d.is_loopback and d.port_of not in ("bridge", "bond", "team")]


def uplinks(found: Iterable[Device]) -> list[Device]:
    """Return the devices that lead out of this host: hardware, and where the default routes go.

    Ports of a bridge or bond are none: what comes in by them belongs to the device above.
    """
    outside = _default_route_devices()
    return [
        device
        for device in select_devices(found, ())
        if (not device.kind and not device.port_of) or device.number in outside
    ]


def _default_route_devices() -> set[int]:
    """Return the indexes of the devices that the default routes lead to."""
    with _iproute("find the default routes") as route:
        return {
            number
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in route.get_default_routes(family=family)
            for number in (entry.get("oif"), *(hop["oif"] for hop in entry.get("multipath") or ()))
            if number
        }


def addresses() -> list[Address]:
    """Return the addresses of this network namespace in the kernel's order, loopback included.

    Those on the device that holds the VIPs of IPVS, kube-proxy's or ours, are left out.
    """
    with _iproute("list addresses") as route:
        vips = set(route.link_lookup(ifname=VIP_DEVICE))
        return [_address(entry) for entry in route.get_addr() if entry["index"] not in vips]


def _address(entry: Any) -> Address:
    text = str(ipaddress.ip_address(entry.get("local") or entry.get("address")))
    return Address(
        address=text,
        family=6 if entry["family"] == socket.AF_INET6 else 4,
        device=entry["index"],
        is_global=entry["scope"] == _RT_SCOPE_UNIVERSE,
        is_secondary=bool((entry.get("flags") or entry["flags"]) & _IFA_F_SECONDARY),
    )


def addresses_of(name: str) -> frozenset[str]:
    """Return the addresses of the device with this name, none if there is no such device."""
    with _iproute(f"list addresses of {name}") as route:
        numbers = route.link_lookup(ifname=name)
        return frozenset(
            _address(each).address for number in numbers for each in route.get_addr(index=number)
        )


def remove_device(name: str) -> bool:
    """Remove the device with this name; return whether there was one."""
    with _iproute(f"remove device {name}") as route:
        numbers = route.link_lookup(ifname=name)
        for number in numbers:
            route.link("del", index=number)
        return bool(numbers)


def add_addresses(name: str, added: Iterable[str]) -> None:
    """Give addresses to a dummy device, which is made if need be; those that are there are no error."""
    listed = list(added)
    with _iproute(f"make device {name} (kernel module dummy)") as route:
        if not route.link_lookup(ifname=name):
            route.link("add", ifname=name, kind="dummy")
    with _iproute(f"add addresses to {name}") as route:
        from pyroute2.netlink.exceptions import NetlinkError

        (number,) = route.link_lookup(ifname=name)
        route.link("set", index=number, state="up")
        for address in listed:
            try:
                if ":" in address:
                    # Nobody else has it, so nobody is asked; and it is the last to be chosen as a source.
                    life = {"preferred": 0, "valid": _FOREVER}
                    route.addr(
                        "add", index=number, address=address, prefixlen=128, flags=_IFA_F_NODAD, **life
                    )
                else:
                    route.addr("add", index=number, address=address, prefixlen=32)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise


def remove_addresses(name: str, removed: Iterable[str]) -> None:
    """Take addresses from a device; those that are gone, or the device, are no error."""
    with _iproute(f"remove addresses from {name}") as route:
        from pyroute2.netlink.exceptions import NetlinkError

        for number in route.link_lookup(ifname=name):
            for address in removed:
                try:
                    route.addr("del", index=number, address=address, prefixlen=128 if ":" in address else 32)
                except NetlinkError as error:
                    if error.code != errno.EADDRNOTAVAIL:
                        raise


def prefixes_behind(patterns: Sequence[str]) -> frozenset[str]:
    """Return the prefixes that the main routing table reaches through devices with one of these names.

    A default route says nothing about who is there, and link-local prefixes are behind every device.

    Args:
        patterns: shell globs.
    """
    with _iproute("list routes") as route:
        numbers = {link["index"] for link in route.get_links() if _is_named(link.get("ifname"), patterns)}
        found = [entry for entry in route.get_routes(table=_RT_TABLE_MAIN) if entry.get("oif") in numbers]
    texts = {f"{each.get('dst')}/{each['dst_len']}" for each in found if each["dst_len"]}
    networks = list(map(ipaddress.ip_network, texts))
    return frozenset(str(each) for each in networks if not each.is_link_local and not each.is_multicast)


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def node_port_addresses(
    found: Iterable[Address], selectors: Sequence[str] = (), primary: Iterable[str] = ()
) -> NodePortAddresses:
    """Return which addresses serve NodePorts.

    Args:
        found: this host's addresses.
        selectors: CIDRs, or "primary"; none = every address but link-local ones.
        primary: the Node object's own addresses; without them "primary" is the first global address of
            each family.

    Source: kube-proxy's ``nodePortAddresses``.
    """
    every = [address for address in found if not _is_link_local(address.address)]
    networks = [ipaddress.ip_network(selector, strict=False) for selector in selectors if selector != PRIMARY]
    serving = set()
    for address in every:
        value = ipaddress.ip_address(address.address)
        if not selectors or any(value in network for network in networks):
            serving.add(address.address)
    if PRIMARY in selectors:
        wanted = set(primary)
        mine = [address.address for address in every if address.address in wanted]
        serving.update(mine or _first_global(every))
    return NodePortAddresses(
        frozenset(serving),
        frozenset(address.address for address in found),
        frozenset(_sources(every, frozenset(primary))),
    )


def _sources(found: Iterable[Address], primary: AbstractSet[str]) -> Iterator[NodeSource]:
    """Yield the first global address of each device, and for the others the node's own or first one."""
    first: dict[tuple[int, int], str] = {}
    default: dict[int, tuple[bool, str]] = {}
    for each in found:
        if not each.is_global or each.is_secondary or ipaddress.ip_address(each.address).is_loopback:
            continue
        first.setdefault((each.device, each.family), each.address)
        is_better = each.address in primary and not default.get(each.family, (False, ""))[0]
        if each.family not in default or is_better:
            default[each.family] = (is_better, each.address)
    for (device, family), address in first.items():
        yield NodeSource(device, family, address)
    for family, (_, address) in default.items():
        yield NodeSource(0, family, address)


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local


def _first_global(found: Iterable[Address]) -> list[str]:
    first: dict[int, str] = {}
    for address in found:
        if address.is_global and not address.is_secondary:
            first.setdefault(address.family, address.address)
    return list(first.values())


def set_filter(device: int, parent: int, program_fd: int, name: str) -> bool:
    """Attach a program to a device's clsact, direct action; replaces ours atomically.

    Args:
        device: its index.
        parent: INGRESS | EGRESS.
        program_fd: a tc program.
        name: what ``tc filter show`` and ``list_filters`` say.

    Returns:
        Whether the clsact qdisc had to be added.
    """
    with _iproute(f"attach a filter to device {device}") as route:
        from pyroute2.netlink.exceptions import NetlinkError

        is_added = True
        try:
            route.tc("add", "clsact", device)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            is_added = False
        route.tc(
            "replace-filter",
            "bpf",
            device,
            _FILTER_HANDLE,
            parent=parent,
            prio=_FILTER_PRIO,
            fd=program_fd,
            name=name,
            direct_action=True,
        )
    return is_added


def list_filters(prefix: str) -> list[Filter]:
    """Return the clsact filters at our place whose name starts with ``prefix``, on every device."""
    found = []
    with _iproute("list filters") as route:
        for link in list(route.get_links()):
            for parent in (INGRESS, EGRESS):
                for entry in route.get_filters(index=link["index"], parent=parent):
                    options = entry.get("options")
                    name = options.get("TCA_BPF_NAME") if options is not None else None
                    if name and name.startswith(prefix) and entry["info"] >> 16 == _FILTER_PRIO:
                        found.append(Filter(link["index"], parent, name))
    return found


def remove_filter(filter_: Filter) -> None:
    """Remove a filter of ours; its clsact qdisc stays."""
    with _iproute(f"remove filter {filter_.name} from device {filter_.device}") as route:
        route.tc("del-filter", "bpf", filter_.device, 0, parent=filter_.parent, prio=_FILTER_PRIO)


def remove_empty_clsact(device: int) -> bool:
    """Remove a device's clsact qdisc unless it holds filters; return whether it was there and empty."""
    with _iproute(f"remove clsact from device {device}") as route:
        kinds = [entry.get("kind") for entry in route.get_qdiscs(index=device)]
        if "clsact" not in kinds or any(
            list(route.get_filters(index=device, parent=parent)) for parent in (INGRESS, EGRESS)
        ):
            return False
        route.tc("del", "clsact", device)
        return True
