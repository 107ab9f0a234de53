"""What an administrator must see at the Node object: events, and how many of them are told.

Pure: nothing is sent from here. An event is told when a problem appears; the same one not again for a while,
and never many at once: the API server has other things to do while a cluster is in trouble.

Source: Event of events.k8s.io/v1; reasons that kube-proxy has are used with its words.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NORMAL, WARNING = "Normal", "Warning"
#: Where events of objects without a namespace belong; a server of 1.20 takes them in the second one only.
NAMESPACES: tuple[str, ...] = ("default", "kube-system")
_CONTROLLER = "ebpfproxy"
_NOTE_MAX = 1024  # bytes; the API refuses more

#: Groups of the agent's problems -> reason of their events. The log has the others.
REASONS = {
    "sync": "SyncFailed",
    "upkeep": "UpkeepFailed",
    "dataplane": "DataplaneDegraded",
    "unsupported": "ServiceNotSupported",
    "health": "FailedToStartProxierHealthcheck",  # kube-proxy's
    "config": "InvalidConfiguration",
    "ledger": "StateNotSaved",
}

_BURST = 20
_REFILL_S = 30.0  # one more event after so long
_AGAIN_S = 600.0  # the same event not before this


class Event(msgspec.Struct, frozen=True):
    """Something that happened to this node's Services."""

    reason: str
    note: str
    type: str = WARNING
    action: str = "ServeServices"


def started(version: str, mode: str, passed_over: Iterable[str]) -> Iterator[Event]:
    """Yield what there is to say of a start.

    Args:
        version: of the agent.
        mode: of the dataplane.
        passed_over: modes that can't be used here, each with the reason.
    """
    yield Event("Starting", f"ebpfproxy {version} serves in mode {mode}", NORMAL, "StartEbpfproxy")
    for each in passed_over:
        yield Event("ModeNotUsable", each)


def appeared(group: str, before: Iterable[str], after: Iterable[str]) -> list[Event]:
    """Return the events of the problems of a group that were not there before."""
    reason, known = REASONS.get(group), set(before)
    return [Event(reason, text) for text in after if text not in known] if reason else []


def path(namespace: str) -> str:
    """Return where the API server takes events of a namespace."""
    return f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"


def body(
    event: Event, node: str, instance: str, now: float, number: int, namespace: str = NAMESPACES[0]
) -> dict[str, Any]:
    """Return the object that the API server takes.

    Args:
        event: what to say.
        node: name of the Node.
        instance: who says it.
        now: Unix time.
        number: another one for each event of this process.
        namespace: one of ``NAMESPACES``.
    """
    note = event.note.encode()[:_NOTE_MAX].decode(errors="ignore")
    stamp = dt.datetime.fromtimestamp(now, dt.UTC).isoformat(timespec="microseconds")
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{node}.{int(now * 1e6):x}{number:04x}", "namespace": namespace},
        "eventTime": stamp.replace("+00:00", "Z"),
        "reportingController": _CONTROLLER,
        "reportingInstance": instance,
        "type": event.type,
        "reason": event.reason,
        "action": event.action,
        # kube-proxy and kubelet name a Node by its name in the place of the uid, and kubectl looks for that.
        "regarding": {"kind": "Node", "name": node, "uid": node, "apiVersion": "v1"},
        "note": note,
    }


class Limiter:
    """Says which events are told; times are monotonic seconds."""

    def __init__(self) -> None:
        self._tokens = float(_BURST)
        self._refilled = 0.0
        self._told: dict[Event, float] = {}

    def admits(self, event: Event, now: float) -> bool:
        """Return whether to tell ``event``, and remember that it was."""
        self._tokens = min(_BURST, self._tokens + (now - self._refilled) / _REFILL_S)
        self._refilled = now
        self._told = {each: at for each, at in self._told.items() if now - at < _AGAIN_S}
        if event in self._told or self._tokens < 1:
            return False
        self._tokens -= 1
        self._told[event] = now
        return True
