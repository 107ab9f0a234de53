"""The store: last value wins, equal values are no change, nothing is ready before all of it is there."""

from __future__ import annotations

from ebpfproxy.model.objects import Node, ObjectKey, ObjectMeta, Problem, Service, ServiceSpec
from ebpfproxy.store import Delete, Set, Store, Synced

KEY = ObjectKey("Service", "default", "web")


def service(cluster_ip: str = "") -> Service:
    return Service(ObjectMeta("web", "default"), ServiceSpec(cluster_ip=cluster_ip))


def test_it_is_ready_when_everything_expected_is_synced() -> None:
    store = Store({"services", "nodes"})
    assert not store.ready()
    store.apply(Synced("services"))
    assert not store.ready()
    store.apply(Synced("nodes"))
    store.apply(Synced("nodes"))
    assert store.ready()


def test_changes_coalesce() -> None:
    store = Store()
    first, last = service("10.96.0.1"), service("10.96.0.2")
    store.apply(Set(first))
    store.apply(Set(last))
    changes = store.take()
    assert changes.objects == {KEY: last}
    assert changes.changed == {KEY}
    assert store.take().changed == frozenset()


def test_an_equal_object_is_no_change() -> None:
    store = Store()
    first = service()
    store.apply(Set(first))
    store.take()
    store.apply(Set(service()))
    assert not store.has_changes()
    assert store.take().objects[KEY] is first


def test_deleted_objects_are_told() -> None:
    store = Store()
    store.apply(Set(service()))
    store.take()
    store.apply(Delete(KEY))
    store.apply(Delete(KEY))
    changes = store.take()
    assert changes.objects == {}
    assert changes.changed == {KEY}


def test_kinds_are_kept_apart() -> None:
    store = Store()
    store.apply(Set(Node(ObjectMeta("web"))))
    store.apply(Set(service()))
    assert set(store.take().objects) == {KEY, ObjectKey("Node", "", "web")}


def test_of_two_files_the_later_name_wins_whatever_came_first() -> None:
    a, b = service("10.96.0.1"), service("10.96.0.2")
    for events in ([Set(a, "a.yaml"), Set(b, "b.yaml")], [Set(b, "b.yaml"), Set(a, "a.yaml")]):
        store = Store()
        for event in events:
            store.apply(event)
        assert store.take().objects[KEY] is b
        assert store.source(KEY) == "b.yaml"
        assert store.problems() == (
            Problem("Service", "default", "web", "", "is defined in b.yaml too, which is used", "a.yaml"),
        )


def test_when_one_of_two_files_goes_the_other_one_counts() -> None:
    a, b = service("10.96.0.1"), service("10.96.0.2")
    store = Store()
    store.apply(Set(a, "a.yaml"))
    store.apply(Set(b, "b.yaml"))
    store.take()
    store.apply(Delete(KEY, "b.yaml"))
    changes = store.take()
    assert changes.objects[KEY] is a
    assert changes.changed == {KEY}
    assert store.problems() == ()
    store.apply(Delete(KEY, "a.yaml"))
    assert store.take().objects == {}


def test_when_the_hidden_file_goes_nothing_changes() -> None:
    store = Store()
    store.apply(Set(service("10.96.0.1"), "a.yaml"))
    store.apply(Set(service("10.96.0.2"), "b.yaml"))
    store.take()
    store.apply(Delete(KEY, "a.yaml"))
    assert not store.has_changes()
    assert store.problems() == ()


def test_an_object_may_move_from_one_file_to_another() -> None:
    store = Store()
    store.apply(Set(service(), "b.yaml"))
    store.take()
    store.apply(Set(service(), "a.yaml"))
    store.apply(Delete(KEY, "b.yaml"))
    assert not store.has_changes()
    assert store.source(KEY) == "a.yaml"


def test_problems_are_located() -> None:
    store = Store()
    store.apply(Set(service(), "web.yaml"))
    known = Problem("Service", "default", "web", "spec", "wrong")
    unknown = Problem("Service", "default", "other", "spec", "wrong")
    located = store.locate([known, unknown])
    assert [each.source for each in located] == ["web.yaml", ""]
