"""The Kubernetes source against a scripted API server: real HTTP, real threads; no upper limit of a time."""

from __future__ import annotations

import json
import queue
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy.kubeapi.access import Access
from ebpfproxy.kubeapi.client import Client
from ebpfproxy.model.objects import EndpointSlice, Object, ObjectKey, Service
from ebpfproxy.source import Reported
from ebpfproxy.source.kubernetes import SELECTOR, KubernetesSource, reflector
from ebpfproxy.store import Delete, Reach, Set, Store, Synced
from rig.api_model import ENDPOINTS, NODES, SERVICES, SLICES, SLICES_BETA, ApiModel, Document, Refusal
from rig.apiserver import ApiServer, Request
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ebpfproxy.source import SourceEvent

TIMEOUT_S = 30.0
NODE = "node-1"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(reflector, "_MAX_WAIT_S", 0.1)


def service(name: str, vip: str = "10.96.0.1", port: int = 80, **metadata: Any) -> Document:
    return {
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", **metadata},
        "spec": {"clusterIP": vip, "clusterIPs": [vip], "ports": [{"port": port, "protocol": "TCP"}]},
    }


def endpoint_slice(name: str, *addresses: str, of: str = "web") -> Document:
    return {
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [each], "conditions": {"ready": True}} for each in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def node(name: str = NODE, **labels: str) -> Document:
    return {"metadata": {"name": name, "labels": labels}}


class Follower:
    """A running source and the store behind it.

    Attributes:
        log: every event in its order, ``Set web``, ``Delete web``, ``Synced``.
    """

    def __init__(self, *urls: str, **access: Any) -> None:
        found = Access(urls, "test", **access)
        self.source = KubernetesSource(lambda: Client(found), NODE)
        self.store = Store()
        self.log: list[str] = []
        self.batches: list[tuple[SourceEvent, ...]] = []
        self.problems: tuple[str, ...] = ()
        self.reach: Reach | None = None
        self.died: BaseException | None = None
        self._queue: queue.SimpleQueue[tuple[SourceEvent, ...]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self.source.batches():
                self._queue.put(batch)
        except BaseException as error:
            self.died = error
            raise

    def until(self, is_done: Callable[[], bool], what: str = "") -> None:
        """Apply batches until ``is_done``."""
        while not is_done():
            try:
                batch = self._queue.get(timeout=TIMEOUT_S)
            except queue.Empty:
                pytest.fail(f"nothing came {what}; have {self.log}, problems {self.problems}")
            self.batches.append(batch)
            for event in batch:
                self._take(event)

    def _take(self, event: SourceEvent) -> None:
        match event:
            case Reported(problems):
                self.problems = problems
                return
            case Reach():
                self.reach = event
                return
            case Set(obj):
                self.log.append(f"Set {obj.metadata.name}")
            case Delete(key):
                self.log.append(f"Delete {key.name}")
            case Synced():
                self.log.append("Synced")
        self.store.apply(event)

    def until_synced(self, count: int = 1) -> None:
        self.until(lambda: self.log.count("Synced") >= count, f"and it did not sync {count} times")

    def until_names(self, *names: str) -> None:
        self.until(lambda: self.names == set(names), f"to have {names}")

    @property
    def objects(self) -> dict[ObjectKey, Object]:
        return dict(self.store.take().objects)

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.objects}

    def service(self, name: str = "web") -> Service:
        found = self.objects[ObjectKey("Service", "default", name)]
        assert isinstance(found, Service)
        return found

    def slice(self, name: str = "web-1") -> EndpointSlice:
        found = self.objects[ObjectKey("EndpointSlice", "default", name)]
        assert isinstance(found, EndpointSlice)
        return found

    def version(self, path: str) -> str:
        """Return where a watch would go on."""
        return next(each._version for each in self.source._reflectors if each.resource.path == path)

    def close(self) -> None:
        self.source.close()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


@contextmanager
def following(*servers: ApiServer, **access: Any) -> Iterator[Follower]:
    follower = Follower(*(each.url for each in servers), **access)
    try:
        yield follower
    finally:
        follower.close()


@pytest.fixture
def model() -> ApiModel:
    made = ApiModel()
    made.put(SERVICES, service("web"))
    made.put(SLICES, endpoint_slice("web-1", "10.1.0.1", "10.1.0.2"))
    made.put(NODES, node())
    return made


@pytest.fixture
def server(model: ApiModel) -> Iterator[ApiServer]:
    with ApiServer(model) as running:
        yield running


@pytest.fixture
def follower(server: ApiServer) -> Iterator[Follower]:
    """One that has synced, and watches everything."""
    with following(server) as running:
        running.until_synced()
        for path in (SERVICES, SLICES, NODES):
            server.stream(path)
        yield running


# --- what is asked for -------------------------------------------------------------------------------


def test_asks_for_what_kube_proxy_asks_for(server: ApiServer, follower: Follower) -> None:
    lists = {each.path: each.query for each in server.requests if not each.is_watch}
    watches = {each.path: each.query for each in server.requests if each.is_watch}
    assert SELECTOR == "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
    for queries in (lists, watches):
        assert queries[SERVICES]["labelSelector"] == queries[SLICES]["labelSelector"] == SELECTOR
        assert queries[NODES]["fieldSelector"] == f"metadata.name={NODE}"
    for query in lists.values():
        assert (query["limit"], query["resourceVersion"]) == ("500", "0")
    for query in watches.values():
        assert query["resourceVersion"] == "1003"
        assert query["allowWatchBookmarks"] == "true"
        assert 300 <= int(query["timeoutSeconds"]) <= 600


def test_other_proxies_and_headless_services_are_left_out(model: ApiModel, server: ApiServer) -> None:
    model.put(SERVICES, service("theirs", labels={"service.kubernetes.io/service-proxy-name": "other"}))
    model.put(SERVICES, service("headless", labels={"service.kubernetes.io/headless": ""}))
    model.put(NODES, node("node-2"))
    with following(server) as follower:
        follower.until_synced()
        assert follower.names == {"web", "web-1", NODE}
        server.stream(SERVICES)
        model.put(SERVICES, service("web", labels={"service.kubernetes.io/service-proxy-name": "other"}))
        follower.until_names("web-1", NODE)


@pytest.mark.parametrize(
    ("served", "path"),
    [
        ({SLICES, SLICES_BETA, ENDPOINTS}, SLICES),
        ({SLICES_BETA, ENDPOINTS}, SLICES_BETA),
        ({ENDPOINTS}, ENDPOINTS),
    ],
    ids=["v1", "v1beta1", "endpoints"],
)
def test_endpoints_come_from_the_best_that_the_server_has(served: set[str], path: str) -> None:
    model = ApiModel(SERVICES, NODES, *served)
    model.put(SERVICES, service("web"))
    for each in (SLICES, SLICES_BETA):
        model.put(each, endpoint_slice("web-1", "10.1.0.1"))
    subset = {"addresses": [{"ip": "10.1.0.1"}], "ports": [{"port": 8080}]}
    model.put(ENDPOINTS, {"metadata": {"name": "web", "namespace": "default"}, "subsets": [subset]})
    with ApiServer(model) as server, following(server) as follower:
        follower.until_synced()
        kinds = {key.kind for key in follower.objects}
        assert kinds == {"Service", "Endpoints" if path == ENDPOINTS else "EndpointSlice"}
        server.stream(path)
        assert not any(each.is_watch and each.path not in (path, SERVICES, NODES) for each in server.requests)


def test_v1beta1_becomes_v1() -> None:
    model = ApiModel(SERVICES, NODES, SLICES_BETA)
    document = endpoint_slice("web-1", "10.1.0.1")
    document["endpoints"][0]["topology"] = {
        "kubernetes.io/hostname": "node-2",
        "topology.kubernetes.io/zone": "b",
    }
    model.put(SLICES_BETA, document)
    with ApiServer(model) as server, following(server) as follower:
        follower.until_synced()
        (endpoint,) = follower.slice().endpoints
        assert (endpoint.node_name, endpoint.zone, endpoint.topology) == ("node-2", "b", None)


def test_a_server_that_learns_v1_is_followed_there(model: ApiModel) -> None:
    model.served = {SERVICES, NODES, ENDPOINTS}
    with ApiServer(model) as server, following(server) as follower:
        follower.until_synced()
        server.stream(ENDPOINTS)
        model.served = {SERVICES, NODES, ENDPOINTS, SLICES}
        follower.source.reread()
        follower.until_synced(2)
        follower.until_names("web", "web-1", NODE)


# --- lists -------------------------------------------------------------------------------------------


def test_nothing_is_synced_before_every_list_is_complete(model: ApiModel, server: ApiServer) -> None:
    server.refuse = lambda request: Refusal(503, "ServiceUnavailable") if request.path == NODES else None
    with following(server) as follower:
        follower.until_names("web", "web-1")
        server.wait_requests(NODES, 3, is_watch=False)
        assert "Synced" not in follower.log
        server.refuse = lambda _: None
        follower.until_synced()
        assert follower.names == {"web", "web-1", NODE}


def test_pages(model: ApiModel, server: ApiServer) -> None:
    model.page_limit = 7
    for number in range(50):
        model.put(SERVICES, service(f"s-{number}"))
    with following(server) as follower:
        follower.until_synced()
        assert len(follower.names) == 50 + 3
        lists = [each.query for each in server.requests if each.path == SERVICES and not each.is_watch]
        assert len(lists) == 8
        assert ["continue" in query for query in lists] == [False] + [True] * 7
        (batch,) = [each for each in follower.batches if sum(isinstance(event, Set) for event in each) > 3]
        assert sum(isinstance(event, Set) for event in batch) == 51  # told at once


def test_pages_that_expire_are_listed_without_pages(model: ApiModel, server: ApiServer) -> None:
    model.page_limit = 1
    model.put(SERVICES, service("api"))

    def forget(request: Request) -> None:
        if "continue" in request.query:
            model.compact()
            model.page_limit = 0

    server.refuse = forget
    with following(server) as follower:
        follower.until_synced()
        assert follower.names == {"web", "api", "web-1", NODE}
        lists = [each.query for each in server.requests if each.path == SERVICES and not each.is_watch]
        assert "limit" not in lists[-1]


# --- watches -----------------------------------------------------------------------------------------


def test_changes_are_followed(model: ApiModel, follower: Follower) -> None:
    model.put(SERVICES, service("web", port=81))
    follower.until(lambda: follower.service().spec.ports[0].port == 81)
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)
    model.delete(SERVICES, "web")
    follower.until_names("web-1", "api", NODE)
    model.put(SLICES, endpoint_slice("web-1", "10.1.0.9"))
    follower.until(lambda: follower.slice().endpoints[0].addresses == ("10.1.0.9",))
    assert follower.problems == ()
    assert follower.reach == Reach(None)


def test_the_same_again_is_no_change(model: ApiModel, server: ApiServer, follower: Follower) -> None:
    model.put(SERVICES, service("web"))
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)
    assert follower.log.count("Set web") == 1


@pytest.mark.parametrize("how", ["end", "cut"])
def test_a_watch_is_taken_up_where_it_ended(
    how: str, model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)
    stream = server.stream(SERVICES)
    getattr(stream, how)()
    model.put(SERVICES, service("late", "10.96.0.3"))
    follower.until_names("web", "web-1", "api", "late", NODE)
    last = [each for each in server.requests if each.path == SERVICES][-1]
    assert last.is_watch
    assert last.query["resourceVersion"] == "1004"
    assert sum(not each.is_watch for each in server.requests) == 3  # nothing was listed again


def test_bookmarks_move_the_place_to_go_on(model: ApiModel, server: ApiServer) -> None:
    server.sends_bookmarks = True
    with following(server) as follower:
        follower.until_synced()
        server.stream(NODES)
        for number in range(5):
            model.put(SERVICES, service(f"s-{number}"))  # versions that a watch of nodes does not see
        follower.until(lambda: len(follower.names) == 8)
        server.stream(NODES).cut()
        server.wait_requests(NODES, 2, is_watch=True)
        eventually(lambda: follower.version(NODES) == "1008", "the bookmark of the present")
        model.compact()
        model.put(SERVICES, service("more"))
        server.stream(NODES).cut()
        server.wait_requests(NODES, 3, is_watch=True)
        watches = [
            each.query["resourceVersion"] for each in server.requests if each.path == NODES and each.is_watch
        ]
        assert watches[:3] == ["1003", "1003", "1008"]


@pytest.mark.parametrize("as_event", [False, True], ids=["status-410", "event-410"])
def test_410_lists_again_and_the_list_deletes(
    as_event: bool, model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    server.gone_as_event = as_event
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)
    server.kill()
    model.delete(SERVICES, "web")
    model.put(SERVICES, service("late", "10.96.0.3"))
    model.put(SERVICES, service("api", "10.96.0.2", port=90))
    model.compact()
    server.start()
    follower.until_names("api", "late", "web-1", NODE)
    assert follower.service("api").spec.ports[0].port == 90
    batch = next(each for each in follower.batches if Delete(ObjectKey("Service", "default", "web")) in each)
    kinds = [type(each) for each in batch]
    assert kinds == [Set, Set, Delete]  # one step, what is gone last
    again = [each.query for each in server.requests if each.path == SERVICES and not each.is_watch][-1]
    assert "resourceVersion" not in again  # the present, not what the server has at hand


def test_a_restored_store_is_listed_again(model: ApiModel, server: ApiServer, follower: Follower) -> None:
    server.kill()
    model.restore(500)
    model.delete(SERVICES, "web")
    server.start()
    follower.until_names("web-1", NODE)


def test_an_event_in_pieces(model: ApiModel, server: ApiServer, follower: Follower) -> None:
    server.pace = (11, 0.001)
    model.put(SERVICES, service("api", "10.96.0.2"))
    model.put(SERVICES, service("late", "10.96.0.3"))
    follower.until_names("web", "web-1", "api", "late", NODE)


@pytest.mark.parametrize(
    "rubbish",
    [
        b'{"type": "ADDED", "object": {"metadata": {"na\n',
        b"[]\n",
        b'{"type": "ADDED"}\n',
        b"\xff\xfe\n",
        b'{"type": "ERROR", "object": {"code": 500, "reason": "InternalError", "message": "oh"}}\n',
        b'{"type": "ERROR", "object": {}}\n',
    ],
)
def test_rubbish_in_a_stream_loses_nothing(
    rubbish: bytes, model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    server.stream(SERVICES).write(rubbish)
    model.put(SERVICES, service("api", "10.96.0.2"))
    model.delete(SERVICES, "web")
    follower.until_names("web-1", "api", NODE)
    assert follower.died is None


def test_a_stream_cut_in_the_middle_of_an_object(
    model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    stream = server.stream(SERVICES)
    stream.write(b'{"type": "DELETED", "object": {"kind": "Service", "metadata": {"name": "we')
    stream.end()
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)


def test_an_unknown_event_is_passed_over(model: ApiModel, server: ApiServer, follower: Follower) -> None:
    event = {"type": "RECONSIDERED", "object": {"metadata": {"name": "web", "resourceVersion": "1003"}}}
    server.stream(SERVICES).send(event)
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)
    assert sum(each.path == SERVICES for each in server.requests) == 2


def test_a_silent_watch_is_given_up(
    model: ApiModel, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "_SILENCE_S", 0.05)
    with following(server) as follower:
        follower.until_synced()
        server.wait_requests(SERVICES, 3, is_watch=True)
        model.put(SERVICES, service("api", "10.96.0.2"))
        follower.until_names("web", "web-1", "api", NODE)
        assert sum(not each.is_watch for each in server.requests) == 3


# --- away --------------------------------------------------------------------------------------------


def test_starts_before_the_server(model: ApiModel) -> None:
    server = ApiServer(model)
    with server:
        pass  # has a port now, and is gone
    with following(server) as follower:
        follower.until(lambda: bool(follower.problems))
        said = f"ask API server {server.url}: Connection refused; what was known stays, and it is tried again"
        assert follower.problems == (said,)
        assert follower.reach is not None
        assert follower.reach.lost_at is not None
        with server:
            follower.until_synced()
            assert follower.names == {"web", "web-1", NODE}
            follower.until(lambda: follower.problems == () and follower.reach == Reach(None))


def test_a_server_that_is_away_changes_nothing(
    model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    server.kill()
    follower.until(lambda: bool(follower.problems))
    assert follower.reach is not None
    since = follower.reach.lost_at
    assert since is not None
    assert follower.names == {"web", "web-1", NODE}
    asked = len(server.requests)
    model.put(SERVICES, service("api", "10.96.0.2"))
    server.start()
    follower.until_names("web", "web-1", "api", NODE)
    follower.until(lambda: follower.problems == () and follower.reach == Reach(None))
    assert all(each.is_watch for each in server.requests[asked:])


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (
            Refusal(403, "Forbidden", 'services is forbidden: User "x" cannot list'),
            "HTTP 403: services is forbidden",
        ),
        (Refusal(401, "Unauthorized"), "HTTP 401: Unauthorized"),
        (Refusal(429, "TooManyRequests", "slow down"), "HTTP 429: slow down"),
        (Refusal(500, "InternalError", "etcdserver: leader changed"), "HTTP 500: etcdserver: leader changed"),
        (Refusal(404, "NotFound", "page not found"), "HTTP 404: page not found"),
    ],
)
def test_refusals_are_named_and_tried_again(
    refusal: Refusal, said: str, model: ApiModel, server: ApiServer
) -> None:
    server.refuse = lambda request: refusal if request.path == SERVICES else None
    with following(server) as follower:
        follower.until(lambda: any(said in each for each in follower.problems))
        server.refuse = lambda _: None
        follower.until_synced()
        follower.until(lambda: follower.problems == ())


@pytest.mark.parametrize(
    ("failures", "longest_s"), [(1, 0.2), (2, 0.4), (3, 0.8), (8, 25.6), (9, 30), (999, 30)]
)
def test_waits_grow_and_half_of_each_is_chance(
    failures: int, longest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the short waits of the other tests
    waits = [reflector.backoff_s(failures) for _ in range(500)]
    assert longest_s / 2 <= min(waits) < longest_s * 0.6
    assert longest_s * 0.9 < max(waits) <= longest_s


def test_a_server_that_asks_to_be_left_alone_is(server: ApiServer) -> None:
    busy = Refusal(429, "TooManyRequests", "slow down")
    busy.status["details"] = {"retryAfterSeconds": 1}
    asked: list[float] = []

    def refuse(request: Request) -> Refusal | None:
        if request.path != SERVICES or request.is_watch:
            return None
        asked.append(time.monotonic())
        return busy if len(asked) == 1 else None

    server.refuse = refuse
    with following(server) as follower:
        follower.until_synced()
    assert asked[1] - asked[0] >= 1


def test_the_second_server_is_asked_when_the_first_is_away(model: ApiModel) -> None:
    with ApiServer(model) as first, ApiServer(model) as second, following(first, second) as follower:
        follower.until_synced()
        first.stream(SERVICES)
        first.kill()
        second.stream(SERVICES)
        model.put(SERVICES, service("api", "10.96.0.2"))
        follower.until_names("web", "web-1", "api", NODE)


def test_reread_lists_everything_and_syncs_again(
    model: ApiModel, server: ApiServer, follower: Follower
) -> None:
    before = sum(not each.is_watch for each in server.requests)
    follower.source.reread()
    follower.until_synced(2)
    assert sum(not each.is_watch for each in server.requests) == before + 3
    server.stream(SERVICES)
    model.put(SERVICES, service("api", "10.96.0.2"))
    follower.until_names("web", "web-1", "api", NODE)


def test_reread_does_not_wait_for_a_back_off(
    model: ApiModel, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with following(server) as follower:
        follower.until_synced()
        monkeypatch.setattr(reflector, "_FIRST_WAIT_S", 3600.0)
        monkeypatch.setattr(reflector, "_MAX_WAIT_S", 3600.0)
        server.kill()
        follower.until(lambda: follower.reach is not None and follower.reach.lost_at is not None)
        server.start()
        follower.source.reread()
        follower.until_synced(2)


def test_closing_ends_it_while_the_server_is_away(model: ApiModel) -> None:
    with ApiServer(model) as server:
        pass
    with following(server) as follower:
        follower.until(lambda: bool(follower.problems))


# --- objects -----------------------------------------------------------------------------------------


def test_unknown_fields_and_nulls_break_nothing(model: ApiModel, follower: Follower) -> None:
    document = service("api", "10.96.0.2")
    document["spec"] |= {"newKnob": {"deep": [1, {"x": None}]}, "selector": None, "externalIPs": None}
    document["status"] = {"loadBalancer": None, "conditions": [{"type": "New"}]}
    document["metadata"] |= {
        "annotations": None,
        "managedFields": [{"manager": "x", "fieldsV1": {"f:a": {}}}],
    }
    model.put(SERVICES, document)
    empty = endpoint_slice("api-1", of="api") | {"endpoints": None, "ports": None}
    model.put(SLICES, empty)
    follower.until_names("web", "web-1", "api", "api-1", NODE)
    assert follower.problems == ()
    assert follower.slice("api-1").endpoints == ()


LOOPBACK = 'Invalid value: "127.0.0.1": may not be in the loopback range'


@pytest.mark.parametrize(
    ("path", "document", "said"),
    [
        (SLICES, endpoint_slice("web-1", "127.0.0.1", "10.1.0.1"), f"endpoints[0]: {LOOPBACK}"),
        (SERVICES, service("web", port=81) | {"spec": {"ports": "eighty"}}, "spec.ports: Invalid type"),
    ],
)
def test_what_cannot_be_used_is_named_until_it_is_mended(
    path: str, document: Document, said: str, model: ApiModel, follower: Follower
) -> None:
    model.put(path, document)
    follower.until(lambda: any(said in each for each in follower.problems))
    assert follower.service().spec.ports[0].port == 80  # the last good one
    assert follower.slice().endpoints[-1].addresses != ("127.0.0.1",)
    model.put(path, service("web", port=82) if path == SERVICES else endpoint_slice("web-1", "10.1.0.9"))
    follower.until(lambda: follower.problems == ())
    model.put(path, document)
    follower.until(lambda: bool(follower.problems))
    model.delete(path, document["metadata"]["name"])
    follower.until(lambda: follower.problems == ())


def test_what_kubectl_keeps_for_itself_is_not_kept_in_memory(model: ApiModel, follower: Follower) -> None:
    fat = json.dumps({"x": "y" * 1000})
    annotations = {
        "kubectl.kubernetes.io/last-applied-configuration": fat,
        "ebpfproxy.io/scheduler": "rr",
    }
    model.put(SERVICES, service("api", "10.96.0.2", annotations=annotations))
    follower.until_names("web", "web-1", "api", NODE)
    assert follower.service("api").metadata.annotations == {"ebpfproxy.io/scheduler": "rr"}
