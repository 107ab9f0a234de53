"""Events at the Node: which, how many, and that the API server gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest

from ebpfproxy import events
from ebpfproxy.events import Event, Limiter, appeared, body, started
from ebpfproxy.kubeapi import recorder
from ebpfproxy.kubeapi.access import Access
from ebpfproxy.kubeapi.client import Client
from ebpfproxy.kubeapi.recorder import Recorder
from rig.api_model import ApiModel, Refusal
from rig.apiserver import ApiServer
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENT = Event("SyncFailed", "sync failed and is tried again: no room")


def test_a_start() -> None:
    assert list(started("1.2", "nftables", ["bpf: this needs root"])) == [
        Event("Starting", "ebpfproxy 1.2 serves in mode nftables", "Normal", "StartEbpfproxy"),
        Event("ModeNotUsable", "bpf: this needs root"),
    ]


@pytest.mark.parametrize(
    ("group", "before", "after", "expected"),
    [
        ("sync", [], ["a"], [Event("SyncFailed", "a")]),
        ("sync", ["a"], ["a"], []),
        ("sync", ["a"], [], []),
        ("unsupported", ["a"], ["a", "b", "c"], [Event("ServiceNotSupported", each) for each in "bc"]),
        ("health", [], ["a"], [Event("FailedToStartProxierHealthcheck", "a")]),  # kube-proxy's reason
        ("resolve", [], ["a"], []),  # of an object, not of the node
    ],
)
def test_problems_become_events_when_they_appear(
    group: str, before: list[str], after: list[str], expected: list[Event]
) -> None:
    assert appeared(group, before, after) == expected


def test_the_object_is_what_the_api_takes() -> None:
    made = body(EVENT, "node-1", "ebpfproxy-node-1", 1_700_000_000.25, 7)
    kubernetes_validate.validate(made, "1.35", strict=True)
    assert made["eventTime"] == "2023-11-14T22:13:20.250000Z"
    assert made["regarding"] == {"kind": "Node", "name": "node-1", "uid": "node-1", "apiVersion": "v1"}
    assert made["metadata"]["namespace"] == "default", "where events of objects without a namespace belong"
    other = body(EVENT, "node-1", "ebpfproxy-node-1", 1_700_000_000.25, 8)
    assert other["metadata"]["name"] != made["metadata"]["name"]


def test_a_long_note_is_cut_to_what_the_api_takes() -> None:
    made = body(Event("SyncFailed", "ü" * 2000), "node-1", "i", 0.0, 0)
    assert made["note"] == "ü" * 512  # 1,024 bytes


def test_the_same_event_is_told_once_in_ten_minutes() -> None:
    limiter = Limiter()
    assert [limiter.admits(EVENT, now) for now in (0, 1, 599, 600, 601)] == [True, False, False, True, False]


def test_twenty_events_at_once_then_two_a_minute() -> None:
    limiter = Limiter()
    many = [Event("SyncFailed", str(number)) for number in range(40)]
    assert sum(limiter.admits(each, 0) for each in many) == 20
    later = [Event("SyncFailed", f"later {number}") for number in range(40)]
    assert sum(limiter.admits(each, 60) for each in later) == 2


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer(ApiModel()) as made:
        yield made


@pytest.fixture
def told(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(recorder, "_RETRY_S", 0.01)
    made = Recorder(lambda: Client(Access((server.url,), "test")), "node-1")
    yield made
    made.close()


def notes(server: ApiServer, namespace: str = "default") -> list[str]:
    return [content["note"] for path, content in server.posted if path == events.path(namespace)]


def test_the_server_gets_them(server: ApiServer, told: Recorder) -> None:
    for number in range(3):
        told.tell(Event("SyncFailed", str(number)))
        told.tell(Event("SyncFailed", str(number)))
    eventually(lambda: notes(server) == ["0", "1", "2"], "three events")


def test_a_server_that_is_away_gets_them_later(server: ApiServer, told: Recorder) -> None:
    answers: list[Any] = [Refusal(503, "ServiceUnavailable"), Refusal(429, "TooManyRequests")]
    server.refuse = lambda _: answers.pop() if answers else None
    told.tell(EVENT)
    eventually(lambda: notes(server) == [EVENT.note], "the event")
    assert not answers


def test_a_server_that_does_not_want_them_is_left_alone(server: ApiServer, told: Recorder) -> None:
    asked = []

    def refuse(_: object) -> Refusal | None:
        asked.append(1)
        return Refusal(403, "Forbidden") if len(asked) == 1 else None

    server.refuse = refuse
    told.tell(EVENT)
    told.tell(Event("SyncFailed", "another"))
    eventually(lambda: notes(server) == ["another"], "the other event")
    assert len(asked) == 2


def test_a_server_of_1_20_takes_them_in_kube_system_only(server: ApiServer, told: Recorder) -> None:
    """Its answer, as it gives it: involvedObject.namespace does not match event.namespace."""
    server.refuse = lambda request: Refusal(422, "Invalid") if "/default/" in request.path else None
    told.tell(EVENT)
    told.tell(Event("SyncFailed", "another"))
    eventually(lambda: notes(server, "kube-system") == [EVENT.note, "another"], "both events")
    assert {content["metadata"]["namespace"] for _, content in server.posted} == {"kube-system"}
