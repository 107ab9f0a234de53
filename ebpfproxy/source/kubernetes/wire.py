"""What an API server's answers say: pages of lists, and events of watches. Bytes in, objects out.

Each object is decoded once, into the types of the model; what those don't have is never made.

Source: "Kubernetes API Concepts": efficient detection of changes, retrieving large results in chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ebpfproxy.errors import ApiError, InvalidObject
from ebpfproxy.kubeapi.status import Status
from ebpfproxy.model.objects import (
    Endpoints,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Problem,
    Service,
    decode_served,
    key_of,
    problems_of,
)


class Resource(NamedTuple):
    """A kind of objects and where the server has them."""

    kind: type[Object]
    path: str

    @property
    def name(self) -> str:
        """Return its plural."""
        return self.path.rpartition("/")[2]


SERVICES = Resource(Service, "/api/v1/services")
NODES = Resource(Node, "/api/v1/nodes")
# The best first: a server of before 1.21 has v1beta1 only, one of before 1.17 or without the API has neither.
ENDPOINTS = (
    Resource(EndpointSlice, "/apis/discovery.k8s.io/v1/endpointslices"),
    Resource(EndpointSlice, "/apis/discovery.k8s.io/v1beta1/endpointslices"),
    Resource(Endpoints, "/api/v1/endpoints"),
)


class Item(NamedTuple):
    """One object, or what is wrong with it."""

    key: ObjectKey
    object: Object | None  # None: nothing of it can be used
    problems: tuple[str, ...] = ()


class Page(NamedTuple):
    """A part of a list."""

    items: list[Item]
    version: str  # a watch that begins here misses nothing
    rest: str  # asks for the next part; "" = this was the last


class Change(NamedTuple):
    """One event of a watch."""

    type: str  # ADDED | MODIFIED | DELETED | BOOKMARK, and what servers to come will say
    item: Item | None  # of the first three
    version: str


class _ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    rest: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, frozen=True):
    metadata: _ListMeta = _ListMeta()
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True):
    metadata: _ListMeta = _ListMeta()


class WireError(ApiError):
    """An answer is not what the API's documentation says; asking again is safe."""


_lists = msgspec.json.Decoder(_List)
_events = msgspec.json.Decoder(_Event)
_versions = msgspec.json.Decoder(_Versioned)
_statuses = msgspec.json.Decoder(Status)


def read_page(data: bytes, resource: Resource) -> Page:
    """Return what a list's answer says.

    Raises:
        WireError: it is no list.
    """
    try:
        found = _lists.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"list {resource.name}: the answer is no list: {error}") from error
    if not found.metadata.resource_version:
        raise WireError(f"list {resource.name}: the answer has no resourceVersion")
    items = [read_object(each, resource.kind) for each in found.items or ()]
    return Page(items, found.metadata.resource_version, found.metadata.rest)


def read_event(line: bytes, resource: Resource) -> Change:
    """Return what one line of a watch says.

    Raises:
        ApiError: it is an ERROR event; ``status`` is the code in it.
        WireError: it is no event.
    """
    try:
        event = _events.decode(line)
        if event.type == "ERROR":
            raise _statuses.decode(event.object).error(f"watch {resource.name}")
        version = _versions.decode(event.object).metadata.resource_version
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"watch {resource.name}: this is no event: {error}") from error
    item = None
    if event.type in ("ADDED", "MODIFIED", "DELETED"):
        item = read_object(event.object, resource.kind)
    return Change(event.type, item, version)


def read_object(data: msgspec.Raw, kind: type[Object]) -> Item:
    """Return an object; one of a wrong shape is a problem of its own, and of nobody else."""
    try:
        obj, errors = decode_served(data, kind)
    except InvalidObject as error:
        key = ObjectKey(error.kind, error.namespace, error.name)
        return Item(key, None, tuple(map(str, problems_of(error))))
    if obj is not None and not errors:
        return Item(key_of(obj), obj)
    key = key_of(obj) if obj is not None else _key(data, kind)
    problems = tuple(str(Problem(*key, path, why)) for path, why in errors)
    return Item(key, obj, problems)


def _key(data: msgspec.Raw, kind: type[Object]) -> ObjectKey:
    metadata = msgspec.json.decode(data)["metadata"]
    return ObjectKey(kind.__name__, metadata.get("namespace") or "", metadata["name"])
