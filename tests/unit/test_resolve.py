"""What always holds when objects become Services; single rules are in tests/scenarios."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.model.objects import (
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    Hint,
    Node,
    Object,
    ObjectKey,
    Pod,
    Service,
    decode,
    key_of,
)
from ebpfproxy.model.services import Empty, Policy, Readiness
from ebpfproxy.resolve import NodeContext, ResolveOptions, Resolver, node_context, validate_documents

if TYPE_CHECKING:
    from ebpfproxy.model.services import Service as ModelService

NODE = NodeContext("n1", "a")


def obj(
    kind: str, name: str, *, api: str = "v1", metadata: dict[str, Any] | None = None, **fields: Any
) -> Object:
    decoded = decode(
        {"apiVersion": api, "kind": kind, "metadata": {"name": name, **(metadata or {})}, **fields}
    )
    assert decoded is not None
    return decoded


def service(name: str, number: int, **spec: Any) -> Object:
    return obj("Service", name, spec={"clusterIP": f"10.96.0.{number}", "ports": [{"port": 80}], **spec})


def slice_of(service_name: str, *addresses: str, name: str = "", **endpoint: Any) -> Object:
    return obj(
        "EndpointSlice",
        name or f"{service_name}-1",
        api="discovery.k8s.io/v1",
        metadata={"labels": {"kubernetes.io/service-name": service_name}},
        addressType="IPv4",
        ports=[{"port": 8080}],
        endpoints=[{"addresses": [each], **endpoint} for each in addresses],
    )


def objects_of(*objects: Object) -> dict[ObjectKey, Object]:
    return {key_of(each): each for each in objects}


# --- memory ------------------------------------------------------------------------------------------


def test_services_that_did_not_change_are_the_identical_values() -> None:
    objects = objects_of(
        *(service(f"s{i}", i) for i in range(1, 9)), *(slice_of(f"s{i}", "10.1.0.1") for i in range(1, 9))
    )
    resolver = Resolver()
    before = resolver.resolve(objects, NODE)
    changed = slice_of("s3", "10.1.0.1", "10.1.0.2")
    objects[key_of(changed)] = changed
    after = resolver.resolve(objects, NODE, changed=[key_of(changed)])
    same = [old is new for old, new in zip(before.services, after.services, strict=True)]
    assert same == [True, True, False, True, True, True, True, True]
    assert resolver.resolve(objects, NODE) is after


def test_a_change_that_makes_no_difference_keeps_the_value() -> None:
    objects = objects_of(service("web", 1), slice_of("web", "10.1.0.1"))
    resolver = Resolver()
    before = resolver.resolve(objects, NODE)
    copy = slice_of("web", "10.1.0.1", hostname="other")
    objects[key_of(copy)] = copy
    assert resolver.resolve(objects, NODE).services[0] is before.services[0]


def test_another_node_or_scheduler_changes_every_service() -> None:
    objects = objects_of(service("web", 1), slice_of("web", "10.1.0.1", nodeName="n2"))
    resolver = Resolver()
    assert not resolver.resolve(objects, NODE).services[0].backends[0].is_local
    assert resolver.resolve(objects, NodeContext("n2")).services[0].backends[0].is_local
    options = ResolveOptions(msgspec.convert("maglev", type=type(ResolveOptions().scheduler)))
    assert resolver.resolve(objects, NodeContext("n2"), options).services[0].scheduler == "maglev"


def test_an_endpoint_is_dropped_as_soon_as_its_address_becomes_a_vip_and_comes_back_after() -> None:
    objects = objects_of(service("web", 1), slice_of("web", "10.96.0.2", "10.1.0.1"))
    resolver = Resolver()
    assert len(resolver.resolve(objects, NODE).services[0].backends) == 2
    other = service("other", 2)
    objects[key_of(other)] = other
    resolution = resolver.resolve(objects, NODE)
    assert [each.address for each in resolution.services[1].backends] == ["10.1.0.1"]
    assert [each.field for each in resolution.problems] == ["endpoints[0].addresses[0]"]
    del objects[key_of(other)]
    resolution = resolver.resolve(objects, NODE)
    assert len(resolution.services[0].backends) == 2
    assert resolution.problems == ()


def test_the_loser_gets_the_frontend_when_the_winner_goes() -> None:
    objects = objects_of(
        service("a", 1, externalIPs=["192.0.2.1"]), service("b", 2, externalIPs=["192.0.2.1"])
    )
    resolver = Resolver()
    assert [len(each.frontends) for each in resolver.resolve(objects, NODE).services] == [2, 1]
    del objects[ObjectKey("Service", "default", "a")]
    resolution = resolver.resolve(objects, NODE)
    assert [len(each.frontends) for each in resolution.services] == [2]
    assert resolution.problems == ()


def pod(name: str, address: str, **labels: str) -> Object:
    status = {"phase": "Running", "podIP": address, "conditions": [{"type": "Ready", "status": "True"}]}
    return obj("Pod", name, metadata={"labels": labels}, spec={"nodeName": "n1"}, status=status)


def test_pods_are_followed() -> None:
    objects = objects_of(service("web", 1, selector={"app": "x", "tier": "y"}))
    resolver = Resolver()

    def addresses(*changed: Object) -> list[str]:
        objects.update(objects_of(*changed))
        (resolved,) = resolver.resolve(
            objects, NODE, changed=[key_of(each) for each in changed] or None
        ).services
        return [each.address for each in resolved.backends]

    assert addresses() == []
    assert addresses(pod("p1", "10.1.0.1", app="x", tier="y")) == ["10.1.0.1"]
    # Whichever pair fewer pods have, the other one must fit too.
    assert addresses(pod("p2", "10.1.0.2", app="x"), pod("p3", "10.1.0.3", tier="y")) == ["10.1.0.1"]
    assert addresses(pod("p2", "10.1.0.2", app="x", tier="y")) == ["10.1.0.1", "10.1.0.2"]
    assert addresses(pod("p1", "10.1.0.1", app="x")) == ["10.1.0.2"]
    assert addresses(service("web", 1, selector={"tier": "y"})) == ["10.1.0.2", "10.1.0.3"]
    assert addresses(slice_of("web", "10.1.0.9")) == ["10.1.0.9"]


def test_the_zone_of_a_pods_node_is_followed() -> None:
    objects = objects_of(service("web", 1, selector={"app": "x"}), pod("p1", "10.1.0.1", app="x"))
    resolver = Resolver()
    assert resolver.resolve(objects, NODE).services[0].backends[0].zone == ""
    node = obj("Node", "n1", metadata={"labels": {"topology.kubernetes.io/zone": "b"}})
    objects[key_of(node)] = node
    assert resolver.resolve(objects, NODE).services[0].backends[0].zone == "b"
    del objects[key_of(node)]
    assert resolver.resolve(objects, NODE).services[0].backends[0].zone == ""


def test_a_vip_that_becomes_a_nodes_address_may_be_an_endpoint() -> None:
    objects = objects_of(service("web", 1, externalIPs=["192.0.2.1"]), slice_of("web", "192.0.2.1"))
    resolver = Resolver()
    assert len(resolver.resolve(objects, NODE).problems) == 1
    node = obj("Node", "n1", status={"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]})
    objects[key_of(node)] = node
    resolution = resolver.resolve(objects, NODE)
    assert resolution.problems == ()
    assert [each.address for each in resolution.services[0].backends] == ["192.0.2.1"]


def test_node_context() -> None:
    node = obj("Node", "n1", metadata={"labels": {"topology.kubernetes.io/zone": "a"}})
    assert node_context(objects_of(node), "n1") == NodeContext("n1", "a")
    assert node_context({}, "n1") == NodeContext("n1", "")


def test_a_node_without_a_name_has_no_local_endpoints() -> None:
    objects = objects_of(service("web", 1), slice_of("web", "10.1.0.1"))
    assert not Resolver().resolve(objects, NodeContext()).services[0].backends[0].is_local


# --- properties --------------------------------------------------------------------------------------

_FLAG = st.sampled_from([None, True, False])
_CONDITIONS = st.builds(EndpointConditions, _FLAG, _FLAG, _FLAG)
_HINTS = st.builds(
    EndpointHints,
    st.lists(st.sampled_from([Hint("a"), Hint("b")]), max_size=2, unique=True).map(tuple),
    st.lists(st.sampled_from([Hint("n1"), Hint("n2")]), max_size=2, unique=True).map(tuple),
)
_ADDRESS = st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.96.0.2", "192.0.2.1"])
_ENDPOINT = st.builds(
    Endpoint,
    _ADDRESS.map(lambda each: (each,)),
    _CONDITIONS,
    st.none() | _HINTS,
    st.sampled_from(["", "n1", "n2"]),
    st.sampled_from(["", "a", "b"]),
)
_METADATA = {"creationTimestamp": st.sampled_from([None, "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"])}


@st.composite
def _services(draw: st.DrawFn) -> Object:
    name = draw(st.sampled_from(["s1", "s2", "s3"]))
    kind = draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]))
    spec: dict[str, Any] = {
        "type": kind,
        "clusterIP": draw(st.sampled_from(["None", "10.96.0.1", "10.96.0.2"]))
        if kind == "ClusterIP"
        else "10.96.0.3",
        "ports": [
            {"name": "a", "port": 80, "nodePort": 30000 if kind != "ClusterIP" else 0},
            {"name": "b", "port": 81},
        ],
        "externalIPs": draw(st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2"]), max_size=2, unique=True)),
        "selector": draw(st.sampled_from([{}, {"app": "x"}, {"app": "x", "tier": "y"}])),
        "publishNotReadyAddresses": draw(st.booleans()),
    }
    weights = draw(st.sampled_from(["", "10.1.0.1=0", "10.1.0.1=2,10.1.0.2=0"]))
    created = draw(_METADATA["creationTimestamp"])
    return obj(
        "Service",
        name,
        metadata={"annotations": {"ebpfproxy.io/weights": weights}, "creationTimestamp": created},
        spec=spec,
    )


@st.composite
def _slices(draw: st.DrawFn) -> Object:
    labels = {"kubernetes.io/service-name": draw(st.sampled_from(["s1", "s2", "s3"]))}
    if draw(st.booleans()):
        labels["endpointslice.kubernetes.io/managed-by"] = "endpointslicemirroring-controller.k8s.io"
    base = obj(
        "EndpointSlice",
        draw(st.sampled_from(["e1", "e2", "e3"])),
        api="discovery.k8s.io/v1",
        metadata={"labels": labels},
        addressType="IPv4",
    )
    assert isinstance(base, EndpointSlice)
    ports = tuple(EndpointPort(name, "TCP", draw(st.sampled_from([8080, 9090]))) for name in ("a", "b"))
    return msgspec.structs.replace(base, endpoints=tuple(draw(st.lists(_ENDPOINT, max_size=4))), ports=ports)


@st.composite
def _others(draw: st.DrawFn) -> Object:
    kind = draw(st.sampled_from(["Endpoints", "Pod", "Node"]))
    address = draw(_ADDRESS)
    if kind == "Endpoints":
        subset = {"addresses": [{"ip": address}], "ports": [{"name": "a", "port": 8080}]}
        return obj(kind, draw(st.sampled_from(["s1", "s2"])), subsets=[subset])
    if kind == "Node":
        zone = draw(st.sampled_from(["a", "b"]))
        return obj(
            kind,
            draw(st.sampled_from(["n1", "n2"])),
            metadata={"labels": {"topology.kubernetes.io/zone": zone}},
            status={"addresses": [{"type": "InternalIP", "address": address}]},
        )
    labels = draw(st.sampled_from([{}, {"app": "x"}, {"app": "x", "tier": "y"}, {"tier": "y"}]))
    ready = draw(st.sampled_from(["True", "False"]))
    return obj(
        kind,
        draw(st.sampled_from(["p1", "p2"])),
        metadata={"labels": labels},
        spec={"nodeName": draw(st.sampled_from(["n1", "n2"]))},
        status={"phase": "Running", "podIP": address, "conditions": [{"type": "Ready", "status": ready}]},
    )


_OBJECT = _services() | _slices() | _others()
_WORLD = st.lists(_OBJECT, max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_OBJECT, st.booleans()), min_size=1, max_size=25))
def test_following_changes_gives_what_a_fresh_start_gives(steps: list[tuple[Object, bool]]) -> None:
    objects: dict[ObjectKey, Object] = {}
    told, finds_out = Resolver(), Resolver()
    for each, is_there in steps:
        if is_there:
            objects[key_of(each)] = each
        else:
            objects.pop(key_of(each), None)
        fresh = Resolver().resolve(objects, NODE)
        assert told.resolve(objects, NODE, changed=[key_of(each)]) == fresh
        assert finds_out.resolve(objects, NODE) == fresh


@settings(max_examples=100, deadline=None)
@given(_WORLD, st.randoms())
def test_the_order_of_objects_does_not_matter(world: list[Object], random: Any) -> None:
    objects = list(objects_of(*world).items())
    first = Resolver().resolve(dict(objects), NODE)
    random.shuffle(objects)
    assert Resolver().resolve(dict(objects), NODE) == first


@settings(max_examples=100, deadline=None)
@given(_services(), st.lists(_ENDPOINT, max_size=8), st.randoms())
def test_how_endpoints_are_spread_over_slices_does_not_matter(
    kubernetes_service: Object, endpoints: list[Endpoint], random: Any
) -> None:
    def in_slices(parts: list[list[Endpoint]]) -> tuple[ModelService, ...]:
        name = kubernetes_service.metadata.name
        slices = [
            msgspec.structs.replace(
                slice_of(name, name=f"e{i}"), endpoints=tuple(part), ports=(EndpointPort("a", "TCP", 8080),)
            )
            for i, part in enumerate(parts)
        ]
        return Resolver().resolve(objects_of(kubernetes_service, *slices), NODE).services

    # Which hint counts of an endpoint that is there twice in one state is open, so only one has hints.
    distinct = {each.addresses: each for each in endpoints}
    endpoints = [
        *distinct.values(),
        *(msgspec.structs.replace(each, hints=distinct[each.addresses].hints) for each in endpoints),
    ]
    whole = in_slices([endpoints])
    random.shuffle(endpoints)
    assert in_slices([endpoints[::2], endpoints[1::2], endpoints[:1]]) == whole


@settings(max_examples=200, deadline=None)
@given(_WORLD)
def test_what_always_holds(world: list[Object]) -> None:
    resolution = Resolver().resolve(objects_of(*world), NODE)
    assert len({each.name for each in resolution.services}) == len(resolution.services)
    fronts = [
        (front.address, front.port, each.protocol) for each in resolution.services for front in each.frontends
    ]
    assert len(set(fronts)) == len(fronts), "a frontend has one Service"
    for each in resolution.services:
        places = [(backend.address, backend.port) for backend in each.backends]
        assert places == sorted(set(places)), "each backend once, in order"
        for pool in (each.cluster, each.local):
            assert set(pool.backends) <= set(each.backends)
            assert list(pool.backends) == sorted(pool.backends, key=lambda one: (one.address, one.port))
            assert all(one.weight and one.readiness is not Readiness.NOT_READY for one in pool.backends)
            assert len({one.readiness for one in pool.backends}) <= 1, (
                "terminating ones only if none is ready"
            )
        assert all(one.is_local for one in each.local.backends)
        assert each.cluster.on_empty is Empty.REJECT
        if not each.local.backends:
            assert (each.local.on_empty is Empty.DROP) == bool(each.cluster.backends)
        assert each.internal_policy is Policy.CLUSTER


# --- all documents together --------------------------------------------------------------------------


def test_validate_documents_names_file_object_and_field() -> None:
    good = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"ports": [{"port": 80}]},
    }
    bad = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": [{"port": 0}]}}
    taken = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "c"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    }
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "d"}}
    listed = {"apiVersion": "v1", "kind": "List", "items": [taken, foreign]}
    problems, count = validate_documents(
        [
            ("x.yaml", 0, good),
            ("x.yaml", 1, bad),
            ("y.yaml", 0, listed),
            ("z.yaml", 2, good),
            ("z.yaml", 3, 7),
        ]
    )
    assert count == 5
    assert [(each.source, each.name, each.field) for each in problems] == [
        ("x.yaml#2", "b", "spec.ports[0].port"),
        ("z.yaml#3", "a", ""),
        ("z.yaml#4", "", ""),
        ("y.yaml", "c", "spec.clusterIP"),
    ]
    assert str(problems[1]) == "z.yaml#3: Service default/a: is defined in x.yaml too"
    assert str(problems[2]) == "z.yaml#4: object: must be an object, not int"


def test_kinds_are_told_apart_in_the_index() -> None:
    # A Service, its Endpoints and a Pod may all have one name.
    pod = obj(
        "Pod", "web", metadata={"labels": {"app": "x"}}, status={"podIP": "10.1.0.9", "phase": "Running"}
    )
    endpoints = obj("Endpoints", "web", subsets=[{"addresses": [{"ip": "10.1.0.1"}], "ports": [{"port": 1}]}])
    assert isinstance(pod, Pod)
    assert isinstance(endpoints, Endpoints)
    objects = objects_of(service("web", 1), endpoints, pod)
    (resolved,) = Resolver().resolve(objects, NODE).services
    assert [each.address for each in resolved.backends] == ["10.1.0.1"]
    assert not any(isinstance(each, Node) for each in objects.values())


def test_age_decides_in_any_time_zone() -> None:
    early = obj(
        "Service",
        "z",
        metadata={"creationTimestamp": "2026-01-01T01:00:00+02:00"},
        spec={"clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.1"], "ports": [{"port": 80}]},
    )
    late = obj(
        "Service",
        "a",
        metadata={"creationTimestamp": dt.datetime(2026, 1, 1)},
        spec={"clusterIP": "10.96.0.2", "externalIPs": ["192.0.2.1"], "ports": [{"port": 80}]},
    )
    assert isinstance(early, Service)
    (problem,) = Resolver().resolve(objects_of(late, early), NODE).problems
    assert problem.name == "a"
