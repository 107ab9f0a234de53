"""What the running agent wants of the dataplane, as rows, and for a new connection: in every mode."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import status
from ebpfproxy.cli.exit_codes import NothingError
from ebpfproxy.dataplane.explanation import (
    NO_ADDRESS,
    OWN_ADDRESS,
    Candidate,
    Excluded,
    Match,
    explained,
    outcome,
)
from ebpfproxy.dataplane.rows import BackendRow, ServiceRow
from ebpfproxy.model.addresses import endpoint
from ebpfproxy.model.services import DesiredState, Empty, FrontendKind, Policy, Protocol, Readiness, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ebpfproxy.dataplane.bpf.view import Chosen
    from ebpfproxy.dataplane.explanation import Explanation
    from ebpfproxy.dataplane.modes import Mode
    from ebpfproxy.model.services import Backend, Frontend, Pool, Service

_TIMEOUT_S = 10.0
#: Schedulers that do not give each backend a share by its weight.
_EQUAL = (Scheduler.RR, Scheduler.LC, Scheduler.WLC, Scheduler.SED, Scheduler.NQ)


def read(state_dir: Path) -> DesiredState:
    """Return the desired state that the agent programmed last.

    Raises:
        NothingError: no agent runs with this state directory, or it has programmed nothing yet.
    """
    path = state_dir / status.SOCKET
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(b"GET /state HTTP/1.0\r\n\r\n")
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    except PermissionError:
        raise
    except OSError as error:
        raise NothingError(f"ask the agent at {path} for the desired state: {error}") from error
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise NothingError(f"the agent at {path} has programmed nothing yet")
    return msgspec.msgpack.decode(body, type=DesiredState)


def note(mode: Mode) -> str:
    """Return what rows and explanations from the desired state are, and what shows the rest."""
    return (
        f"This is what the agent wants in mode {mode.name}; `{mode.services_by}` shows what the kernel has, "
        f"`{mode.connections_by}` its connections."
    )


# --- pure: rows -----------------------------------------------------------------------------------------


def services(state: DesiredState, chosen: Chosen | None = None) -> list[ServiceRow]:
    """Return the ports of all or the ``chosen`` Services by name, protocol, family; nothing is counted."""
    rows = [
        ServiceRow(
            name=str(service.name),
            protocol=service.protocol.value,
            family=service.name.family,
            kinds=tuple(each.value for each in FrontendKind if each in {f.kind for f in service.frontends}),
            frontends=tuple(
                endpoint(each.address or "*", each.port)
                for each in sorted(service.frontends, key=_by_address)
            ),
            scheduler=service.scheduler.value,
            backends_usable=len(_usable(service)),
            backends_total=len(service.backends),
            open=None,
            connections=None,
            refused=None,
            affinity_s=service.affinity_s,
        )
        for service in state.services
        if chosen is None or chosen(str(service.name))
    ]
    return sorted(rows, key=lambda row: (row.name, row.protocol, row.family))


def backends(state: DesiredState, chosen: Chosen | None = None) -> list[BackendRow]:
    """Return the backends of all or the ``chosen`` Services by Service, address, port; nothing is counted."""
    rows = [
        BackendRow(
            service=str(service.name),
            protocol=service.protocol.value,
            address=each.address,
            port=each.port,
            state=each.readiness.value,
            weight=each.weight,
            is_local=each.is_local,
            is_hinted_elsewhere=each.is_hinted_elsewhere,
            is_usable=(each.address, each.port) in usable,
            ejected_s=0.0,
            open=None,
            connections=None,
            id=None,
        )
        for service in state.services
        if chosen is None or chosen(str(service.name))
        for usable in (_usable(service),)
        for each in service.backends
    ]
    return sorted(rows, key=lambda row: (row.service, row.protocol, _number(row.address), row.port))


def _usable(service: Service) -> set[tuple[str, int]]:
    """Return address and port of the backends that new connections may go to."""
    return {
        (backend.address, backend.port)
        for frontend in service.frontends
        for is_external in (False, True)
        for backend in service.pool(frontend.kind, is_external=is_external).backends
    }


def _by_address(frontend: Frontend) -> tuple[bool, int, int]:
    """Order frontends: those at addresses first, as the maps are read."""
    return not frontend.address, frontend.port, _number(frontend.address) if frontend.address else 0


def _number(address: str) -> int:
    return int(ipaddress.ip_address(address))


# --- pure: what happens to a connection ---------------------------------------------------------------


def explain(
    state: DesiredState, vip: str, port: int, protocol: Protocol, source: str | None = None
) -> Explanation:
    """Return what is to happen to a new connection to ``vip``:``port``.

    Args:
        state: what is wanted of the dataplane.
        vip: destination address.
        port: destination port.
        protocol: transport.
        source: the client's address; None: clients inside and outside are shown.
    """
    destination = f"{endpoint(vip, port)}/{protocol}"
    address = ipaddress.ip_address(vip)
    looked_up = "127.0.0.1" if address.is_loopback and address.version == 4 else str(address)
    mine = [service for service in state.services if service.name.family == address.version]
    serves = {each for service in mine for each in service.frontends if _is_at(each, looked_up, state)}
    if not serves:
        return explained(destination, source, (), NO_ADDRESS.format(vip=vip))
    found = sorted(
        (service.name, service, frontend)
        for service in mine
        if service.protocol is protocol
        for frontend in service.frontends
        if frontend.port == port and frontend in serves
    )[:1]
    # What comes from outside never reaches a loopback address.
    scopes = [False] if address.is_loopback else [False, True]
    if source is not None:
        scopes = [_is_external(source, state)]
    matches = tuple(
        _match(service, frontend, source, is_external=scope)
        for _, service, frontend in found
        for scope in scopes
    )
    if looked_up in state.addresses.local | state.addresses.serving:
        otherwise = OWN_ADDRESS.format(destination=destination, vip=vip)
    else:
        otherwise = f"no Service uses {destination}, and {vip} belongs to Services"
    return explained(destination, source, matches, otherwise)


def _is_at(frontend: Frontend, address: str, state: DesiredState) -> bool:
    if frontend.kind is FrontendKind.NODE_PORT:
        return address in state.addresses.serving
    return frontend.address == address


def _is_external(source: str, state: DesiredState) -> bool:
    """Return which policy applies to a client: this node and its pods are inside."""
    if ipaddress.ip_address(source).is_loopback or source in state.addresses.local:
        return False
    return not _is_in(source, state.local_sources)


def _is_in(address: str, prefixes: Iterable[str]) -> bool:
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in prefixes)


def _match(service: Service, frontend: Frontend, source: str | None, *, is_external: bool) -> Match:
    policy = service.policy(frontend.kind, is_external=is_external)
    pool = service.pool(frontend.kind, is_external=is_external)
    is_equal = service.scheduler in _EQUAL
    total = sum(1 if is_equal else each.weight for each in pool.backends)
    chosen = {(each.address, each.port) for each in pool.backends}
    is_guarded = service.has_source_ranges and frontend.kind is FrontendKind.LOAD_BALANCER
    ranges = service.source_ranges if is_guarded else None
    return Match(
        scope="external" if is_external else "internal",
        frontend=f"{endpoint(frontend.address or '*', frontend.port)}/{service.protocol}",
        kind=frontend.kind.value,
        service=str(service.name),
        policy=policy.value,
        scheduler=service.scheduler.value,
        affinity_s=service.affinity_s,
        result=outcome(
            str(service.name),
            source,
            ranges,
            len(pool.backends),
            is_within=source is not None and _is_in(source, ranges or ()),
            is_dropped=pool.on_empty is Empty.DROP,
        ),
        candidates=tuple(
            Candidate(
                backend=endpoint(each.address, each.port),
                state=each.readiness.value,
                weight=each.weight,
                share=round((1 if is_equal else each.weight) / total, 4),
                is_local=each.is_local,
            )
            for each in pool.backends
        ),
        excluded=tuple(
            Excluded(endpoint(each.address, each.port), _why_not(each, policy, pool))
            for each in service.backends
            if (each.address, each.port) not in chosen
        ),
    )


def _why_not(backend: Backend, policy: Policy, pool: Pool) -> str:
    """Return why a backend gets no new connections."""
    if backend.readiness is Readiness.NOT_READY:
        return "not ready"
    if policy is Policy.LOCAL and not backend.is_local:
        return "on another node, and the traffic policy is Local"
    if not backend.weight:
        return "weight 0: drained"
    if backend.readiness is Readiness.TERMINATING and pool.backends:
        return "terminating while others are ready"
    if policy is Policy.CLUSTER and backend.is_hinted_elsewhere:
        return "its topology hint names another zone or node"
    return "not chosen"
