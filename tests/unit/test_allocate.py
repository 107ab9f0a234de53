"""What always holds of allocated values; single rules are in tests/scenarios."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.errors import ConfigError
from ebpfproxy.model.objects import Object, ObjectKey, Service, decode, key_of
from ebpfproxy.resolve import Allocation, AllocationOptions, Allocator
from ebpfproxy.resolve.ranges import cluster_ip_range, node_port_range, pool_range

OPTIONS = AllocationOptions(("10.96.0.0/28", "fd00:96::/124"), (30000, 30009), ("192.0.2.0/30",))


def service(name: str, **spec: Any) -> Object:
    decoded = decode(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"ports": [{"port": 80}], **spec},
        }
    )
    assert decoded is not None
    return decoded


def objects_of(*objects: Object) -> dict[ObjectKey, Object]:
    return {key_of(each): each for each in objects}


def services(allocation: Allocation) -> dict[str, Service]:
    return {key.name: each for key, each in allocation.objects.items() if isinstance(each, Service)}


# --- ranges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cidr", "static_end", "range_end"),
    [
        # The three examples of Kubernetes "Service ClusterIP allocation".
        ("10.96.0.0/24", "10.96.0.16", "10.96.0.254"),
        ("10.96.0.0/20", "10.96.1.0", "10.96.15.254"),
        ("10.96.0.0/16", "10.96.1.0", "10.96.255.254"),
    ],
)
def test_bands_are_the_documented_ones(cidr: str, static_end: str, range_end: str) -> None:
    found = cluster_ip_range(cidr)
    assert found.first == int(ipaddress.ip_network(cidr).network_address) + 1
    assert found.first + found.band - 1 == int(ipaddress.ip_address(static_end))
    assert found.last == int(ipaddress.ip_address(range_end))


def test_the_band_of_node_ports_is_the_documented_one() -> None:
    # Kubernetes "Service", "Choosing your own port": static 30000-30085, dynamic 30086-32767.
    found = node_port_range(30000, 32767)
    assert (found.first, found.first + found.band - 1, found.last) == (30000, 30085, 32767)


@pytest.mark.parametrize("seed", ["", "default/web", "x" * 100])
def test_the_upper_band_comes_first_and_every_number_once(seed: str) -> None:
    found = node_port_range(30000, 30099)
    numbers = list(found.numbers(seed))
    assert sorted(numbers) == list(range(30000, 30100))
    assert min(numbers[:84]) == 30016


@pytest.mark.parametrize("text", ["10.96.0.1/16", "web", "10.96.0.0/33", ""])
def test_a_wrong_range_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match="cluster IP range"):
        Allocator(AllocationOptions((text,)))


def test_wrong_pools_and_families_are_configuration_errors() -> None:
    for text in ("192.0.2.9-192.0.2.1", "192.0.2.1-fd00::1", "a-b", "192.0.2.1/24"):
        with pytest.raises(ConfigError, match="pool"):
            pool_range(text)
    for ranges in ((), ("10.96.0.0/16", "10.97.0.0/16")):
        with pytest.raises(ConfigError, match="one of each family"):
            Allocator(AllocationOptions(ranges))


def test_a_large_ipv6_range_is_fine() -> None:
    allocation = Allocator(AllocationOptions(("fd00:96::/64",))).allocate(objects_of(service("web")))
    (address,) = services(allocation)["web"].cluster_ips
    assert ipaddress.ip_address(address) in ipaddress.ip_network("fd00:96::/64")


# --- memory ------------------------------------------------------------------------------------------


def test_what_did_not_change_is_the_identical_object_and_ledger() -> None:
    objects = objects_of(service("a"), service("b"))
    allocator = Allocator(OPTIONS)
    first = allocator.allocate(objects)
    before = dict(first.objects)
    second = allocator.allocate(objects, [])
    assert second.ledger is first.ledger
    assert second.changed == frozenset()
    objects |= objects_of(service("c"))
    third = allocator.allocate(objects)
    assert third.changed == {ObjectKey("Service", "default", "c")}
    assert third.ledger is not first.ledger
    assert "default/c" not in first.ledger
    assert all(third.objects[key] is each for key, each in before.items())


def test_other_objects_pass_through() -> None:
    node = decode({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    assert node is not None
    allocator = Allocator(OPTIONS)
    assert allocator.allocate(objects_of(node)).objects == objects_of(node)
    assert allocator.allocate({}).objects == {}


def test_a_refused_service_is_served_when_the_reason_goes() -> None:
    first, second = service("a", clusterIP="10.96.0.1"), service("b", clusterIP="10.96.0.1")
    allocator = Allocator(OPTIONS)
    allocation = allocator.allocate(objects_of(first, second))
    assert set(services(allocation)) == {"a"}
    allocation = allocator.allocate(objects_of(second), [key_of(first)])
    assert set(services(allocation)) == {"b"}
    assert key_of(second) in allocation.changed
    assert allocation.problems == ()


def test_node_ports_go_back_when_the_type_changes() -> None:
    allocator = Allocator(OPTIONS)
    allocator.allocate(objects_of(service("a", type="NodePort")))
    allocation = allocator.allocate(objects_of(service("a")))
    assert set(allocation.ledger["default/a"]) == {"clusterIPs"}


def test_what_was_given_back_can_be_given_again() -> None:
    allocator = Allocator(AllocationOptions(("10.96.0.0/30",)))
    for _ in range(3):
        assert set(services(allocator.allocate(objects_of(service("a"), service("b"), service("c"))))) == {
            "a",
            "b",
        }
        assert services(allocator.allocate({})) == {}


def ports_of(allocation: Allocation) -> dict[str, int]:
    return {f"{port.port}/{port.protocol}": port.node_port for port in services(allocation)["a"].spec.ports}


def test_a_node_port_may_move_from_one_port_of_a_service_to_another() -> None:
    allocator = Allocator(OPTIONS, {"default/a": {"nodePorts": {"80/TCP": 30001, "81/TCP": 30002}}})
    ports = [{"name": "x", "port": 80}, {"name": "y", "port": 81, "nodePort": 30001}]
    allocation = allocator.allocate(objects_of(service("a", type="NodePort", ports=ports)))
    assert ports_of(allocation)["81/TCP"] == 30001
    assert ports_of(allocation)["80/TCP"] not in (0, 30001)
    assert allocation.problems == ()
    assert allocation.repairs == ()


def test_a_node_port_is_not_shared_where_its_protocol_is_taken() -> None:
    ports = [
        {"name": "x", "port": 53, "nodePort": 30001},
        {"name": "y", "port": 80, "protocol": "UDP", "nodePort": 30001},
        {"name": "z", "port": 53, "protocol": "UDP"},
    ]
    found = ports_of(Allocator(OPTIONS).allocate(objects_of(service("a", type="NodePort", ports=ports))))
    assert found["53/TCP"] == found["80/UDP"] == 30001
    assert found["53/UDP"] not in (0, 30001)


def test_a_ledger_that_gives_one_service_a_node_port_twice_is_mended() -> None:
    allocator = Allocator(OPTIONS, {"default/a": {"nodePorts": {"80/TCP": 30001, "81/TCP": 30001}}})
    ports = [{"name": "x", "port": 80}, {"name": "y", "port": 81}]
    allocation = allocator.allocate(objects_of(service("a", type="NodePort", ports=ports)))
    assert len(set(ports_of(allocation).values())) == 2
    assert allocation.repairs == ("default/a: 30001 was allocated to default/a too; replaced",)


def test_a_reader_of_the_old_ledger_is_not_disturbed() -> None:
    allocator = Allocator(OPTIONS)
    ledger = allocator.allocate(objects_of(service("a"))).ledger
    text = json.dumps(ledger)
    allocator.allocate({})
    assert json.dumps(ledger) == text


# --- properties --------------------------------------------------------------------------------------


@st.composite
def _services(draw: st.DrawFn) -> Object:
    name = draw(st.sampled_from([f"s{i}" for i in range(12)]))
    kind = draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]))
    spec: dict[str, Any] = {
        "type": kind,
        "ports": [
            {
                "name": "a",
                "port": 53,
                "nodePort": draw(st.sampled_from([0, 0, 30000, 30001])) if kind != "ClusterIP" else 0,
            },
            {"name": "b", "port": 53, "protocol": "UDP"},
            {"name": "c", "port": 80},
        ],
        "ipFamilyPolicy": draw(st.sampled_from(["SingleStack", "PreferDualStack", "RequireDualStack"])),
    }
    if draw(st.booleans()):
        spec["clusterIP"] = draw(st.sampled_from(["None", "10.96.0.1", "10.96.0.14", "fd00:96::1"]))
        if spec["clusterIP"] == "None" and kind != "ClusterIP":
            del spec["clusterIP"]
    if kind == "LoadBalancer":
        spec["externalTrafficPolicy"] = draw(st.sampled_from(["Cluster", "Local"]))
        spec["loadBalancerIP"] = draw(st.sampled_from(["", "", "192.0.2.1"]))
    return service(name, **spec)


def check(allocation: Allocation) -> None:
    """Every value is in its range and has one owner, and every Service is complete."""
    owners: dict[Any, str] = {}
    for name, each in services(allocation).items():
        if each.is_headless:
            continue
        spec = each.spec
        assert spec.cluster_ip == each.cluster_ips[0]
        assert len(each.cluster_ips) == 2 or spec.ip_family_policy == "SingleStack"
        values: set[Any] = set(each.cluster_ips)
        assert all(
            any(ipaddress.ip_address(ip) in ipaddress.ip_network(cidr) for cidr in OPTIONS.cluster_ip_ranges)
            for ip in values
        )
        node_ports = [port.node_port for port in spec.ports]
        if spec.type == "ClusterIP":
            assert node_ports == [0, 0, 0]
        else:
            assert all(30000 <= port <= 30009 for port in node_ports)
            assert len({(port.protocol, port.node_port) for port in spec.ports}) == 3
            values |= set(node_ports)
        if spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local":
            assert 30000 <= spec.health_check_node_port <= 30009
            assert spec.health_check_node_port not in node_ports
            values.add(spec.health_check_node_port)
        ips = [ingress.ip for ingress in each.status.load_balancer.ingress]
        assert all(ipaddress.ip_address(ip) in ipaddress.ip_network("192.0.2.0/30") for ip in ips)
        for value in (*values, *ips):
            assert owners.setdefault(value, name) == name, f"{value} has two owners"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_services(), st.integers(0, 4)), min_size=1, max_size=25))
def test_values_are_unique_in_range_and_stable(steps: list[tuple[Object, int]]) -> None:
    objects: dict[ObjectKey, Object] = {}
    allocator = Allocator(OPTIONS)
    before: dict[str, Service] = {}
    for each, action in steps:
        key = key_of(each)
        if action:
            objects[key] = each
        else:
            objects.pop(key, None)
        allocation = allocator.allocate(objects, [key])
        check(allocation)
        after = services(allocation)
        for name, old in before.items():
            if name != key.name:
                assert after[name].cluster_ips == old.cluster_ips
                assert after[name].spec.ports == old.spec.ports
        refused = {problem.name for problem in allocation.problems}
        assert {key.name for key in objects} - after.keys() <= refused, "what is missing is explained"
        before = dict(after)
    # A restart with the stored ledger gives every Service the same again.
    stored = json.loads(json.dumps(allocation.ledger))
    again = Allocator(OPTIONS, stored).allocate(objects)
    assert again.repairs == ()
    restarted = services(again)
    for name, old in before.items():
        assert restarted[name].cluster_ips == old.cluster_ips
        assert restarted[name].spec.ports == old.spec.ports
        assert restarted[name].spec.health_check_node_port == old.spec.health_check_node_port


_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 40000)
    | st.sampled_from(["10.96.0.1", "x", "", "80/TCP", "fd00:96::1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["clusterIPs", "nodePorts", "loadBalancerIPs", "healthCheckNodePort", "80/TCP"]),
            inner,
            max_size=3,
        )
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["default/s1", "default/s2", "s1", "a/b/c", "default/gone"]), _JUNK, max_size=4
    ),
    st.lists(_services(), max_size=4),
)
def test_no_ledger_breaks_it(ledger: dict[str, Any], world: list[Object]) -> None:
    allocation = Allocator(OPTIONS, ledger).allocate(objects_of(*world))
    check(allocation)
    assert set(allocation.ledger) <= {f"default/{key.name}" for key in objects_of(*world)}


def test_a_filled_service_is_what_the_api_server_would_have_made() -> None:
    allocation = Allocator(OPTIONS).allocate(objects_of(service("a", ipFamilyPolicy="PreferDualStack")))
    filled = services(allocation)["a"]
    assert filled.spec.ip_families == ("IPv4", "IPv6")
    assert (
        decode(
            json.loads(
                msgspec.json.encode({"apiVersion": "v1", "kind": "Service"} | msgspec.to_builtins(filled))
            )
        )
        == filled
    )
