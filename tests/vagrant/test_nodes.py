"""Two nodes with kernels of their own, and a client: run by vagrant/test, which makes them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane import capabilities
from rig.probe import Load, Probe, more
from rig.wait import eventually

from .machines import SLOW_S, SSH_CONFIG, Machine
from .manifests import CLIENT_IPS, DIRECT_PORT, LOCAL_PORT, NODES, PODS, WEB_IPS, WEB_PORT, node_ips

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.vagrant,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not SSH_CONFIG, reason="run by `make vagrant-test`"),
]

MACHINES = {name: Machine(name=name) for name in (*NODES, "client")}
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
BOTH = pytest.mark.parametrize("node", NODES)
ALL = set(PODS)
#: One more takes a quarter of an hour where processors are emulated.
MODES = os.environ.get("EBPFPROXY_MODES", "bpf").split(",")


def pods_of(node: str) -> set[str]:
    return {pod for pod, where in PODS.items() if where == node}


@pytest.fixture(scope="module")
def client() -> Iterator[Probe]:
    with Probe(MACHINES["client"]) as probe:
        yield probe


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Have both nodes serve in a mode; for another one than before the agent is restarted."""
    name: str = request.param
    for node in NODES:
        MACHINES[node].shell(
            f"""
            grep -q '^mode: {name}$' /etc/ebpfproxy/config.yaml && exit
            sed -i 's/^mode: .*/mode: {name}/' /etc/ebpfproxy/config.yaml
            systemctl restart ebpfproxy
            """
        )
        said = MACHINES[node].shell("ebpfproxy status -o json")
        assert f'"mode": "{name}"' in said, said
    return name


def across_nodes(mode: str) -> None:
    """Skip what needs source translation where the mode has none."""
    reason = capabilities.limit(mode, "snat")
    if reason:
        pytest.skip(f"{mode}: {reason}")


@FAMILIES
@BOTH
def test_node_port_leads_to_the_pods_of_both_nodes(client: Probe, mode: str, node: str, family: int) -> None:
    across_nodes(mode)
    address = node_ips(node)[family]
    assert set(client.tcp(address, WEB_PORT, 12)) == ALL
    assert set(client.udp(address, WEB_PORT, 12)) == ALL


@FAMILIES
@BOTH
def test_direct_server_return_shows_the_client_to_the_pods_of_both_nodes(
    client: Probe, mode: str, node: str, family: int
) -> None:
    reason = capabilities.limit(mode, "dsr")
    if reason:
        pytest.skip(f"{mode}: {reason}")
    answers = [answer.split(" ") for answer in client.answers(node_ips(node)[family], DIRECT_PORT, 12)]
    assert {name for name, _ in answers} == ALL
    assert {source for _, source in answers} == {CLIENT_IPS[family]}


@FAMILIES
@BOTH
def test_policy_local_keeps_the_node_and_the_client_address(
    client: Probe, mode: str, node: str, family: int
) -> None:
    answers = [answer.split(" ") for answer in client.answers(node_ips(node)[family], LOCAL_PORT, 6)]
    assert {name for name, _ in answers} == pods_of(node)
    if not capabilities.limit(mode, "client-address-local"):
        assert {source for _, source in answers} == {CLIENT_IPS[family]}


@FAMILIES
@BOTH
def test_cluster_ip_from_a_node_and_from_its_pods(mode: str, node: str, family: int) -> None:
    address = WEB_IPS[family] if not family else f"[{WEB_IPS[family]}]"
    ask = f"for n in {{1..12}}; do curl -gsS --max-time 20 http://{address}/; done"
    pod = min(pods_of(node))
    for where in ("", f"ip netns exec {pod} "):
        said = MACHINES[node].shell(f"{where}bash -c '{ask}'")
        assert {line.split(" ")[0] for line in said.splitlines()} == ALL, where or "node"


@pytest.fixture
def loads(client: Probe, mode: str) -> Iterator[list[Load]]:
    """Requests over new connections, over a kept one, and over UDP, through node 2 to its own pods."""
    with ExitStack() as stack:
        made = [
            stack.enter_context(
                client.load(node_ips("node-2")[family], LOCAL_PORT, mode=kind, workers=1, pause_s=0.05)
            )
            for family, kind in [(0, "new"), (1, "keep"), (1, "new"), (0, "udp")]
        ]
        yield made
        # Their ends assert that no request failed.


@pytest.mark.parametrize("how", ["restart", "kill --signal=KILL"])
def test_agent_restarts_and_nothing_notices(loads: list[Load], how: str) -> None:
    more(loads, 10)
    before = MACHINES["node-2"].shell("systemctl show --property MainPID ebpfproxy")
    MACHINES["node-2"].shell(f"systemctl {how} ebpfproxy")
    eventually(
        lambda: "ActiveState=active\n" in (said := MACHINES["node-2"].shell(
            "systemctl show --property ActiveState,MainPID ebpfproxy"
        )) and before not in said,
        "the agent to be back",
        timeout_s=SLOW_S,
        every_s=2,
    )  # fmt: skip
    more(loads, 10)


def test_node_reboots(client: Probe, mode: str) -> None:
    """Its endpoints are taken out before; through the other node no request fails. Then it serves again."""
    first, second = MACHINES["node-1"], MACHINES["node-2"]
    boot = second.boot_id()
    assert boot
    first.set_endpoints(pods_of("node-1"))
    through = node_ips("node-1")[0]
    wait_for(client, through, WEB_PORT, pods_of("node-1"))
    with client.load(through, WEB_PORT, workers=1, pause_s=0.05) as load:
        second.run("systemctl", "reboot", check=False, timeout_s=SLOW_S)
        eventually(lambda: second.boot_id() not in ("", boot), "node 2 to boot", timeout_s=900, every_s=5)
        assert set(load.more(30)) == pods_of("node-1")

    wait_for(client, node_ips("node-2")[0], LOCAL_PORT, pods_of("node-2"))
    assert not second.shell("systemctl list-units --failed --plain --no-legend")
    first.set_endpoints(PODS)
    if not capabilities.limit(mode, "snat"):
        wait_for(client, through, WEB_PORT, ALL)


def wait_for(client: Probe, address: str, port: int, pods: set[str]) -> None:
    """Wait until exactly these pods answer."""

    def answer() -> bool:
        try:
            return set(client.tcp(address, port, 12)) == pods
        except OSError:
            return False

    with client.impatient(5):
        eventually(answer, f"{sorted(pods)} to answer at {address} port {port}", timeout_s=900, every_s=1)
