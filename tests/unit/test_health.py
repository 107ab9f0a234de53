"""What the health servers answer. The expected answers are kube-proxy's, as of Kubernetes 1.35."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ebpfproxy import health, status
from ebpfproxy.cli import desired
from ebpfproxy.cli.exit_codes import NothingError
from ebpfproxy.errors import KernelError
from ebpfproxy.health import Bind, Health, LocalEndpoints, Site, Snapshot
from ebpfproxy.metrics import Facts, Reading
from ebpfproxy.model.services import Backend, DesiredState, Readiness
from ebpfproxy.store import Reach
from makers import cluster_ip, service
from unit.fakes import until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ebpfproxy.model.services import Service

WEB = Site("service", "default", "web")
READY, TERMINATING, NOT_READY = Readiness.READY, Readiness.TERMINATING, Readiness.NOT_READY
NOW, WALL = 1000.0, 1_700_000_000.0  # 2023-11-14T22:13:20Z


def here(address: str, port: int = 80, readiness: Readiness = READY, weight: int = 1) -> Backend:
    return Backend(address, port, readiness, is_local=True, weight=weight)


def checked(backends: Sequence[Backend], *, port: str = "", family: int = 4, check: int = 30900) -> Service:
    made = service("web", backends, [cluster_ip("10.96.0.1")])
    name = made.name._replace(port=port, family=family)
    return msgspec.structs.replace(made, name=name, health_check_node_port=check)


# --- Services


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        ([checked([here("10.0.0.1"), here("10.0.0.2")])], 2),
        ([checked([here("10.0.0.1"), Backend("10.0.0.2", 80)])], 1),
        ([checked([])], 0),
        # "Terminating endpoints may still serve traffic but the health check signal should fail if there are
        # only terminating endpoints on a node."
        ([checked([here("10.0.0.1", readiness=TERMINATING)])], 0),
        ([checked([here("10.0.0.1", readiness=NOT_READY)])], 0),
        ([checked([here("10.0.0.1", weight=0), here("10.0.0.2")])], 1),
        # "consider a Service pointing to 10.0.0.1:80 and 10.0.0.1:443 to have 1 endpoint, not 2"
        ([checked([here("10.0.0.1", 80), here("10.0.0.1", 443)])], 1),
        ([checked([here("10.0.0.1", 80)], port="a"), checked([here("10.0.0.1", 443)], port="b")], 1),
        ([checked([here("10.0.0.1", 80)], port="a"), checked([here("10.0.0.2", 443)], port="b")], 2),
        ([checked([here("10.0.0.1")]), checked([here("fd00::1"), here("fd00::2")], family=6)], 2),
    ],
)
def test_local_endpoints(services: list[Service], expected: int) -> None:
    assert health.local_endpoints(services) == {WEB: LocalEndpoints(30900, expected)}


def test_only_services_that_ask_for_it_are_checked() -> None:
    assert health.local_endpoints([checked([here("10.0.0.1")], check=0)]) == {}


@pytest.mark.parametrize(
    ("count", "is_healthy", "status"), [(1, True, 200), (3, True, 200), (0, True, 503), (3, False, 503)]
)
def test_service_response(count: int, is_healthy: bool, status: int) -> None:
    found = health.service_response(WEB, count, is_healthy=is_healthy)
    assert found.status == status
    assert found.headers == (("X-Load-Balancing-Endpoint-Weight", str(count)),)
    assert found.body.decode() == (
        '{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
        f'\t"localEndpoints": {count},\n\t"serviceProxyHealthy": {str(is_healthy).lower()}\n}}'
    )


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        ({}, {}),
        ({"healthz_at": Bind("", 10256)}, {Bind("", 10256): Site("healthz")}),
        ({"metrics_at": Bind("::1", 10249)}, {Bind("::1", 10249): Site("metrics")}),
        ({"state": DesiredState((checked([]),))}, {Bind("", 30900): WEB}),
        (
            {"state": DesiredState((checked([]),)), "hosts": ("192.0.2.1", "2001:db8::1")},
            {Bind("192.0.2.1", 30900): WEB, Bind("2001:db8::1", 30900): WEB},
        ),
    ],
)
def test_sites(snapshot: dict[str, Any], expected: dict[Bind, Site]) -> None:
    made = Snapshot(**snapshot)
    services = made.state.services if made.state else ()
    assert health.sites(made, health.local_endpoints(services)) == expected


# --- the agent


@pytest.mark.parametrize(
    ("waiting_s", "seen_s", "is_healthy"),
    [
        (None, 0, True),
        (59, 0, True),
        (60, 0, False),
        (None, 59, True),
        (None, 60, False),
    ],
    ids=["nothing waits", "not late yet", "late", "busy", "stuck"],
)
def test_healthy(waiting_s: float | None, seen_s: float, is_healthy: bool) -> None:
    waiting_since = None if waiting_s is None else NOW - waiting_s
    snapshot = Snapshot(waiting_since=waiting_since, seen=NOW - seen_s, late_after_s=60)
    assert snapshot.is_healthy(NOW) is is_healthy


RECENT = "2023-11-14T22:13:20Z"  # WALL
SYNCED = "2023-11-14T22:11:40Z"  # 100 s before


@pytest.mark.parametrize(
    ("is_eligible", "is_late", "with_node", "status", "updated"),
    [
        (True, False, True, 200, RECENT),  # "recent" though the last sync was long ago
        (True, True, True, 503, SYNCED),
        (False, False, True, 503, SYNCED),
        (False, True, True, 503, SYNCED),
        (True, False, False, 200, RECENT),
        (True, True, False, 503, SYNCED),
        (False, False, False, 200, RECENT),  # /livez does not ask for the node
    ],
)
def test_healthz_and_livez(
    is_eligible: bool, is_late: bool, with_node: bool, status: int, updated: str
) -> None:
    snapshot = Snapshot(
        is_node_eligible=is_eligible,
        waiting_since=NOW - 70 if is_late else None,
        seen=NOW,
        facts=Facts(synced=WALL - 100),
    )
    found = health.agent_response(snapshot, NOW, WALL, with_node=with_node)
    assert found.status == status
    family = {"lastUpdated": SYNCED, "healthy": not is_late}
    expected: dict[str, Any] = {"lastUpdated": updated, "currentTime": RECENT, "healthy": not is_late}
    expected["status"] = {"IPv4": family, "IPv6": family}
    if with_node:
        expected["nodeEligible"] = is_eligible
    assert json.loads(found.body) == expected


@pytest.mark.parametrize(
    ("lost_at", "source"),
    [
        (None, {"lastUpdated": RECENT, "connected": True}),
        (WALL - 100, {"lastUpdated": SYNCED, "connected": False}),
    ],
)
def test_health_says_how_old_the_state_of_an_api_server_is(
    lost_at: float | None, source: dict[str, Any]
) -> None:
    found = health.agent_response(Snapshot(seen=NOW, reach=Reach(lost_at)), NOW, WALL, with_node=True)
    assert (found.status, json.loads(found.body)["source"]) == (200, source)


def test_an_agent_that_starts_is_healthy() -> None:
    found = health.agent_response(Snapshot(seen=NOW), NOW, WALL, with_node=True)
    assert (found.status, "status" in json.loads(found.body)) == (200, False)
    stuck = health.agent_response(Snapshot(seen=NOW - 99), NOW, WALL, with_node=True)
    assert json.loads(stuck.body)["lastUpdated"] == "0001-01-01T00:00:00Z"  # Go's zero time


# --- HTTP


def ask(servers: Health, bind: Bind, request: str) -> tuple[str, str]:
    """Return the head and body that a client sees."""
    answer = asyncio.run(servers._respond(bind, request.encode()))
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


@pytest.fixture
def servers() -> Health:
    """Servers without a socket."""
    made = Health()
    made._sites = {Bind("", 1): Site("healthz"), Bind("", 2): Site("metrics"), Bind("", 3): WEB}
    made._sites[Bind("", 5)] = Site("state")
    made._snapshot = Snapshot(
        state=DesiredState((checked([here("10.0.0.1")]),)), seen=float("inf"), facts=Facts(mode="bpf")
    )
    return made


@pytest.mark.parametrize(
    ("port", "line", "status", "body"),
    [
        (1, "GET /healthz HTTP/1.1", 200, '"nodeEligible":true'),
        (1, "GET /healthz?verbose HTTP/1.0", 200, '"nodeEligible":true'),
        (1, "GET /livez HTTP/1.1", 200, '"healthy":true'),
        (1, "GET /metrics HTTP/1.1", 404, "404 page not found"),
        (1, "GET / HTTP/1.1", 404, "404 page not found"),
        (1, "nonsense", 400, "400 Bad Request"),
        (1, "GET /healthz HTTP/2", 400, "400 Bad Request"),
        (2, "GET /metrics HTTP/1.1", 200, "# TYPE ebpfproxy_build_info gauge"),
        (2, "GET /proxyMode HTTP/1.1", 200, "bpf"),
        (2, "GET /healthz HTTP/1.1", 200, "ok"),
        (2, "GET /livez HTTP/1.1", 404, "404 page not found"),
        (3, "GET / HTTP/1.1", 200, '"localEndpoints": 1'),
        (3, "GET /any HTTP/1.1", 200, '"localEndpoints": 1'),
        (4, "GET / HTTP/1.1", 404, "404 page not found"),
    ],
)
def test_answers(servers: Health, port: int, line: str, status: int, body: str) -> None:
    head, found = ask(servers, Bind("", port), f"{line}\r\nHost: node\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert body in found
    assert f"Content-Length: {len(found)}" in head.split("\r\n")
    assert "Connection: close" in head.split("\r\n")


def test_head_has_no_body(servers: Health) -> None:
    head, body = ask(servers, Bind("", 2), "HEAD /proxyMode HTTP/1.1\r\n\r\n")
    assert "Content-Length: 3" in head
    assert body == ""


def test_answers_are_counted(servers: Health) -> None:
    for path in ("/healthz", "/healthz", "/livez"):
        ask(servers, Bind("", 1), f"GET {path} HTTP/1.1\r\n\r\n")
    _, body = ask(servers, Bind("", 2), "GET /metrics HTTP/1.1\r\n\r\n")
    assert 'kubeproxy_proxy_healthz_total{code="200"} 2.0' in body
    assert 'kubeproxy_proxy_livez_total{code="200"} 1.0' in body


def test_a_dataplane_that_can_not_be_read_leaves_the_other_metrics(servers: Health) -> None:
    def read() -> Reading:
        raise KernelError("open pinned map", 2)

    servers._read = read
    head, body = ask(servers, Bind("", 2), "GET /metrics HTTP/1.1\r\n\r\n")
    assert "200 OK" in head
    assert "kubeproxy_sync_proxy_rules_last_timestamp_seconds" in body


def test_the_desired_state_is_told_to_root_alone(servers: Health, tmp_path: Path) -> None:
    path = tmp_path / status.SOCKET
    (tmp_path / "old").touch()
    (tmp_path / "old").rename(path)  # what an agent left that was killed
    served = Health()
    served.publish(msgspec.structs.replace(servers._snapshot, state_at=Bind(str(path)), seen=NOW))
    try:
        until(path.is_socket)
        assert path.stat().st_mode & 0o777 == 0o600
        assert desired.read(tmp_path) == servers._snapshot.state
    finally:
        served.close()
    assert not path.exists()
    with pytest.raises(NothingError, match="ask the agent"):
        desired.read(tmp_path)


def test_before_the_first_sync_there_is_no_state(servers: Health) -> None:
    servers._snapshot = Snapshot()
    head, _ = ask(servers, Bind("", 5), "GET /state HTTP/1.0\r\n\r\n")
    assert "404" in head
