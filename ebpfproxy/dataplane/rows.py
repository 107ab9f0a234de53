"""Rows for people and programs that are made from the maps of mode bpf, or from what the agent wants."""

from __future__ import annotations

import msgspec


class ServiceRow(msgspec.Struct, frozen=True):
    """One port of a Service in one IP family."""

    name: str
    protocol: str
    family: int
    kinds: tuple[str, ...]
    frontends: tuple[str, ...]  # ADDRESS:PORT; a NodePort's address is "*"
    scheduler: str
    backends_usable: int
    backends_total: int
    open: int | None  # connections open now; None: nothing counts them in this mode
    connections: int | None  # accepted ever
    refused: int | None  # ever
    affinity_s: int  # 0 = none


class BackendRow(msgspec.Struct, frozen=True):
    """One backend of a Service."""

    service: str
    protocol: str
    address: str
    port: int
    state: str  # ready | terminating | not-ready | gone
    weight: int
    is_local: bool
    is_hinted_elsewhere: bool
    is_usable: bool  # new connections may go there
    ejected_s: float  # passed over for so long, for it failed; 0 = it is not
    open: int | None  # as in ServiceRow
    connections: int | None  # ever
    id: int | None  # in the maps


class AffinityRow(msgspec.Struct, frozen=True):
    """The backend that a client goes back to."""

    service: str
    client: str  # an address, or the cookie of a network namespace
    backend: str
    idle_s: float
    expires_s: float  # seconds left
