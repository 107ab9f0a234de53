"""Stand-ins for what the agent talks to: they record, wait, and fail on demand."""

from __future__ import annotations

import os
import queue
import time
from typing import TYPE_CHECKING

from ebpfproxy.health import Health, Snapshot
from ebpfproxy.model.objects import ObjectMeta as Meta
from ebpfproxy.model.objects import Service, ServicePort, ServiceSpec
from ebpfproxy.netlink import Address
from ebpfproxy.store import Set, Synced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ebpfproxy.model.services import DesiredState
    from ebpfproxy.source import SourceEvent

TIMEOUT_S = 30.0


def service(name: str, port: int = 80, **spec: object) -> Service:
    """Return a Service that an allocator or a resolver can work with."""
    return Service(Meta(name=name, namespace="default"), ServiceSpec(ports=(ServicePort(port=port),), **spec))  # type: ignore[arg-type]


def until(is_true: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


class FakeDataplane:
    """Remembers every state; fails as often as it is told to."""

    mode = "bpf"
    loader = "fake"
    devices = ("eth9",)

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.states: list[DesiredState] = []  # programmed
        self.tries = 0
        self.ticks = 0
        self.is_closed = False
        self.failures: list[Exception] = []  # raised one by one by sync
        self.tick_failures: list[Exception] = []
        self.on_sync: Callable[[DesiredState], None] = lambda _: None

    def sync(self, state: DesiredState) -> None:
        """Program, or fail."""
        self.tries += 1
        self.on_sync(state)
        if self.failures:
            raise self.failures.pop(0)
        self.states.append(state)

    def tick(self) -> None:
        """Count."""
        self.ticks += 1
        if self.tick_failures:
            raise self.tick_failures.pop(0)

    def unsupported(self, state: DesiredState) -> list[str]:
        """Say that Services with source ranges are beyond us."""
        return [f"{each.name} has source ranges" for each in state.services if each.has_source_ranges]

    def close(self) -> None:
        """Note it."""
        self.is_closed = True

    @property
    def ports(self) -> dict[str, int]:
        """The Services programmed last: name and port."""
        if not self.states:
            return {}
        return {each.name.name: each.frontends[0].port for each in self.states[-1].services}


class FakeSource:
    """Delivers what a test puts in."""

    def __init__(self, *first: SourceEvent) -> None:
        self._queue: queue.Queue[tuple[SourceEvent, ...] | BaseException | None] = queue.Queue()
        self.rereads = 0
        self.is_closed = False
        if first:
            self.put(*first, Synced("objects"))

    def put(self, *events: SourceEvent) -> None:
        """Deliver a batch."""
        self._queue.put(events)

    def set(self, *objects: Service, file: str = "a.yaml") -> None:
        """Deliver objects."""
        self.put(*(Set(obj, file) for obj in objects))

    def die(self, error: BaseException) -> None:
        """End with an error."""
        self._queue.put(error)

    def batches(self) -> Iterator[tuple[SourceEvent, ...]]:
        """Yield what was put in."""
        while (batch := self._queue.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    def reread(self) -> None:
        """Say Synced again."""
        self.rereads += 1
        self.put(Synced("objects"))

    def close(self) -> None:
        """End."""
        self.is_closed = True
        self._queue.put(None)


class FakeServers(Health):
    """Health servers that keep what they are told and open no port."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: list[Snapshot] = []
        self.is_closed = False

    def publish(self, snapshot: Snapshot) -> None:
        """Keep it."""
        self.snapshots.append(snapshot)

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


class FakeNetwork:
    """A host with the addresses that a test gives it."""

    def __init__(self, *addresses: str) -> None:
        self._found = list(addresses)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.reads = 0
        self.behind: dict[tuple[str, ...], frozenset[str]] = {}  # patterns of devices -> prefixes

    def set(self, *addresses: str) -> None:
        """Change the addresses."""
        self._found = list(addresses)
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return what becomes readable."""
        return self._fd

    def changed(self) -> bool:
        """Return whether something changed since the last call."""
        try:
            return bool(os.eventfd_read(self._fd))
        except BlockingIOError:
            return False

    def addresses(self) -> Sequence[Address]:
        """Return the addresses."""
        self.reads += 1
        return [Address(each, 6 if ":" in each else 4, 1, True, False) for each in self._found]

    def prefixes_behind(self, patterns: Sequence[str]) -> frozenset[str]:
        """Return what a test put behind devices."""
        return self.behind.get(tuple(patterns), frozenset())

    def close(self) -> None:
        """Release it."""
        os.close(self._fd)
