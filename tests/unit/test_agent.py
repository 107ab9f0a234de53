"""The agent with a fake source, dataplane and network: what it does when things go right, and wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy import agent, config, files, host, log, status
from ebpfproxy.agent import Agent, Options, Place, local_sources
from ebpfproxy.config import Config
from ebpfproxy.dataplane.bpf.mode import lock_pins
from ebpfproxy.errors import ConfigError, DataplaneError, KernelError, MapFullError, SourceError
from ebpfproxy.model.objects import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    ObjectKey,
    Taint,
)
from ebpfproxy.model.objects import ObjectMeta as Meta
from ebpfproxy.model.services import DesiredState, Scheduler
from ebpfproxy.runner import Limits
from ebpfproxy.source import Reported, feed
from ebpfproxy.store import Delete, Reach, Set, Synced
from ebpfproxy.systemd import Notifier
from unit.fakes import TIMEOUT_S, FakeDataplane, FakeNetwork, FakeServers, FakeSource, service, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ebpfproxy.events import Event

A = ObjectKey("Service", "default", "a")
ROOT = Path(__file__).resolve().parents[2]
TAINT = Taint("ToBeDeletedByClusterAutoscaler", effect="NoSchedule")


def endpoints(name: str, count: int) -> EndpointSlice:
    """Return a slice with so many endpoints of a Service."""
    meta = Meta(name=f"{name}-1", namespace="default", labels={"kubernetes.io/service-name": name})
    found = tuple([Endpoint((f"10.244.0.{number}",)) for number in range(1, count + 1)])
    return EndpointSlice(meta, "IPv4", found, (EndpointPort(port=8080),))


class FakeNotifier(Notifier):
    """Keeps what systemd would hear."""

    def __init__(self) -> None:
        super().__init__({"WATCHDOG_USEC": "1000"})
        self.messages: list[str] = []

    def _send(self, message: str, flags: int = 0) -> bool:
        self.messages.append(message.split("\n", maxsplit=1)[0])
        return True


class Running:
    """An agent in a thread, with everything around it faked."""

    def __init__(self, state_dir: Path, server: str = "", **settings: Any) -> None:
        self.state_dir = state_dir
        self.source = FakeSource()
        self.sources: list[FakeSource | Exception] = [self.source]  # handed out one by one
        self.dataplane = FakeDataplane()
        self.network = FakeNetwork("192.0.2.1")
        self.notifier = FakeNotifier()
        self.servers = FakeServers()
        self.events: list[Event] = []
        self.settings = Config(hostname_override="node-1", **settings)
        self.load: Callable[[], Config] = lambda: self.settings
        self.agent = Agent(
            self.settings,
            Place("" if server else "/manifests", state_dir, server),
            self._make,
            self.network,
            self.dataplane,
            self.notifier,
            self._load,
            self.servers,
            self.events.append,
        )
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _make(self) -> FakeSource:
        made = self.sources.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    def _load(self) -> Config:
        return self.load()

    def start(self, *, once: bool = False) -> Running:
        self._once = once
        self._thread.start()
        return self

    def _run(self) -> None:
        self.code = self.agent.run(once=self._once)

    def join(self) -> int | None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.code

    def stop(self) -> int | None:
        if self._thread.ident is None:
            self.agent.close()
        else:
            self.agent.stop()
            self.join()
        return self.code

    def serves(self, **ports: int) -> None:
        until(lambda: self.dataplane.ports == ports)

    def has_problem(self, part: str) -> None:
        until(lambda: any(part in text for text in self.status().problems))

    def has_no_problem(self) -> None:
        until(lambda: not self.status().problems)

    def status(self) -> status.Status:
        """Return the status file, once there is one."""
        until((self.state_dir / status.FILE).exists)
        found = status.read(self.state_dir)
        assert found
        return found

    @property
    def schedulers(self) -> list[str]:
        """Of the Services programmed last."""
        return [each.scheduler.value for each in self.dataplane.states[-1].services]

    @property
    def ledger(self) -> Any:
        return json.loads((self.state_dir / agent.LEDGER_FILE).read_text())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(**settings: Any) -> Running:
        started.append(Running(tmp_path / "state", **settings))
        return started[-1]

    yield make
    for each in started:
        each.stop()
        each.network.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(agent, "_TICK_S", 0.02)
    monkeypatch.setattr(feed, "_RETRIES", Limits(first_retry_s=0.01, max_retry_s=0.05))
    logger = logging.getLogger("ebpfproxy")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


# --- the ordinary way --------------------------------------------------------------------------------


def test_nothing_is_programmed_before_the_source_told_everything(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.set(service("a", 1))
    until(lambda: it.dataplane.ticks > 3)
    assert it.dataplane.tries == 0
    assert "READY=1" not in it.notifier.messages
    it.source.put(Set(service("b", 2), "a.yaml"), Synced("objects"))
    it.serves(a=1, b=2)
    assert len(it.dataplane.states) == 1


def test_changes_are_programmed(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Synced("objects"))
    it.source.set(service("a", 1), service("b", 2))
    it.serves(a=1, b=2)
    it.source.set(service("a", 11))
    it.serves(a=11, b=2)
    it.source.put(Delete(A, "a.yaml"))
    it.serves(b=2)


def test_a_hundred_changes_during_a_sync_are_one_sync(running: Callable[..., Running]) -> None:
    it = running().start()
    entered, leave = threading.Event(), threading.Event()

    def wait(_: DesiredState) -> None:
        entered.set()
        assert leave.wait(TIMEOUT_S)

    it.dataplane.on_sync = wait
    it.source.put(Synced("objects"))
    assert entered.wait(TIMEOUT_S)
    for port in range(1, 101):
        it.source.set(service("a", port))
    until(it.source._queue.empty)
    it.source.put()  # the thread took everything before this
    until(it.source._queue.empty)
    leave.set()
    it.serves(a=100)
    assert len(it.dataplane.states) <= 3  # the first one, all of the changes, the empty batch


def test_systemd_hears_ready_only_after_the_first_sync(running: Callable[..., Running]) -> None:
    it = running()
    told: list[list[str]] = []
    it.dataplane.on_sync = lambda _: told.append(list(it.notifier.messages))
    it.start().source.put(Synced("objects"))
    until(lambda: "READY=1" in it.notifier.messages)
    until(lambda: "WATCHDOG=1" in it.notifier.messages)
    assert "READY=1" not in told[0]
    it.stop()
    assert it.notifier.messages[-1] == "STOPPING=1"


def test_a_stop_leaves_everything_in_place(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    states = len(it.dataplane.states)
    assert it.stop() == 0
    assert (it.dataplane.ports, len(it.dataplane.states)) == ({"a": 1}, states)
    assert it.source.is_closed
    assert it.status().state == "stopped"


def test_status_tells_what_runs(running: Callable[..., Running]) -> None:
    it = running(unused=("featureGates",)).start()
    it.source.put(Set(service("a", 1), "a.yaml"), Reported(("b.yaml is broken",)), Synced("objects"))
    it.dataplane.problems = ["this kernel is old"]
    it.has_problem("this kernel is old")
    until(lambda: it.status().state == "running")
    found = it.status()
    assert (found.pid, found.state, found.node, found.mode) == (os.getpid(), "running", "node-1", "bpf")
    assert (found.loader, found.devices, found.services, found.failures) == ("fake", ("eth9",), 1, 0)
    assert found.problems == ("this kernel is old", "b.yaml is broken")
    assert found.unused_settings == ("featureGates",)
    assert found.last_sync > found.started


def test_what_the_dataplane_can_not_do_is_named(running: Callable[..., Running]) -> None:
    it = running().start()
    guarded = service("a", 1, type="LoadBalancer", load_balancer_source_ranges=("192.0.2.0/24",))
    it.source.put(Set(guarded, "a.yaml"), Synced("objects"))
    until(lambda: it.status().unsupported == ("default/a has source ranges",))
    it.source.put(Delete(A, "a.yaml"))
    until(lambda: it.status().unsupported == ())


def test_what_changes_is_counted_and_looked_at(running: Callable[..., Running]) -> None:
    it = running().start()
    guarded = service("b", 2, type="LoadBalancer", load_balancer_source_ranges=("192.0.2.0/24",))
    it.source.put(Set(service("a", 1), "a.yaml"), Set(endpoints("a", 3), "e.yaml"), Synced("objects"))
    until(lambda: (it.status().services, it.status().backends) == (1, 3))
    it.source.put(Set(guarded, "b.yaml"), Set(endpoints("a", 2), "e.yaml"))
    until(lambda: it.status().unsupported == ("default/b has source ranges",))
    assert (it.status().services, it.status().backends) == (2, 2)
    it.source.put(Delete(A, "a.yaml"))
    until(lambda: (it.status().services, it.status().backends) == (1, 0))
    assert it.status().unsupported == ("default/b has source ranges",)


def test_health_is_told_what_is_programmed(running: Callable[..., Running]) -> None:
    it = running(max_sync_s=20.0, node_port_addresses=("192.0.2.0/24",)).start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    until(lambda: bool(it.servers.snapshots))
    found = it.servers.snapshots[0]
    assert found.state is it.dataplane.states[-1]
    assert (found.healthz_at, found.metrics_at) == (("", 10256), ("127.0.0.1", 10249))
    assert (found.hosts, found.late_after_s, found.waiting_since) == (("192.0.2.1",), 40.0, None)
    assert (found.is_node_eligible, found.facts.service_changes, found.facts.loader) == (True, 1, "fake")
    it.source.put(Set(Node(Meta(name="node-1"), NodeSpec(taints=(TAINT,))), "node.yaml"))
    until(lambda: not it.servers.snapshots[-1].is_node_eligible)
    it.stop()
    assert it.servers.is_closed


def test_health_listens_everywhere_unless_it_is_told_where(running: Callable[..., Running]) -> None:
    it = running(node_port_addresses=("0.0.0.0/0", "::/0")).start()
    it.source.put(Synced("objects"))
    until(lambda: bool(it.servers.snapshots))
    assert it.servers.snapshots[-1].hosts == ("",)


# --- things that go wrong ----------------------------------------------------------------------------


def test_a_failed_sync_is_tried_again_until_it_works(
    running: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    it = running()
    it.dataplane.failures = [DataplaneError("map is stuck") for _ in range(3)]
    with caplog.at_level(logging.INFO, "ebpfproxy"):
        it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
        it.has_problem("map is stuck")
        assert it.status().state == "failing"
        assert "READY=1" not in it.notifier.messages
        it.serves(a=1)
        it.has_no_problem()
    assert it.dataplane.tries == 4
    assert it.status().state == "running"
    texts = [record.getMessage() for record in caplog.records]
    said = "sync failed and is tried again: map is stuck"
    assert texts.count(said) == 1
    assert texts.count(f"no longer: {said}") == 1


def test_health_is_told_how_long_a_change_waits(running: Callable[..., Running]) -> None:
    it = running()
    it.dataplane.failures = [DataplaneError("no") for _ in range(3)]
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    until(lambda: bool(it.servers.snapshots) and it.servers.snapshots[-1].waiting_since is None)
    waited = {each.waiting_since for each in it.servers.snapshots} - {None}
    assert len(waited) == 1, "the clock starts with the first failure and runs until the success"
    assert it.servers.snapshots[0].facts.synced == 0
    assert it.servers.snapshots[-1].facts.synced > 0
    facts = it.servers.snapshots[-1].facts
    assert sum((facts.full_syncs + facts.partial_syncs).counts) == 4


def test_ports_that_can_not_be_bound_are_a_problem(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Synced("objects"))
    it.servers.problems = ("listen on *:10256: Address already in use",)
    it.has_problem("listen on *:10256")
    it.servers.problems = ()
    it.has_no_problem()
    it.servers.is_fatal = True
    assert it.join() == 1


def test_a_change_during_failures_is_in_the_next_try(running: Callable[..., Running]) -> None:
    it = running()
    it.dataplane.failures = [DataplaneError("no") for _ in range(2)]
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    until(lambda: it.dataplane.tries >= 1)
    it.source.set(service("a", 2))
    it.serves(a=2)


def test_a_full_map_does_not_keep_the_others_waiting(running: Callable[..., Running]) -> None:
    """The dataplane programmed what fits: that is a start, with a problem."""
    it = running()
    it.dataplane.failures = [MapFullError("map services is full: 2 of 2")] * 100
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    until(lambda: "READY=1" in it.notifier.messages)
    it.has_problem("map services is full: 2 of 2")


def test_an_error_that_nobody_expected_is_survived(running: Callable[..., Running]) -> None:
    it = running()
    it.dataplane.failures = [ZeroDivisionError("by zero")]
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    it.source.set(service("b", 2))
    it.serves(a=1, b=2)


def test_failing_upkeep_is_a_problem_that_goes_away(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Synced("objects"))
    it.dataplane.tick_failures = [KernelError("list devices: No buffer space", 105)] * 20
    it.has_problem("list devices: No buffer space")
    it.has_no_problem()


def test_addresses_that_can_not_be_read_are_tried_again(running: Callable[..., Running]) -> None:
    it = running()
    real, failures = it.network.addresses, [KernelError("list addresses: busy", 16)] * 2

    def addresses() -> Any:
        if failures:
            raise failures.pop()
        return real()

    it.network.addresses = addresses  # type: ignore[method-assign]
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    assert it.dataplane.states[0].addresses.local == {"192.0.2.1"}


def test_a_dead_source_is_started_again_and_nothing_is_left_over(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Set(service("a", 1), "a.yaml"), Set(service("b", 2), "b.yaml"), Synced("objects"))
    it.serves(a=1, b=2)
    second = FakeSource()
    it.sources[:] = [SourceError("the directory is missing"), OSError("odd"), second]
    it.source.die(SourceError("it broke"))
    it.has_problem("the source stopped")
    until(lambda: not it.sources)
    second.put(Set(service("b", 22), "b.yaml"))  # not complete yet
    until(second._queue.empty)
    assert it.dataplane.ports == {"a": 1, "b": 2}
    second.put(Synced("objects"))
    it.serves(b=22)
    it.has_no_problem()


def test_two_files_with_one_object_are_named(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Set(service("a", 1), "1.yaml"), Set(service("a", 2), "2.yaml"), Synced("objects"))
    it.has_problem("Service default/a: is defined in ")


def test_a_refused_object_is_named_with_its_file(running: Callable[..., Running]) -> None:
    it = running().start()
    taken = service("b", 2, cluster_ip="10.96.9.9", cluster_ips=("10.96.9.9",))
    it.source.put(
        Set(service("a", 1, cluster_ip="10.96.9.9", cluster_ips=("10.96.9.9",)), "1.yaml"),
        Set(taken, "2.yaml"),
        Synced("objects"),
    )
    it.has_problem("2.yaml: Service default/b: spec.clusterIP")
    it.serves(a=1)


# --- allocations -------------------------------------------------------------------------------------


def test_allocations_are_stored_before_they_are_programmed(running: Callable[..., Running]) -> None:
    it = running()
    stored: list[tuple[str, Any]] = []
    it.dataplane.on_sync = lambda state: stored.append((state.services[0].frontends[0].address, it.ledger))
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    address, ledger = stored[0]
    assert ledger == {"default/a": {"clusterIPs": [address]}}


def test_allocations_survive_a_restart(running: Callable[..., Running]) -> None:
    first = running().start()
    first.source.put(
        Set(service("a", 1), "a.yaml"), Set(service("n", 2, type="NodePort"), "a.yaml"), Synced("objects")
    )
    first.serves(a=1, n=2)
    first.stop()
    second = running().start()
    # In another order, and with a newcomer before them.
    second.source.put(
        Set(service("0", 3), "a.yaml"),
        Set(service("n", 2, type="NodePort"), "a.yaml"),
        Set(service("a", 1), "a.yaml"),
        Synced("objects"),
    )
    until(lambda: len(second.dataplane.ports) == 3)
    before = {each.name: each.frontends for each in first.dataplane.states[-1].services}
    after = {each.name: each.frontends for each in second.dataplane.states[-1].services}
    assert {name: after[name] for name in before} == before


def test_allocations_that_can_not_be_stored_are_a_problem_and_no_stop(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.write_atomic

    def full(path: Path, data: bytes, **options: Any) -> None:
        if path.name == agent.LEDGER_FILE:
            raise OSError(28, "No space left on device")
        real(path, data, **options)

    it = running()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
        it.serves(a=1)
        it.has_problem("No space left on device")
    it.source.set(service("a", 2))
    it.serves(a=2)
    it.has_no_problem()
    assert "default/a" in it.ledger


def test_a_broken_ledger_is_replaced(running: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / agent.LEDGER_FILE).write_text("{")
    it = running().start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    assert "default/a" in it.ledger


# --- the network and the node ------------------------------------------------------------------------


def test_new_addresses_are_followed(running: Callable[..., Running]) -> None:
    it = running(node_port_addresses=("192.0.2.0/24",)).start()
    it.source.put(Synced("objects"))
    until(lambda: bool(it.dataplane.states))
    assert it.dataplane.states[-1].addresses.serving == {"192.0.2.1"}
    it.network.set("192.0.2.1", "192.0.2.2", "198.51.100.1")
    until(lambda: it.dataplane.states[-1].addresses.serving == {"192.0.2.1", "192.0.2.2"})
    assert it.dataplane.states[-1].addresses.local == {"192.0.2.1", "192.0.2.2", "198.51.100.1"}


def test_addresses_are_not_read_for_every_change(running: Callable[..., Running]) -> None:
    it = running().start()
    it.source.put(Synced("objects"))
    for port in range(1, 10):
        it.source.set(service("a", port))
        it.serves(a=port)
    assert it.network.reads == 1


def test_everything_is_looked_at_again_now_and_then(running: Callable[..., Running]) -> None:
    it = running(max_sync_s=0.01).start()
    it.source.put(Synced("objects"))
    until(lambda: it.network.reads > 3)
    assert len(it.dataplane.states) > 3


@pytest.mark.parametrize(
    ("mode", "cluster", "pods", "expected"),
    [
        ("", (), ("10.1.0.0/24", "fd00:1::/64"), {"10.1.0.0/24", "fd00:1::/64"}),
        ("", ("10.0.0.0/8",), ("10.1.0.0/24",), {"10.0.0.0/8"}),
        ("ClusterCIDR", ("10.0.0.0/8",), ("10.1.0.0/24",), {"10.0.0.0/8"}),
        ("ClusterCIDR", (), ("10.1.0.0/24",), set()),
        ("NodeCIDR", ("10.0.0.0/8",), ("10.1.0.0/24",), {"10.1.0.0/24"}),
        ("NodeCIDR", ("10.0.0.0/8",), None, set()),
    ],
)
def test_local_sources(
    mode: str, cluster: tuple[str, ...], pods: tuple[str, ...] | None, expected: set[str]
) -> None:
    node = None if pods is None else Node(spec=NodeSpec(pod_cidrs=pods))
    settings = Config(detect_local_mode=mode, cluster_cidrs=cluster)
    assert local_sources(settings, node, FakeNetwork()) == expected


def test_local_sources_behind_devices_follow_the_routes(running: Callable[..., Running]) -> None:
    it = running(detect_local_mode="BridgeInterface", local_devices=("br0",), cluster_cidrs=("10.0.0.0/8",))
    it.network.behind = {("br0",): frozenset({"10.1.0.0/24"})}
    it.start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    assert it.dataplane.states[-1].local_sources == {"10.1.0.0/24"}
    assert it.dataplane.states[-1].masquerades_outside
    it.network.behind = {("br0",): frozenset({"10.2.0.0/24"})}
    it.network.set("192.0.2.1")
    until(lambda: it.dataplane.states[-1].local_sources == {"10.2.0.0/24"})


def test_an_administrator_is_told_of_the_start_and_of_failures(running: Callable[..., Running]) -> None:
    it = running()
    it.start().source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    until(lambda: [each.reason for each in it.events] == ["Starting"])
    it.dataplane.failures = [DataplaneError("no room"), DataplaneError("no room")]
    it.source.put(Set(service("a", 2), "a.yaml"))
    it.serves(a=2)
    assert [each.reason for each in it.events[1:]] == ["SyncFailed"], "once, however often it is tried"
    assert "no room" in it.events[1].note


def test_bind_address_is_the_primary_address(running: Callable[..., Running]) -> None:
    it = running(node_port_addresses=("primary",), bind_address="192.0.2.7")
    it.network.set("192.0.2.1", "192.0.2.7", "2001:db8::1")
    it.start()
    node = Node(Meta(name="node-1"), status=NodeStatus(addresses=(NodeAddress("InternalIP", "2001:db8::1"),)))
    it.source.put(Set(service("a", 1), "a.yaml"), Set(node, "n.yaml"), Synced("objects"))
    it.serves(a=1)
    until(lambda: it.dataplane.states[-1].addresses.serving == {"192.0.2.7", "2001:db8::1"})


def test_oom_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(agent, "_OOM_SCORE", tmp_path / "oom_score_adj")
    agent._set_oom_score(-997)
    assert (tmp_path / "oom_score_adj").read_text() == "-997"
    monkeypatch.setattr(agent, "_OOM_SCORE", tmp_path / "none" / "oom_score_adj")
    agent._set_oom_score(1)
    assert "set oomScoreAdj to 1: No such file" in caplog.text


# --- reload ------------------------------------------------------------------------------------------


def test_a_reload_takes_over_what_can_change(
    running: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "setup", lambda *_, **__: None)
    it = running().start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)
    until(lambda: "READY=1" in it.notifier.messages)
    assert it.schedulers == ["random"]
    it.notifier.messages.clear()
    it.load = lambda: Config(
        hostname_override="node-1", scheduler=Scheduler.RR, loader="bcc", cluster_cidrs=("10.0.0.0/8",)
    )
    with caplog.at_level(logging.INFO, "ebpfproxy"):
        it.agent.reload()
        until(lambda: "READY=1" in it.notifier.messages)
    assert it.source.rereads == 1
    assert it.schedulers == ["rr"]
    assert it.dataplane.states[-1].local_sources == {"10.0.0.0/8"}
    assert "changed, but in effect only after a restart: ebpfproxy.loader" in caplog.text
    assert it.notifier.messages.index("RELOADING=1") < it.notifier.messages.index("READY=1")


def test_a_wrong_configuration_at_a_reload_changes_nothing(running: Callable[..., Running]) -> None:
    it = running(scheduler=Scheduler.RR).start()
    it.source.put(Set(service("a", 1), "a.yaml"), Synced("objects"))
    it.serves(a=1)

    def wrong() -> Config:
        raise ConfigError("configuration x: mode: 'q' is none of auto, bpf")

    it.load = wrong
    it.agent.reload()
    it.has_problem("mode: 'q' is none of auto, bpf; the configuration stays as it was")
    it.source.set(service("b", 2))
    it.serves(a=1, b=2)
    assert it.schedulers == ["rr", "rr"]
    it.load = lambda: it.settings
    it.agent.reload()
    it.has_no_problem()


# --- once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "failures", "code"),
    [
        ([Set(service("a", 1), "a.yaml")], [], 0),
        ([Set(service("a", 1), "a.yaml")], [DataplaneError("no")], 1),
        ([Set(service("a", 1), "a.yaml"), Reported(("b.yaml: is broken",))], [], 3),
    ],
)
def test_once_ends_with_the_result(
    running: Callable[..., Running], events: list[Any], failures: list[Exception], code: int
) -> None:
    it = running()
    it.dataplane.failures = failures
    it.start(once=True).source.put(*events, Synced("objects"))
    assert it.join() == code
    assert it.dataplane.tries == 1


def test_once_ends_when_the_source_dies(running: Callable[..., Running]) -> None:
    it = running().start(once=True)
    it.source.die(SourceError("broken"))
    assert it.join() == 1


def test_once_does_not_wait_forever(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "ONCE_S", 0.2)
    it = running(server="https://192.0.2.1:6443").start(once=True)
    it.source.put(Reported(("list services: connection refused",)))
    assert it.join() == 1
    assert it.dataplane.tries == 0
    (said,) = [each.getMessage() for each in caplog.records if "--once" in each.getMessage()]
    assert said.startswith("read https://192.0.2.1:6443: not everything was there within 0.2 s")
    assert "list services: connection refused" in said


def test_once_says_how_long_it_waits() -> None:
    assert f"within {agent.ONCE_S:g} s" in (ROOT / "docs/cli.md").read_text()  # which is --help


# --- the process -------------------------------------------------------------------------------------

PROCESS = """
    import sys
    from pathlib import Path
    from ebpfproxy import agent
    from ebpfproxy.config import Config
    from ebpfproxy.source.directory import DirectorySource
    from ebpfproxy.systemd import Notifier
    from unit.fakes import FakeDataplane, FakeNetwork

    manifests, state = map(Path, sys.argv[1:])
    dataplane = FakeDataplane()
    dataplane.on_sync = lambda state: print(
        "synced", [each.frontends[0].port for each in state.services], flush=True
    )
    it = agent.Agent(
        Config(), agent.Place(str(manifests), state), lambda: DirectorySource(manifests),
        FakeNetwork("192.0.2.1"), dataplane, Notifier(),
    )
    agent._handle_signals(it)
    sys.exit(it.run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    spec = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}
    (manifests / "a.json").write_text(json.dumps(spec | {"spec": {"ports": [{"port": 80}]}}))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS), manifests, tmp_path / "state"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"},
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "synced [80]\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "synced [80]\n"
        (manifests / "a.json").write_text(json.dumps(spec | {"spec": {"ports": [{"port": 81}]}}))
        while "81" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 0, process.stderr
    finally:
        process.kill()
        process.communicate()
    found = status.read(tmp_path / "state")
    assert found
    assert (found.state, found.pid) == ("stopped", process.pid)


def _options(tmp_path: Path, **options: Any) -> Options:
    for name in ("manifests", "bpffs"):
        (tmp_path / name).mkdir(exist_ok=True)
    usual: dict[str, Any] = {
        "manifests": tmp_path / "manifests",
        "cgroup": tmp_path,
        "bpffs": tmp_path / "bpffs",
        "state_dir": tmp_path / "state",
        "mode": "bpf",  # auto would go on to what needs no cgroup
    }
    return Options(**(usual | options))


def test_a_wrong_configuration_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("kind: Service\n")
    assert agent.run(_options(tmp_path, config=tmp_path / "config.yaml")) == 2
    assert "apiVersion: expected kubeproxy.config.k8s.io/v1alpha1" in capsys.readouterr().err


@pytest.fixture
def any_bpffs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_bpffs", lambda _path: True)


def test_pins_need_a_bpf_file_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options(tmp_path)
    assert options.bpffs
    assert agent.run(options) == 2
    assert f"use {options.bpffs} for pinned maps: it is in no bpf file system" in capsys.readouterr().err
    assert not (options.bpffs / "ebpfproxy").exists()


@pytest.mark.usefixtures("any_bpffs")
def test_a_missing_directory_is_an_error_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent.run(_options(tmp_path, manifests=tmp_path / "none")) == 1
    assert f"watch directory {tmp_path}/none: No such file or directory" in capsys.readouterr().err


@pytest.mark.usefixtures("any_bpffs")
@pytest.mark.parametrize("what", ["state", "bpffs"])
def test_two_agents_refuse_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    options = _options(tmp_path)
    if what == "state":
        lock = agent._lock_state_dir(options.state_dir)
    else:
        assert options.bpffs
        lock = lock_pins(options.bpffs)
    try:
        assert agent.run(options) == 1
    finally:
        lock.close()
    said = capsys.readouterr().err
    by = f" (process {os.getpid()})" if what == "state" else ""
    assert f"is in use by another agent{by}: stop it, or give this one its own" in said
    assert agent.run(_options(tmp_path, manifests=tmp_path / "none")) == 1
    assert "is in use" not in capsys.readouterr().err


def test_flags_override_the_file() -> None:
    file = Config(mode="auto", loader="bcc", devices=("eth0",), map_sizes={"a": 1, "b": 2}, log_format="json")
    flags = Options(Path("x"), mode="bpf", map_sizes={"b": 3}, node_name="n", log_format="text")
    assert flags.apply(file) == Config(
        mode="bpf",
        loader="bcc",
        devices=("eth0",),
        map_sizes={"a": 1, "b": 3},
        hostname_override="n",
        log_format="text",
    )
    assert Options(Path("x")).apply(file) == file
    off = Options(Path("x"), healthz_bind_address="", metrics_bind_address="[::1]").apply(file)
    assert (off.healthz_bind, off.metrics_bind) == (None, ("::1", 10249))


def test_every_fixed_setting_exists() -> None:
    assert set(agent._FIXED) <= set(Config.__struct_fields__)
    assert config.Config().unused == ()


# --- this machine ------------------------------------------------------------------------------------

# proc(5) has the first line; the others are of its form.
MOUNTINFO = """\
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
40 36 0:30 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw
41 36 0:31 / /mnt/with\\040space rw - bpf bpf rw
42 36 0:32 / /odd rw shared:1 master:2 propagate_from:3 - bpf none rw
"""


def test_mounts_are_read() -> None:
    assert list(host.mounts(MOUNTINFO)) == [
        host.Mount(Path("/mnt2"), "/mnt1", "ext3"),
        host.Mount(Path("/sys/fs/cgroup"), "/", "cgroup2"),
        host.Mount(Path("/mnt/with space"), "/", "bpf"),
        host.Mount(Path("/odd"), "/", "bpf"),
    ]


def test_a_whole_file_system_that_nothing_hides_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hidden", "part", "whole"):
        (tmp_path / name).mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 0:1 / {tmp_path}/hidden rw - bpf bpf rw\n"
        f"2 0 0:2 / {tmp_path}/hidden rw - tmpfs tmpfs rw\n"
        f"3 0 0:1 /sub {tmp_path}/part rw - bpf bpf rw\n"
        f"4 0 0:1 / {tmp_path}/whole rw - bpf bpf rw\n"
        f"5 0 0:1 / {tmp_path}/gone rw - bpf bpf rw\n"
    )
    monkeypatch.setattr(host, "_MOUNTINFO", table)
    assert host.find_bpffs() == tmp_path / "whole"
    are_bpf = {"whole": True, "whole/below": True, "part": True, "hidden": False, "wholesale": False}
    assert {name: host.is_bpffs(tmp_path / name) for name in are_bpf} == are_bpf


def test_a_lock_can_be_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not files.is_locked(path)
    lock = files.Lock(path, "file")
    assert files.is_locked(path)
    lock.close()
    assert not files.is_locked(path)


def test_a_written_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    files.write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    files.write_atomic(path, b"new", durable=False, mtime_ns=10**18)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"new", 10**18)


# --- an API server as the source ---------------------------------------------------------------------


def test_nothing_is_allocated_where_an_api_server_does_it(tmp_path: Path) -> None:
    (tmp_path / "allocations.json").write_text('{"default/old":{"clusterIPs":{"4":"10.96.0.99"}}}')
    running = Running(tmp_path, server="https://192.0.2.9:6443").start()
    try:
        pending = service("pending", 90)
        given = service("given", 91, cluster_ip="10.96.0.7", cluster_ips=("10.96.0.7",))
        running.source.put(Set(pending), Set(given), Synced("objects"))
        running.serves(given=91)
        assert running.status().server == "https://192.0.2.9:6443"
        assert running.status().manifests == ""
        assert (
            "10.96.0.99" in (tmp_path / "allocations.json").read_text()
        )  # of another time; not ours to touch
    finally:
        running.stop()


def test_how_old_the_state_is_reaches_the_health_servers(tmp_path: Path) -> None:
    running = Running(tmp_path, server="https://192.0.2.9:6443").start()
    try:
        running.source.put(Synced("objects"), Reach(None))
        until(lambda: bool(running.servers.snapshots) and running.servers.snapshots[-1].reach == Reach(None))
        running.source.put(Reach(1700000000.0))
        until(lambda: running.servers.snapshots[-1].reach == Reach(1700000000.0))
    finally:
        running.stop()
