"""The command line on a live node: while the agent runs, and from the pinned maps after it was killed."""

from __future__ import annotations

import json
from contextlib import ExitStack
from socket import SOCK_DGRAM, SOCK_STREAM
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
import yaml

from ebpfproxy.cli import desired
from ebpfproxy.dataplane.bpf import view
from ebpfproxy.dataplane.bpf.explain import explain
from ebpfproxy.model.services import Protocol
from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import NODE_IPS, OUTSIDE_IPS, Topology

from . import catalogue as known
from .conftest import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebpfproxy.dataplane.explanation import Match
    from rig.probe import RemoteSocket

pytestmark = [pytest.mark.root, pytest.mark.netns]

STICKY = ("10.96.0.70", "fd00:96::46")


class Live(NamedTuple):
    """A node on which things happened: see ``live``."""

    net: Topology
    agent: Agent
    on_node: RemoteSocket
    from_outside: RemoteSocket
    runs: bool

    def rows(self, noun: str, *arguments: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.agent.rows(noun, *arguments)
        return rows


@pytest.fixture(scope="module", params=["agent-runs", "agent-was-killed"])
def live(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[Live]:
    with ExitStack() as stack:
        net = stack.enter_context(Topology(pod_count=3))
        stack.enter_context(name_servers(serving(net), 8080, 8081))
        agent = Agent(net, config=known.CONFIG)
        agent.write(
            *known.objects(net.pods),
            service(
                *("sticky", known.HTTP),
                ips=STICKY,
                sessionAffinity="ClientIP",
                sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}},
            ),
            *known.slices("sticky", net.pods, known.TO_HTTP),
        )
        stack.enter_context(agent)
        node = stack.enter_context(Probe(net.on_node))
        outside = stack.enter_context(Probe(net.from_outside))
        node.tcp(known.NODE_PORT[0], 80, 9)
        for _ in range(4):
            with pytest.raises(ConnectionRefusedError):
                node.tcp(known.EMPTY[0], 80)
        outside.tcp(STICKY[0], 80)
        on_node = stack.enter_context(node.socket(SOCK_STREAM))
        on_node.connect(known.EXTERNAL[0], 80)
        assert on_node.ask()
        from_outside = stack.enter_context(outside.socket(SOCK_STREAM))
        from_outside.connect(known.EXTERNAL[0], 80)
        assert from_outside.ask()
        unconnected = stack.enter_context(node.socket(SOCK_DGRAM))
        unconnected.sendto(b"?", known.WEB[0], 80)
        unconnected.recvfrom()
        if request.param == "agent-was-killed":
            agent.kill()
        yield Live(net, agent, on_node, from_outside, request.param == "agent-runs")


def one(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """Return the only row with these values."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, rows)
    return found[0]


def test_services(live: Live) -> None:
    rows = live.rows("services")
    node_port = one(rows, name="default/node-port:http", family=4)
    assert node_port["frontends"] == ["10.96.0.13:80", "*:30080"]
    assert set(node_port["kinds"]) == {"ClusterIP", "NodePort"}
    assert (node_port["protocol"], node_port["scheduler"]) == ("TCP", "rr")
    assert (node_port["backends_usable"], node_port["backends_total"]) == (3, 3)
    assert (node_port["connections"], node_port["refused"]) == (9, 0)
    empty = one(rows, name="default/empty:http", family=4)
    assert (empty["backends_total"], empty["refused"]) == (0, 4)
    assert one(rows, name="default/sticky:http", family=6)["affinity_s"] == 600
    assert {row["name"] for row in live.rows("services", "web")} == {
        "default/web:http",
        "default/web:udp",
        "default/web:second",
    }
    assert live.rows("services", "-n", "nowhere") == []


def test_backends(live: Live) -> None:
    rows = live.rows("backends", "node-port:http", "--protocol", "tcp")
    v4 = [row for row in rows if ":" not in row["address"]]
    assert [(row["address"], row["port"]) for row in v4] == [(pod.v4, 8080) for pod in live.net.pods]
    assert [row["connections"] for row in v4] == [3, 3, 3]
    assert [row["open"] for row in v4] == [0, 0, 0], "all are closed"
    assert [row["is_local"] for row in v4] == [True, True, False]
    assert all(row["state"] == "ready" and row["is_usable"] for row in v4)
    assert len({row["id"] for row in live.rows("backends")}) == len(live.rows("backends"))
    (terminating,) = [
        row for row in live.rows("backends", "terminating:http") if row["address"] == live.net.pods[0].v4
    ]
    assert (terminating["state"], terminating["is_usable"]) == ("terminating", True)


def test_connections(live: Live) -> None:
    rows = [
        row for row in live.rows("connections", "external") if row["state"] in ("connected", "established")
    ]
    vip = f"{known.EXTERNAL[0]}:80"
    backends = {f"{pod.v4}:8080" for pod in live.net.pods}
    local = one(rows, kind="socket", vip=vip)
    assert local["backend"] in backends
    port = live.from_outside.getsockname()[1]
    forwarded = one(rows, kind="forwarded", client=f"{OUTSIDE_IPS[0]}:{port}")
    assert (forwarded["vip"], forwarded["protocol"], forwarded["state"]) == (vip, "TCP", "established")
    assert forwarded["backend"] in backends
    udp = one(live.rows("connections", "web:udp"), kind="socket", state="unconnected")
    assert udp["vip"] == f"{known.WEB[0]}:80"


def test_affinity(live: Live) -> None:
    row = one(live.rows("affinity"), client=OUTSIDE_IPS[0])
    assert row["service"] == "default/sticky:http"
    assert row["backend"] in {f"{pod.v4}:8080" for pod in live.net.pods}
    assert 0 < row["expires_s"] <= 600


def test_maps(live: Live) -> None:
    rows = {row["name"]: row for row in live.rows("maps")}
    assert {"vips", "services", "slots", "backends", "sockets", "conntrack", "affinity", "verdicts"} <= set(
        rows
    )
    assert all(0 <= row["entries"] <= row["limit"] and row["bytes"] > 0 for row in rows.values())
    assert rows["affinity"]["entries"] == 1
    assert rows["backends"]["entries"] == len(live.rows("backends"))


def test_status(live: Live) -> None:
    status = live.agent.status()
    assert status["is_running"] is live.runs
    assert (status["node"], status["loader"]) == ("node-1", "libbpf")
    assert status["problems"] == []
    assert set(status["devices"]) == {"eth0", "pod1", "pod2", "pod3"}
    assert status["verdicts"]["reject-empty"] == 4
    assert status["verdicts"]["new"] >= 12
    code = live.agent.cli(
        *("status", "--state-dir", live.agent.state_dir, "--bpffs", live.net.bpffs), check=False
    )
    assert code.returncode == (0 if live.runs else 3)


def explained(live: Live, target: str, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = live.agent.rows("explain", target, *arguments)
    return answer


def test_explain_says_who_and_why_not(live: Live) -> None:
    found = explained(live, f"{NODE_IPS[0]}:30017", "--from", OUTSIDE_IPS[0])
    (match,) = found["matches"]
    assert (match["service"], match["scope"], match["policy"]) == (
        "default/local-external:http",
        "external",
        "Local",
    )
    assert (match["kind"], match["frontend"]) == ("NodePort", "*:30017/TCP")
    pods = live.net.pods
    assert [each["backend"] for each in match["candidates"]] == [f"{pod.v4}:8080" for pod in pods[:2]]
    assert [each["share"] for each in match["candidates"]] == [0.5, 0.5]
    (excluded,) = match["excluded"]
    assert excluded["backend"] == f"{pods[2].v4}:8080"
    assert "Local" in excluded["reason"] or "node" in excluded["reason"]


def test_explain_shows_both_scopes_without_a_client(live: Live) -> None:
    found = explained(live, f"[{NODE_IPS[1]}]:30017/udp")
    by_scope = {match["scope"]: len(match["candidates"]) for match in found["matches"]}
    assert by_scope == {"internal": 3, "external": 2}


def test_explain_knows_the_client_s_affinity(live: Live) -> None:
    found = explained(live, f"{STICKY[0]}:80", "--from", OUTSIDE_IPS[0])
    assert found["matches"][0]["affinity"]["client"] == OUTSIDE_IPS[0]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (f"{known.WEB[0]}:9999", "no Service uses"),
        ("198.51.100.1:80", "no address of any Service"),
        (f"{NODE_IPS[0]}:8080", "left alone"),
    ],
)
def test_explain_says_what_matches_nothing(live: Live, target: str, says: str) -> None:
    result = live.agent.cli("explain", target, "--bpffs", live.net.bpffs, "-o", "json", check=False)
    assert result.returncode == 3
    assert says in json.loads(result.stdout)["answer"]


def test_explain_says_that_there_is_nobody(live: Live) -> None:
    found = explained(live, f"{known.EMPTY[0]}:80", "--from", NODE_IPS[0])
    assert found["matches"][0]["candidates"] == []
    assert "reject" in found["answer"] or "refuse" in found["answer"]


EVERYTHING = [
    (vip, port, protocol, source)
    for vip, port in (
        *(
            (vip, 80)
            for vips in (known.WEB, known.TERMINATING, known.EXTERNAL, known.GUARDED)
            for vip in vips
        ),
        *((vip, 80) for vip in (known.EMPTY[0], known.LOCAL_INTERNAL[0], known.NODE_PORT[1], STICKY[1])),
        *((node, port) for node in (*NODE_IPS, "127.0.0.1") for port in (30017, 30019, 30080)),
    )
    for protocol in Protocol
    for source in (
        None,
        OUTSIDE_IPS[0] if "." in vip else OUTSIDE_IPS[1],
        "127.0.0.1" if "." in vip else "::1",
    )
]


def alike(match: Match) -> Match:
    """Return what both ways know: source ranges in any order, and no client's affinity."""
    words = " ".join(sorted(match.result.replace(",", "").split()))
    return msgspec.structs.replace(match, affinity=None, result=words)


def test_explain_says_the_same_from_the_maps_and_from_what_the_agent_wants(live: Live) -> None:
    """Other modes have the second way alone."""
    if not live.runs:
        pytest.skip("the agent tells what it wants while it runs")
    state = desired.read(live.agent.state_dir)
    with view.open_maps(live.net.bpffs) as maps:
        for asked in EVERYTHING:
            read, wanted = explain(maps, *asked), desired.explain(state, *asked)
            assert [alike(each) for each in wanted.matches] == [alike(each) for each in read.matches], asked
            unused = read.answer.replace(": it is rejected, ", ", and ")
            assert asked[3] is None or wanted.answer in {read.answer, unused}, asked


def test_rows_are_the_same_from_the_maps_and_from_what_the_agent_wants(live: Live) -> None:
    """But for what only the maps know: what was counted, and backends that are gone."""
    if not live.runs:
        pytest.skip("the agent tells what it wants while it runs")
    state = desired.read(live.agent.state_dir)
    uncounted = {"open": None, "connections": None}
    with view.open_maps(live.net.bpffs) as maps:
        read = [msgspec.structs.replace(each, **uncounted, refused=None) for each in view.services(maps)]
        assert desired.services(state) == read
        of_maps = [
            msgspec.structs.replace(each, **uncounted, id=None)
            for each in view.backends(maps)
            if each.state != "gone"
        ]
    assert len(of_maps) > 10
    assert desired.backends(state) == of_maps


def test_env(live: Live) -> None:
    state = ["--state-dir", str(live.agent.state_dir)]
    text = live.agent.cli("env", "default", *state).stdout
    variables = dict(line.split("=", 1) for line in text.splitlines())
    # Kubernetes, "Discovering services": for a Service "web" at 10.96.0.10, first port http 80/TCP.
    assert variables["WEB_SERVICE_HOST"] == "10.96.0.10"
    assert variables["WEB_SERVICE_PORT"] == variables["WEB_SERVICE_PORT_HTTP"] == "80"
    assert variables["WEB_PORT"] == variables["WEB_PORT_80_TCP"] == "tcp://10.96.0.10:80"
    assert variables["NODE_PORT_SERVICE_HOST"] == "10.96.0.13"
    assert not any(name.startswith("HEADLESS") for name in variables)
    assert live.agent.cli("env", "nowhere", *state, check=False).returncode == 3


def test_validate(live: Live) -> None:
    assert live.agent.config_file
    good = live.agent.cli("validate", live.agent.manifests, "--config", live.agent.config_file, "-o", "json")
    assert json.loads(good.stdout)["problems"] == []
    bad = live.net.directory / "bad.yaml"
    bad.write_text(json.dumps(service("bad", {"port": 0})))
    result = live.agent.cli("validate", bad, "-o", "json", check=False)
    assert result.returncode == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "bad.yaml" in problem
    assert "spec.ports[0].port" in problem


def test_check(live: Live) -> None:
    report = json.loads(live.agent.cli("check", "-o", "json", "--state-dir", live.agent.state_dir).stdout)
    assert one(report["dataplanes"], name="bpf")["reason"] == ""
    assert one(report["loaders"], name="libbpf")["reason"] == ""
    assert all(feature["ok"] for feature in report["features"] if feature["required"])
    assert any("left to the real load balancer" in sentence for sentence in report["unsupported"])


NOUNS = ["services", "backends", "connections", "affinity", "maps"]


@pytest.mark.parametrize("noun", NOUNS)
def test_formats_agree(live: Live, noun: str) -> None:
    """Table and wide have one line for each row of JSON, and YAML has the same names."""

    def said(style: str) -> str:
        return live.agent.cli(noun, "--bpffs", live.net.bpffs, "-o", style).stdout

    rows = json.loads(said("json"))
    assert rows
    assert [set(row) for row in yaml.safe_load(said("yaml"))] == [set(row) for row in rows]
    for style in ("table", "wide"):
        header, *lines = said(style).splitlines()
        assert header == header.upper()
        assert len(lines) == len(rows)


@pytest.mark.parametrize("noun", NOUNS)
def test_nothing_programmed_is_said(live: Live, noun: str, bpffs: object) -> None:
    result = live.agent.cli(noun, "--bpffs", str(bpffs), check=False)
    assert result.returncode == 3
    assert "nothing is programmed" in result.stderr
