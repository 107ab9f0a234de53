"""What happens to a new connection, read from the pinned maps; needs no agent."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Any

from ebpfproxy.dataplane.bpf import view
from ebpfproxy.dataplane.bpf.layouts import (
    AFFINITY_KEY,
    LOCAL_SOURCE_KEY,
    PROTOCOL_NUMBER,
    SERVICE,
    SERVICE_KEY,
    SOURCE_RANGE_KEY,
    U32,
    VIP,
    BackendValue,
    ServiceKey,
    ServiceValue,
    any_address,
    pack_address,
    pack_port,
    protocol_name,
    unpack_address,
)
from ebpfproxy.dataplane.explanation import (
    NO_ADDRESS,
    OWN_ADDRESS,
    Candidate,
    Excluded,
    Explanation,
    Match,
    explained,
    outcome,
)
from ebpfproxy.libbpf import lib
from ebpfproxy.model import addresses
from ebpfproxy.model.services import Policy, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ebpfproxy.dataplane.rows import AffinityRow

_SCOPES = {lib.SCOPE_INTERNAL: "internal", lib.SCOPE_EXTERNAL: "external"}
_SERVICE_KINDS = lib.VIP_CLUSTER_IP | lib.VIP_EXTERNAL_IP | lib.VIP_LOAD_BALANCER


def explain(
    maps: view.Maps, vip: str, port: int, protocol: Protocol, source: str | None = None
) -> Explanation:
    """Return what happens to a new connection to ``vip``:``port``.

    Args:
        maps: open maps.
        vip: destination address.
        port: destination port.
        protocol: transport.
        source: the client's address; None: both scopes are shown.
    """
    destination = f"{addresses.endpoint(vip, port)}/{protocol}"
    address = ipaddress.ip_address(vip)
    looked_up = "127.0.0.1" if address.is_loopback and address.version == 4 else str(address)
    key = pack_address(looked_up)
    entry = maps["vips"].get(key)
    kinds = VIP.read(entry).kinds if entry is not None else 0
    if not kinds & ~lib.VIP_LOCAL:
        return explained(destination, source, (), NO_ADDRESS.format(vip=vip))
    # What comes from outside never reaches a loopback address.
    scopes = [lib.SCOPE_INTERNAL] if address.is_loopback else [lib.SCOPE_INTERNAL, lib.SCOPE_EXTERNAL]
    if source is not None:
        scopes = [_scope_of(maps, source)]
    matches: list[Match] = []
    for scope in scopes:
        found = _find(maps, kinds, key, pack_port(port), PROTOCOL_NUMBER[protocol], scope)
        if found is not None:
            matches.append(_match(maps, *found, source))
    if kinds & (lib.VIP_LOCAL | lib.VIP_NODE):
        otherwise = OWN_ADDRESS.format(destination=destination, vip=vip)
    else:
        otherwise = f"no Service uses {destination}: it is rejected, {vip} belongs to Services"
    return explained(destination, source, matches, otherwise)


def _scope_of(maps: view.Maps, source: str) -> int:
    """Return which policy applies to a client: this node and its pods are internal."""
    address = ipaddress.ip_address(source)
    if address.is_loopback or maps["vips"].get(pack_address(source)) is not None:
        return int(lib.SCOPE_INTERNAL)
    for prefix in map(LOCAL_SOURCE_KEY.read, maps.keys("local_sources")):
        if _contains(prefix.prefixlen, prefix.source, source):
            return int(lib.SCOPE_INTERNAL)
    return int(lib.SCOPE_EXTERNAL)


def _contains(bits: int, prefix: bytes, source: str) -> bool:
    """Return whether an address lies in a prefix of the 16-byte form."""
    shift = 128 - bits
    return int.from_bytes(prefix, "big") >> shift == int.from_bytes(pack_address(source), "big") >> shift


def _find(
    maps: view.Maps, kinds: int, vip: bytes, port: bytes, proto: int, scope: int
) -> tuple[ServiceKey, ServiceValue] | None:
    """Return the entry of map services that the programs find."""
    keys = []
    if kinds & _SERVICE_KINDS:
        keys.append(ServiceKey(vip, port, proto, scope))
    if kinds & lib.VIP_NODE:
        is_v4 = "." in unpack_address(vip)
        keys.append(ServiceKey(any_address(4 if is_v4 else 6), port, proto, scope))
    for key in keys:
        value = maps["services"].get(SERVICE_KEY.write(key))
        if value is not None:
            return key, SERVICE.read(value)
    return None


def _match(maps: view.Maps, key: ServiceKey, service: ServiceValue, source: str | None) -> Match:
    found = maps.backends((service.id,))
    slots = Counter(maps.slots(service))
    ejected_s = view.ejections(maps) if service.flags & lib.SERVICE_EJECTS else {}
    ejected = {number: ejected_s[number] for number in slots if number in ejected_s}
    if len(ejected) == len(slots):
        ejected = {}  # with nobody else to take, the programs take one of them
    for number in ejected:
        del slots[number]
    policy = Policy.LOCAL if service.flags & lib.SERVICE_LOCAL else Policy.CLUSTER
    mine = sorted(
        found.items(),
        key=lambda item: (item[1].address, item[1].port),
    )
    has_ready = any(found[number].state == lib.BACKEND_READY for number in slots if number in found)
    candidates = tuple(
        Candidate(
            backend=view.endpoint(b.address, b.port),
            state=view.STATES.get(b.state, str(b.state)),
            weight=b.weight,
            share=round(slots[number] / slots.total(), 4),
            is_local=bool(b.flags & lib.BACKEND_LOCAL),
        )
        for number, b in mine
        if number in slots
    )
    excluded = tuple(
        Excluded(
            view.endpoint(b.address, b.port),
            f"ejected for {ejected[number]:.0f} s more: its connections failed"
            if number in ejected
            else _why_not(b, policy, has_ready=has_ready),
        )
        for number, b in mine
        if number not in slots
    )
    text = maps["service_names"].get(U32.pack(service.id))
    name, proto, family = view.service_name(text) if text is not None else (f"#{service.id}", key.proto, 0)
    row = None
    if source is not None and service.affinity_s:
        client = AFFINITY_KEY.pack(pack_address(source), service.id, lib.CLIENT_ADDR)
        value = maps["affinity"].get(client)
        if value is not None:
            names = {service.id: (name, proto, family)}
            row = view.affinity_row(client, value, names, found, {service.id: service.affinity_s})
    return Match(
        scope=_SCOPES[key.scope],
        frontend=f"{view.frontend(key)}/{protocol_name(proto)}",
        kind=view.KINDS.get(service.kind, str(service.kind)),
        service=name,
        policy=policy.value,
        scheduler=view.SCHEDULERS.get(service.scheduler, str(service.scheduler)),
        affinity_s=service.affinity_s,
        result=_result(maps, service, name, candidates, row, source),
        candidates=candidates,
        excluded=excluded,
        affinity=row,
    )


def _result(
    maps: view.Maps,
    service: ServiceValue,
    name: str,
    candidates: tuple[Candidate, ...],
    row: AffinityRow | None,
    source: str | None,
) -> str:
    """Return in one sentence what happens to a new connection."""
    ranges = None
    is_within = True
    if service.flags & lib.SERVICE_SOURCE_RANGES:
        found = list(_source_ranges(maps, service.id))
        ranges = [f"{unpack_address(p)}/{b - 96 if '.' in unpack_address(p) else b}" for b, p in found]
        is_within = source is not None and any(_contains(bits, prefix, source) for bits, prefix in found)
    return outcome(
        name,
        source,
        ranges,
        len(candidates),
        is_within=is_within,
        is_dropped=bool(service.flags & lib.SERVICE_DROP_EMPTY),
        bound_to=row.backend if row else "",
    )


def _source_ranges(maps: view.Maps, service: int) -> Iterable[tuple[int, bytes]]:
    for found in map(SOURCE_RANGE_KEY.read, maps.keys("source_ranges")):
        if found.service == service:
            yield found.prefixlen - 32, found.source


def _why_not(backend: BackendValue, policy: Policy, *, has_ready: bool) -> str:
    """Return why a backend is in no slot."""
    reasons: dict[Any, str] = {
        lib.BACKEND_GONE: "removed; established connections go on",
        lib.BACKEND_NOT_READY: "not ready",
    }
    if backend.state in reasons:
        return reasons[backend.state]
    if policy is Policy.LOCAL and not backend.flags & lib.BACKEND_LOCAL:
        return "on another node, and the traffic policy is Local"
    if not backend.weight:
        return "weight 0: drained"
    if backend.state == lib.BACKEND_TERMINATING and has_ready:
        return "terminating while others are ready"
    if policy is Policy.CLUSTER and backend.flags & lib.BACKEND_HINT_ELSEWHERE:
        return "its topology hint names another zone or node"
    return "not in the slots"
