"""The command line: grammar, formats, exit status, and what a command may import."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ebpfproxy import config, documents, status
from ebpfproxy.cli import nouns, output, parser
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.cli.main import main
from ebpfproxy.cli.output import Column
from ebpfproxy.cli.run import options
from ebpfproxy.dataplane import modes
from rig.agent import Agent
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "run",
    "validate",
    "cleanup",
    "drain",
    "completion",
    "check",
    "services",
    "backends",
    "connections",
    "affinity",
    "stats",
    "explain",
    "maps",
    "status",
    "env",
    "version",
]
NOUNS = [
    "check",
    "services",
    "backends",
    "connections",
    "affinity",
    "stats",
    "explain",
    "maps",
    "status",
    "env",
    "validate",
]


def ebpfproxy(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program as users do."""
    return subprocess.run(
        [sys.executable, "-m", "ebpfproxy", *map(str, arguments)], capture_output=True, text=True, check=False
    )


# --- grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.96.0.10:80", ("10.96.0.10", 80, "TCP")),
        ("10.96.0.10:80/tcp", ("10.96.0.10", 80, "TCP")),
        ("10.96.0.10:53/UDP", ("10.96.0.10", 53, "UDP")),
        ("10.96.0.10:7777/sctp", ("10.96.0.10", 7777, "SCTP")),
        ("[fd00::10]:443", ("fd00::10", 443, "TCP")),
        ("[FD00:0:0::10]:53/udp", ("fd00::10", 53, "UDP")),
        ("127.0.0.1:65535", ("127.0.0.1", 65535, "TCP")),
        ("[::ffff:10.96.0.10]:80", ("10.96.0.10", 80, "TCP")),
    ],
)
def test_vip_port(text: str, expected: tuple[str, int, str]) -> None:
    assert parser.vip_port(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.96.0.10", "expected VIP:PORT"),
        ("fd00::10:80", "brackets"),
        ("[10.96.0.10]:80", "brackets"),
        ("[fd00::10:80", "brackets"),
        ("10.96.0.10:0", "none of 1 to 65535"),
        ("10.96.0.10:65536", "none of 1 to 65535"),
        ("10.96.0.10:http", "none of 1 to 65535"),
        ("10.96.0.10:8\N{SUPERSCRIPT TWO}", "none of 1 to 65535"),
        ("10.96.0.10:80/icmp", "none of tcp, udp, sctp"),
        ("web:80", "no IP address"),
        ("10.96.0.256:80", "no IP address"),
        ("[fe80::1%eth0]:80", "zone"),
    ],
)
def test_vip_port_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        parser.vip_port(text)


@pytest.mark.parametrize(
    "text", ["conntrack", "conntrack=", "=5", "conntrack=0", "conntrack=-1", "conntrack=4294967296"]
)
def test_map_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=ENTRIES"):
        parser.map_size(text)


def test_run_flags_reach_the_agent() -> None:
    line = (
        "run --manifests /m --kubeconfig /k --master https://m:1 --kube-api-server https://a,https://b "
        "--config /c.yaml --node-name n1 --mode bpf --loader bcc --cgroup /cg "
        "--devices eth0,cali* --state-dir /s --bpffs /b --once --log-format json "
        "--map-size conntrack=9 --map-size affinity=7 --xdp-mode native --xdp-devices ens* --forwarding dsr "
        "--listen 192.0.2.1,2001:db8::1 "
        "--healthz-bind-address 10.0.0.1:1 --metrics-bind-address [::1]:2"
    )
    given = options(parser.build().parse_args(line.split()))
    assert msgspec.to_builtins(given, enc_hook=str) == {
        "manifests": "/m",
        "kubeconfig": "/k",
        "master": "https://m:1",
        "kube_api_server": ("https://a", "https://b"),
        "config": "/c.yaml",
        "node_name": "n1",
        "mode": "bpf",
        "loader": "bcc",
        "cgroup": "/cg",
        "devices": ("eth0", "cali*"),
        "state_dir": "/s",
        "bpffs": "/b",
        "map_sizes": {"conntrack": 9, "affinity": 7},
        "forwarding": "dsr",
        "xdp_mode": "native",
        "xdp_devices": ("ens*",),
        "listen": ("192.0.2.1", "2001:db8::1"),
        "once": True,
        "log_format": "json",
        "healthz_bind_address": "10.0.0.1:1",
        "metrics_bind_address": "[::1]:2",
        "fields": {},
    }


def test_flags_that_are_not_given_leave_the_configuration_file_alone() -> None:
    given = options(parser.build().parse_args(["run", "--manifests", "/m"]))
    file = config.Config(
        mode="bpf", loader="bcc", hostname_override="n", devices=("eth1",), log_format="json"
    )
    assert given.apply(file) == file


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["run", "--manifests"],
        ["run", "--manifests", "/m", "--mode", "kernelspace"],
        ["run", "--manifests", "/m", "--devices", "eth0,,eth1"],
        ["services", "-o", "xml"],
        ["services", "--prot", "TCP"],
        ["explain", "10.96.0.10:80", "--from", "everywhere"],
        ["completion", "fish"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("usage: ebpfproxy")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "say where Services come from"),
        ("--manifests /m --kubeconfig /k", "not from both"),
        ("--manifests /m --master https://m", "not from both"),
        ("--manifests /m --kube-api-server https://m", "not from both"),
    ],
)
def test_one_source_has_to_be_named(
    flags: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["run", *flags.split(), "--state-dir", str(tmp_path)]) == ExitCode.USAGE
    assert said in capsys.readouterr().err


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = parser.build()._actions
    return next(dict(a.choices) for a in actions if isinstance(a, argparse._SubParsersAction))


def test_every_command_is_there_and_every_noun_has_all_formats() -> None:
    found = commands()
    assert sorted(found) == sorted(COMMANDS)
    for noun in NOUNS:
        formats = next(a.choices for a in found[noun]._actions if "-o" in a.option_strings)
        assert list(formats or ()) == ["table", "wide", "json", "yaml"], noun


def test_every_argument_says_what_it_is() -> None:
    silent = [
        f"{name} {action.dest}"
        for name, command in commands().items()
        for action in command._actions
        if not action.help
    ]
    assert not silent


# --- documents


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_of_the_command_line_are_those_of_the_program() -> None:
    assert (ROOT / "docs/cli.md").read_text() == load_script("cli_docs").document(), (
        "run: .venv/bin/python scripts/cli_docs.py >docs/cli.md"
    )


def test_docs_of_modes_are_the_programs_own_tables() -> None:
    assert (ROOT / "docs/dataplanes.md").read_text() == load_script("dataplanes_docs").document(), (
        "run: .venv/bin/python scripts/dataplanes_docs.py >docs/dataplanes.md"
    )


def test_capabilities_are_a_table_with_reasons() -> None:
    shown = ebpfproxy("check", "--capabilities")
    assert shown.returncode == ExitCode.OK
    (line,) = [
        line for line in shown.stdout.splitlines() if line.startswith("schedulers lc, wlc") and "yes" in line
    ]
    assert line.split("  ")[-1].strip() in {"yes", "no"}
    assert "netfilter counts no open connections of a backend" in shown.stdout
    rows = json.loads(ebpfproxy("check", "--capabilities", "-o", "json").stdout)
    limits = {row["name"]: row["limits"] for row in rows}
    assert set(limits["lc"]) <= {"nftables", "iptables"}
    assert "bpf" in limits["retry"]


def test_help_and_docs_name_every_exit_status() -> None:
    for text in (parser.build().format_help(), (ROOT / "docs/cli.md").read_text()):
        assert all(f" {code.value} " in text for code in ExitCode)


def test_docs_name_every_configuration_field() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    ours = {field.encode_name for field in msgspec.structs.fields(config._Extras)}
    assert not [field for field in sorted(config._USED | ours) if f"`{field}`" not in text]


# --- formats


class Row(msgspec.Struct, frozen=True):
    name: str
    ports: tuple[int, ...]
    note: str = ""


ROWS = [Row("a", (80, 443)), Row("b", (), "wide only")]
COLUMNS: list[Column[Row]] = [
    Column("NAME", lambda row: row.name),
    Column("PORTS", lambda row: row.ports),
    Column("NOTE", lambda row: row.note, is_wide=True),
]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("table", "NAME    PORTS\na       80,443\nb       -\n"),
        ("wide", "NAME    PORTS    NOTE\na       80,443   -\nb       -        wide only\n"),
        (
            "yaml",
            "- name: a\n  ports:\n  - 80\n  - 443\n  note: ''\n- name: b\n  ports: []\n  note: wide only\n",
        ),
    ],
)
def test_show(style: str, expected: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.show(ROWS, COLUMNS, style, empty="nothing")
    sys.stdout.flush()
    text = capfdbinary.readouterr().out.decode()
    assert [line.split() for line in text.splitlines()] == [line.split() for line in expected.splitlines()]


def test_json_has_all_fields_whatever_the_table_shows(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output.show(ROWS, COLUMNS, "json", empty="nothing")
    sys.stdout.flush()
    assert json.loads(capfdbinary.readouterr().out) == [
        {"name": "a", "ports": [80, 443], "note": ""},
        {"name": "b", "ports": [], "note": "wide only"},
    ]


def test_no_rows_are_a_sentence_for_people_and_an_empty_list_for_programs(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    output.show([], COLUMNS, "table", empty="no rows yet")
    sys.stderr.flush()
    assert capfdbinary.readouterr() == (b"", b"no rows yet\n")
    output.show([], COLUMNS, "json", empty="no rows yet")
    sys.stdout.flush()
    assert capfdbinary.readouterr() == (b"[]\n", b"")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (10800, "3h00m"),
        (90000, "1d01h"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert output.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1.0KiB"), (1536, "1.5KiB"), (2**20, "1.0MiB"), (2**41, "2.0TiB")],
)
def test_size(value: int, text: str) -> None:
    assert output.size(value) == text


# --- filters

NAMES = ["default/web:http", "default/web:https", "default/webshop", "prod/web:http", "prod/db"]


@pytest.mark.parametrize(
    ("namespace", "name", "expected"),
    [
        (None, None, NAMES),
        ("prod", None, ["prod/web:http", "prod/db"]),
        (None, "web", ["default/web:http", "default/web:https", "prod/web:http"]),
        (None, "web:http", ["default/web:http", "prod/web:http"]),
        (None, "default/web", ["default/web:http", "default/web:https"]),
        (None, "default/web:https", ["default/web:https"]),
        ("prod", "web", ["prod/web:http"]),
        ("prod", "default/web", []),
        (None, "w.b", []),
        ("pro", None, []),
    ],
)
def test_service_filter(namespace: str | None, name: str | None, expected: Sequence[str]) -> None:
    assert list(filter(nouns.service_filter(namespace, name), NAMES)) == expected


# --- commands that need no kernel


def test_version() -> None:
    for arguments in (["version"], ["--version"]):
        result = ebpfproxy(*arguments)
        assert (result.returncode, result.stdout) == (0, "ebpfproxy 0.1.0\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_knows_every_command(shell: str) -> None:
    script = ebpfproxy("completion", shell)
    assert script.returncode == ExitCode.OK
    assert all(command in script.stdout for command in COMMANDS)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script.stdout, text=True, check=True)


def test_nothing_programmed_is_a_sentence_and_exit_status_3(tmp_path: Path) -> None:
    for noun in ("services", "backends", "connections", "affinity", "stats", "maps"):
        result = ebpfproxy(noun, "--bpffs", tmp_path)
        assert result.returncode == ExitCode.NOTHING, noun
        assert result.stdout == ""
        assert result.stderr.startswith("ebpfproxy: nothing is programmed")
        assert result.stderr.count("\n") == 1


def test_status_without_an_agent(tmp_path: Path) -> None:
    result = ebpfproxy("status", "--state-dir", tmp_path, "--bpffs", tmp_path, "-o", "json")
    assert result.returncode == ExitCode.NOTHING
    assert json.loads(result.stdout) == {"is_running": False, "verdicts": None}


def test_status_of_an_agent_that_was_killed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    said = status.Status(
        pid=ended.pid,
        version="0.1.0",
        state="running",
        node="n1",
        mode="bpf",
        manifests="/m",
        cgroup="/c",
        bpffs=str(tmp_path),
        started="2026-01-01T00:00:00Z",
        problems=("map services is full",),
    )
    status.write(tmp_path, said)
    result = ebpfproxy("status", "--state-dir", tmp_path)
    assert result.returncode == ExitCode.NOTHING
    assert "not running" in result.stdout
    assert "map services is full" in result.stdout


SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: redis-master}
spec:
  clusterIP: 10.96.0.11
  ports: [{port: 6379}]
"""


def test_validate_examples() -> None:
    result = ebpfproxy("validate", "--config", ROOT / "examples/config/dual-stack.yaml", ROOT / "examples")
    assert (result.returncode, result.stdout) == (0, "9 objects in 4 files: no problems\n")


def test_validate_names_file_object_and_field(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(SERVICE.replace("6379", "66379") + "---\na: [")
    (tmp_path / "good.yaml").write_text(SERVICE)
    broken = ebpfproxy("validate", tmp_path)
    assert broken.returncode == ExitCode.FAILED
    assert "bad.yaml, line " in broken.stdout
    file.write_text(SERVICE.replace("6379", "66379"))
    result = ebpfproxy("validate", file, "-o", "json")
    assert result.returncode == ExitCode.FAILED
    report = json.loads(result.stdout)
    assert (report["files"], report["objects"]) == (1, 1)
    assert len(report["problems"]) == 1
    assert all(
        part in report["problems"][0] for part in (str(file), "default/redis-master", "spec.ports[0].port")
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("modus: bpf", "configuration FILE: Object contains unknown field `modus`"),
        ("ebpfproxy: {loadBalancerPools: [everywhere]}", "load-balancer pool 'everywhere': "),
    ],
)
def test_validate_refuses_a_wrong_configuration_file(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{line}\n")
    result = ebpfproxy("validate", "--config", file, ROOT / "examples")
    assert result.returncode == ExitCode.USAGE
    assert result.stderr.startswith("ebpfproxy: " + message.replace("FILE", str(file)))


def test_validate_of_what_is_not_there(tmp_path: Path) -> None:
    result = ebpfproxy("validate", tmp_path / "missing")
    assert result.returncode == ExitCode.FAILED
    assert result.stderr == f"ebpfproxy: validate {tmp_path}/missing: there is no such file or directory\n"


def test_env(tmp_path: Path) -> None:
    """The variables of SERVICES' own example: service redis-master, port 6379 (Kubernetes, Service)."""
    (tmp_path / "redis.yaml").write_text(SERVICE)
    result = ebpfproxy("env", "default", "--manifests", tmp_path, "--state-dir", tmp_path / "state")
    assert result.returncode == ExitCode.OK
    assert sorted(result.stdout.splitlines()) == [
        "REDIS_MASTER_PORT=tcp://10.96.0.11:6379",
        "REDIS_MASTER_PORT_6379_TCP=tcp://10.96.0.11:6379",
        "REDIS_MASTER_PORT_6379_TCP_ADDR=10.96.0.11",
        "REDIS_MASTER_PORT_6379_TCP_PORT=6379",
        "REDIS_MASTER_PORT_6379_TCP_PROTO=tcp",
        "REDIS_MASTER_SERVICE_HOST=10.96.0.11",
        "REDIS_MASTER_SERVICE_PORT=6379",
    ]
    other = ebpfproxy("env", "prod", "--manifests", tmp_path, "--state-dir", tmp_path / "state", "-o", "json")
    assert (other.returncode, other.stdout) == (ExitCode.NOTHING, "{}\n")


def test_env_tells_allocated_addresses_only(tmp_path: Path) -> None:
    """A Service that the agent has given no address has no variables; one with an allocated one has."""
    manifests, state = tmp_path / "manifests", tmp_path / "state"
    manifests.mkdir()
    state.mkdir()
    (manifests / "redis.yaml").write_text(SERVICE.replace("  clusterIP: 10.96.0.11\n", ""))
    arguments = ("env", "default", "--manifests", manifests, "--state-dir", state)
    assert ebpfproxy(*arguments).returncode == ExitCode.NOTHING
    (state / "allocations.json").write_text('{"default/redis-master": {"clusterIPs": ["10.96.77.7"]}}')
    assert "REDIS_MASTER_SERVICE_HOST=10.96.77.7" in ebpfproxy(*arguments).stdout.splitlines()


# --- ends


def test_reader_of_a_pipe_may_leave(tmp_path: Path) -> None:
    """``ebpfproxy ... | head -1`` says nothing on standard error."""
    for number in range(400):
        (tmp_path / f"{number}.yaml").write_text("a: [")
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "ebpfproxy", "validate", tmp_path], stdout=write, stderr=subprocess.PIPE
    ) as process:
        os.close(write)
        os.read(read, 1)
        os.close(read)
        assert process.stderr
        assert process.stderr.read() == b""


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ebpfproxy.cli.version.run", interrupted)
    assert main(["version"]) == ExitCode.INTERRUPTED


@pytest.mark.parametrize("module", ["nouns", "explain", "status"])
def test_reading_commands_import_little(module: str) -> None:
    """They answer in under 0.3 s: netlink (0.15 s) and YAML are for others."""
    code = f"import sys, ebpfproxy.cli.main, ebpfproxy.cli.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pyroute2", "yaml", "scapy", "bcc", "shtab", "asyncio"} & set(loaded)


# --- on a node: the real agent's maps


@pytest.fixture(scope="module")
def agent(nothing_left: None) -> Iterator[Agent]:
    """An agent that serves ``examples/`` on a node of its own, to one client that has asked."""
    with Topology(pod_count=1) as net, name_servers([("pod1", net.pods[0].place)], 8080, 8081):
        made = Agent(net, arguments=["--config", str(ROOT / "examples/config/dual-stack.yaml")])
        for file in (ROOT / "examples").glob("*.yaml"):
            shutil.copy(file, made.manifests)
        # Only pod1 runs: whoever asks must be given it.
        made.write_text("web.yaml", (made.manifests / "web.yaml").read_text().replace("0.12]", "0.11]"))
        made.write_text("web.yaml", (made.manifests / "web.yaml").read_text().replace("0.13]", "0.11]"))
        with made, Probe(net.from_outside) as probe:
            assert probe.tcp("192.0.2.1", 30080, 3) == {"pod1": 3}
            yield made


ROWS_OF = {
    "services": {"default/web:http", "10.96.0.10:80", "*:30080", "[fd00:10:96::20]:80"},
    "backends": {"default/shop:metrics", "10.244.0.12:8081", "[fd00:244::11]:8080"},
    "connections": {"default/web:http", "192.0.2.1:30080", "10.244.0.11:8080"},
    "stats": {"default/web:http", "IPv4"},
    "maps": {"conntrack", "262144"},
    "status": {"running", "eth0", "libbpf"},
}


@pytest.mark.netns
@pytest.mark.parametrize(("noun", "expected"), ROWS_OF.items(), ids=ROWS_OF)
def test_noun_in_every_format(agent: Agent, noun: str, expected: set[str]) -> None:
    arguments: list[str | Path] = [noun, "--bpffs", agent.net.bpffs]
    if noun == "status":
        arguments += ["--state-dir", agent.state_dir]
    for style in ("table", "wide"):
        text = agent.cli(*arguments, "-o", style).stdout
        assert not [word for word in expected if word not in text], text
    rows = json.loads(agent.cli(*arguments, "-o", "json").stdout)
    again = documents.read("answer.yaml", agent.cli(*arguments, "-o", "yaml").stdout.encode())[0]
    if noun in ("services", "backends"):
        assert again == rows
    assert len(again) == len(rows)


@pytest.mark.netns
def test_filters(agent: Agent) -> None:
    def names(*arguments: str) -> set[str]:
        return {row["name"] for row in agent.rows("services", *arguments)}

    assert names() == {"default/hello", "default/shop:http", "default/shop:metrics", "default/web:http"}
    assert names("shop") == {"default/shop:http", "default/shop:metrics"}
    assert names("-n", "default", "shop:http") == {"default/shop:http"}
    assert names("--protocol", "udp") == set()
    assert names("-n", "nowhere") == set()
    backends = {row["service"] for row in agent.rows("backends", "shop:metrics")}
    assert backends == {"default/shop:metrics"}
    connections = {row["service"] for row in agent.rows("connections", "default/web")}
    assert connections == {"default/web:http"}
    assert agent.rows("connections", "shop") == []
    for wanted, count in (
        (("--vip", "192.0.2.1"), 3),
        (("--vip", "192.0.2.1:30080", "--backend", "10.244.0.11"), 3),
        (("--vip", "192.0.2.1:30081"), 0),
        (("--backend", "10.244.0.11:8080", "--kind", "forwarded", "--protocol", "tcp"), 3),
        (("--kind", "socket"), 0),
        (("--state", "new"), 0),
        (("--client", "192.0.2.1"), 0),
    ):
        assert len(agent.rows("connections", *wanted)) == count, wanted
    first, *others = (row["client"] for row in agent.rows("connections"))
    assert [row["client"] for row in agent.rows("connections", "--client", first)] == [first]
    assert len(agent.rows("connections", "--client", first.rpartition(":")[0])) == 1 + len(others)
    unknown = agent.cli("backends", "nothing", "--bpffs", agent.net.bpffs, check=False)
    assert unknown.returncode == ExitCode.NOTHING
    assert unknown.stderr.startswith("ebpfproxy: no Service nothing is programmed")


@pytest.mark.netns
def test_explain(agent: Agent) -> None:
    def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
        return agent.cli("explain", *arguments, "--bpffs", agent.net.bpffs, check=False)

    web = explain("10.96.0.10:80", "--from", "192.0.2.100")
    assert web.returncode == ExitCode.OK
    assert "external traffic: frontend 10.96.0.10:80/TCP (ClusterIP) of default/web:http" in web.stdout
    assert "10.244.0.11:8080" in web.stdout
    hello = json.loads(explain("[fd00:10:96::20]:80/tcp", "-o", "json").stdout)
    assert {each["service"] for each in hello["matches"]} == {"default/hello"}
    assert [each["backend"] for each in hello["matches"][0]["candidates"]] == [
        "[fd00:244::11]:8080",
        "[fd00:244::12]:8080",
    ]
    both = explain("10.96.0.10:80").stdout.splitlines()
    assert "internal and external traffic: frontend 10.96.0.10:80/TCP (ClusterIP) of default/web:http" in both
    assert (both[-2].index("CANDIDATE"), both[-1].index("10.244.")) == (2, 2)
    loopback = json.loads(explain("127.0.0.1:30080", "-o", "json").stdout)
    assert [each["scope"] for each in loopback["matches"]] == ["internal"], "never from outside"
    assert explain("10.96.0.10:81").returncode == ExitCode.NOTHING
    assert explain("203.0.113.1:80").returncode == ExitCode.NOTHING


@pytest.mark.netns
def test_check_on_a_node(agent: Agent) -> None:
    result = agent.cli("check", "--state-dir", agent.state_dir, "-o", "json")
    report = json.loads(result.stdout)
    usable = {each["name"]: not each["reason"] for each in report["dataplanes"]}
    assert tuple(usable) == modes.names()
    assert usable["bpf"]
    assert all(each["ok"] for each in report["features"] if each["required"])


@pytest.mark.netns
def test_reading_goes_on_without_the_agent_and_cleanup_ends_it(nothing_left: None) -> None:
    with Topology(pod_count=1) as net:
        agent = Agent(net)
        shutil.copy(ROOT / "examples/web.yaml", agent.manifests)
        cleanup = ("cleanup", "--state-dir", agent.state_dir, "--bpffs", net.bpffs)
        with agent:
            refused = agent.cli(*cleanup, check=False)
            assert refused.returncode == ExitCode.FAILED
            assert "in use" in refused.stderr
            agent.kill()
            assert [row["name"] for row in agent.rows("services")] == ["default/web:http"]
            status = agent.cli("status", "--state-dir", agent.state_dir, "--bpffs", net.bpffs, check=False)
            assert status.returncode == ExitCode.NOTHING
            assert "not running" in status.stdout
            (agent.state_dir / "notes.txt").write_text("somebody else's")
            (net.bpffs / "others").mkdir()
            assert "removed pin" in agent.cli(*cleanup).stdout
            assert [path.name for path in agent.state_dir.iterdir()] == ["notes.txt"]
            assert not (net.bpffs / "ebpfproxy").exists()
            assert (net.bpffs / "others").exists()
            assert agent.cli(*cleanup).stdout == "there was nothing to remove\n"
