"""A cluster's life as a node sees it: what happens, what goes wrong meanwhile, and what a node hears of it.

A reflector runs against a model of the API server's store, without HTTP and without threads: the client is
the one who lets things happen, in the middle of lists and of watches. ``in_turns`` then interleaves what two
reflectors told, as two threads would do it.
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import strategies as st

from ebpfproxy.errors import ApiError
from ebpfproxy.model.objects import Object, ObjectKey, decode, key_of
from ebpfproxy.resolve.resolver import NodeContext, Resolution, Resolver
from ebpfproxy.source.kubernetes import SELECTOR, wire
from ebpfproxy.source.kubernetes.reflector import Reflector
from ebpfproxy.store import Store
from rig.api_model import SERVICES, SLICES, ApiModel, Document, Refusal, bookmark, is_selected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ebpfproxy.store import Event

QUERY = {"labelSelector": SELECTOR}
NODE = NodeContext("node-1", "a")
HEADLESS = "service.kubernetes.io/headless"


# --- what happens ------------------------------------------------------------------------------------


class Put(NamedTuple):
    """Somebody creates or changes an object."""

    document: Document


class Remove(NamedTuple):
    """Somebody deletes it."""

    name: str


class Fault(NamedTuple):
    """Something goes wrong, or just ends."""

    kind: str


Step = Put | Remove | Fault


def service(name: str, port: int, external: str, is_away: bool) -> Document:
    vip = f"10.96.0.{ord(name)}"
    labels = {"service.kubernetes.io/service-proxy-name": "other"} if is_away else {}
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "creationTimestamp": f"2026-01-01T00:00:{ord(name) - 97:02d}Z",
            "labels": labels,
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "externalIPs": [external] if external else None,
            "ports": [{"name": "", "port": port, "protocol": "TCP"}],
        },
    }


def endpoint_slice(name: str, of: str, addresses: list[str], ready: bool | None, is_away: bool) -> Document:
    labels = {"kubernetes.io/service-name": of} | ({HEADLESS: ""} if is_away else {})
    return {
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [each], "conditions": {"ready": ready}, "nodeName": f"node-{each[-1]}"}
            for each in addresses
        ]
        or None,
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


SERVICE_NAMES = st.sampled_from("abc")
SLICE_NAMES = st.sampled_from("xyz")
# The last one is the VIP of Service a: no endpoint while that Service is there.
ADDRESSES = st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3", f"10.96.0.{ord('a')}"])
FAULTS = st.sampled_from(["end", "cut", "compact", "bookmark", "rubbish", "error", "unavailable"]).map(Fault)
RARELY = st.integers(0, 9).map(lambda number: number == 0)
SERVICE_STEPS = st.one_of(
    st.builds(
        service, SERVICE_NAMES, st.integers(80, 82), st.sampled_from(["", "", "203.0.113.1"]), RARELY
    ).map(Put),
    SERVICE_NAMES.map(Remove),
    FAULTS,
)
SLICE_STEPS = st.one_of(
    st.builds(
        endpoint_slice,
        SLICE_NAMES,
        SERVICE_NAMES,
        st.lists(ADDRESSES, max_size=3, unique=True),
        st.sampled_from([True, False, None]),
        RARELY,
    ).map(Put),
    SLICE_NAMES.map(Remove),
    FAULTS,
)


# --- the client that lets it happen ------------------------------------------------------------------


class ScriptedClient:
    """Answers from a model; before each answer, and while a watch is open, one step of a script happens."""

    server = "scripted"

    def __init__(self, model: ApiModel, path: str, steps: list[Step]) -> None:
        self.model, self.path = model, path
        self.steps = deque(steps)
        self.reflector: Reflector | None = None

    def get(self, path: str, query: Mapping[str, str]) -> bytes:
        fault = self.happen()
        if fault in ("cut", "unavailable", "error"):
            raise ApiError("it broke", 500 if fault == "error" else 0)
        if fault == "rubbish":
            return b'{"items": [{"metadata"'
        return self._answer(lambda: self.model.page(path, dict(query)))

    def stream(self, path: str, query: Mapping[str, str], silence_s: float) -> ScriptedStream:
        assert silence_s > 0
        version = int(query["resourceVersion"])
        if self.happen() == "unavailable":
            raise ApiError("it is away")
        self._answer(lambda: self.model.events(path, dict(query), version)[0])
        return ScriptedStream(self, dict(query), version)

    def happen(self) -> str:
        """Let one step happen; return the fault, "" for none."""
        step = self.steps.popleft() if self.steps else None
        match step:
            case Put(document):
                self.model.put(self.path, document)
            case Remove(name):
                self.model.delete(self.path, name)
            case Fault("compact"):
                self.model.compact()
            case Fault(kind):
                return kind
        return ""

    def _answer(self, ask: Any) -> bytes:
        try:
            return json.dumps(ask()).encode()
        except Refusal as refusal:
            status = refusal.status
            raise ApiError(status["message"], refusal.code, status["reason"]) from None


class ScriptedStream:
    """A watch; it ends for good when the script does, and everything was told."""

    def __init__(self, client: ScriptedClient, query: dict[str, str], version: int) -> None:
        self._client, self._query, self._version = client, query, version

    def lines(self) -> Iterator[list[bytes]]:
        client = self._client
        while True:
            is_over = not client.steps
            fault = client.happen()
            events, self._version = client.model.events(client.path, self._query, self._version, is_open=True)
            lines = [json.dumps(each).encode() for each in events]
            if fault == "bookmark":
                lines.append(json.dumps(bookmark(client.path, self._version)).encode())
            if fault == "rubbish":
                lines.append(b'{"type": "ADDED", "object": {"metadata"')
            if fault == "error":
                status = Refusal(500, "InternalError").status
                lines.append(json.dumps({"type": "ERROR", "object": status}).encode())
            if lines:
                yield lines
            if fault == "end":
                return
            if fault in ("cut", "unavailable"):
                raise ApiError("it broke off")
            if is_over:
                assert client.reflector
                client.reflector.close()
                return

    def shut(self) -> None:
        """Nobody waits for this one."""

    def close(self) -> None:
        """It holds nothing."""


class Recorder:
    """Keeps what reflectors tell."""

    def __init__(self) -> None:
        self.batches: list[tuple[Event, ...]] = []
        self.listed_at: int | None = None  # batches before the first complete list

    def take(self, _: Reflector, events: tuple[Event, ...], *, is_list: bool) -> None:
        self.batches.append(events)
        if is_list and self.listed_at is None:
            self.listed_at = len(self.batches)

    def report(self, _: Reflector) -> None:
        """Nobody asks."""


def live(model: ApiModel, path: str, resource: wire.Resource, steps: list[Step]) -> Recorder:
    """Return what a reflector tells of a life."""
    recorder, client = Recorder(), ScriptedClient(model, path, steps)
    client.reflector = Reflector((resource,), QUERY, recorder)
    client.reflector.run(client)  # type: ignore[arg-type]  # as much of a client as it needs
    return recorder


def present(model: ApiModel) -> dict[ObjectKey, Object]:
    """Return what is there in the end, read as a file would be."""
    documents = [
        each for path in (SERVICES, SLICES) for each in model.documents(path) if is_selected(each, QUERY)
    ]
    return {key_of(obj): obj for each in documents if (obj := decode(each)) is not None}


def starting_model(page: int) -> ApiModel:
    """Return a model with two Services, which the API server gives out in pages of this size."""
    model = ApiModel()
    model.page_limit = page
    for name, slice_name in (("a", "x"), ("b", "y")):
        model.put(SERVICES, service(name, 80, "", is_away=False))
        model.put(SLICES, endpoint_slice(slice_name, name, ["10.1.0.1"], True, is_away=False))
    return model


def in_turns(
    model: ApiModel, services: list[Step], slices: list[Step], turns: Iterable[bool]
) -> Iterator[Resolution]:
    """Yield what the node must serve after each thing that it hears, once all lists are complete."""
    told = [
        live(model, SERVICES, wire.SERVICES, services),
        live(model, SLICES, wire.ENDPOINTS[0], slices),
    ]
    store, resolver = Store(), Resolver()
    waiting = [deque(each.batches) for each in told]
    heard = [0, 0]
    order = deque(int(turn) for turn in turns)
    while any(waiting):
        index = order.popleft() if order else 0
        index = index if waiting[index] else 1 - index
        for each in waiting[index].popleft():
            store.apply(each)
        heard[index] += 1
        if all(count >= (each.listed_at or 0) for count, each in zip(heard, told, strict=True)):
            changes = store.take()
            yield resolver.resolve(changes.objects, NODE, changed=changes.changed)


def expected(model: ApiModel) -> Resolution:
    """Return what the node must serve in the end, worked out from nothing."""
    return Resolver().resolve(present(model), NODE)
