"""What is removed of kube-proxy's, decided from what the tools say; tests/netns/test_takeover.py does it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane.kube_proxy import (
    VirtualServer,
    established,
    nft_script,
    node_ports,
    removal,
    virtual_servers,
)
from ebpfproxy.xtables.chains import parse

if TYPE_CHECKING:
    from ebpfproxy.xtables.chains import Saved

FILES = Path(__file__).resolve().parents[1] / "netns/kube_proxy"


def saved(*chains: str, rules: str = "", table: str = "nat") -> dict[str, Saved]:
    """Return a table with these chains, beside the kernel's own."""
    made = "".join(f":{name} - [0:0]\n" for name in chains)
    text = f"*{table}\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n{made}{rules}COMMIT\n"
    return {table: parse(text)}


def tables(text: str) -> dict[str, Saved]:
    """Return the tables in the text of iptables-save."""
    return {
        name: parse(body)
        for name, body in re.findall(r"^\*(\w+)\n(.*?)^COMMIT", text, re.MULTILINE | re.DOTALL)
    }


def test_nothing_of_kube_proxys() -> None:
    text = saved("KUBE-ROUTER-INPUT", "CNI-X", rules="-A PREROUTING -j KUBE-ROUTER-INPUT\n")
    assert removal(text) == ("", (), ())
    assert removal({}) == ("", (), ())


def test_the_transaction() -> None:
    rules = (
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
        "-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -j KUBE-SVC-CDGGSHYLG3RE2FKL\n"
    )
    found = removal(saved("KUBE-SERVICES", "KUBE-SVC-CDGGSHYLG3RE2FKL", rules=rules))
    assert found.chains == ("nat KUBE-SERVICES", "nat KUBE-SVC-CDGGSHYLG3RE2FKL")
    assert found.text == (
        "*nat\n"
        ":KUBE-SERVICES - [0:0]\n"  # empties the chain
        ":KUBE-SVC-CDGGSHYLG3RE2FKL - [0:0]\n"
        '-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
        "-X KUBE-SERVICES\n"
        "-X KUBE-SVC-CDGGSHYLG3RE2FKL\n"
        "COMMIT\n"
    )


@pytest.mark.parametrize(
    ("table", "chain", "is_ours"),
    [
        ("nat", "KUBE-SVC-CDGGSHYLG3RE2FKL", True),
        ("nat", "KUBE-XLB-CDGGSHYLG3RE2FKL", True),  # before 1.24
        ("nat", "KUBE-SVC-CDGGSHYLG3RE2FK", False),
        ("nat", "KUBE-SVC-CDGGSHYLG3RE2FK1", False),  # 1 is no digit of base32
        ("nat", "KUBE-SEP-MINE", False),
        ("nat", "KUBE-MARK-DROP", False),  # kubelet's, until 1.27
        ("nat", "KUBE-FIREWALL", True),  # of mode ipvs, until 1.27
        ("filter", "KUBE-FIREWALL", False),  # kubelet's
        ("filter", "KUBE-FORWARD", True),
        ("mangle", "KUBE-PROXY-CANARY", True),
        ("mangle", "KUBE-KUBELET-CANARY", False),
        ("filter", "KUBE-NWPLCY-CDGGSHYLG3RE2FKL", False),
        ("filter", "KUBE-POD-FW-CDGGSHYLG3RE2FKL", False),
        ("raw", "KUBE-SERVICES", False),
    ],
)
def test_whose_a_chain_is(table: str, chain: str, is_ours: bool) -> None:
    assert removal(saved(chain, table=table)).chains == ((f"{table} {chain}",) if is_ours else ())


def test_comments_are_no_targets() -> None:
    text = saved(
        "KUBE-SERVICES", rules='-A OUTPUT -m comment --comment "not \\" -j KUBE-SERVICES" -j ACCEPT\n'
    )
    assert "-D" not in removal(text).text


def test_what_others_use_stays_and_works() -> None:
    rules = (
        "-A PREROUTING -j KUBE-SERVICES\n"
        "-A OUTPUT -j KUBE-POSTROUTING\n"
        "-A CNI-HOSTPORT-SETMARK -m comment --comment portmap -j KUBE-MARK-MASQ\n"
        "-A KUBE-SERVICES -j KUBE-MARK-MASQ\n"
    )
    names = ("CNI-HOSTPORT-SETMARK", "KUBE-MARK-MASQ", "KUBE-POSTROUTING", "KUBE-SERVICES")
    found = removal(saved(*names, rules=rules))
    assert found.chains == ("nat KUBE-SERVICES",)
    assert found.kept == (
        "nat KUBE-MARK-MASQ (used by CNI-HOSTPORT-SETMARK)",
        "nat KUBE-POSTROUTING (used by CNI-HOSTPORT-SETMARK)",
    )
    assert "-D OUTPUT" not in found.text
    assert "-X KUBE-MARK-MASQ" not in found.text


def test_every_chain_of_the_ipvs_mode_goes() -> None:
    found = removal(tables((FILES / "ipvs-iptables.txt").read_text()))
    assert found.kept == ()
    assert set(found.chains) == {
        *(f"filter KUBE-{name}" for name in ("FORWARD", "IPVS-FILTER", "IPVS-OUT-FILTER", "NODE-PORT")),
        *("filter KUBE-PROXY-FIREWALL", "filter KUBE-SOURCE-RANGES-FIREWALL"),
        *(
            f"nat KUBE-{name}"
            for name in ("LOAD-BALANCER", "MARK-MASQ", "NODE-PORT", "POSTROUTING", "SERVICES")
        ),
    }


def test_many_chains_go_in_blocks_and_nothing_leads_to_one_that_goes() -> None:
    """Played through: a kernel refuses to delete a chain that is not empty or that a rule leads to."""
    names = [f"KUBE-SVC-{number:016}".replace("0", "A").replace("1", "B").replace("8", "C").replace("9", "D")
             for number in range(1000)]  # fmt: skip
    assert len(set(names)) > 600
    rules = {"PREROUTING": ["KUBE-SERVICES"], "KUBE-SERVICES": names}
    lines = "".join(f"-A {chain} -j {to}\n" for chain, goals in rules.items() for to in goals)
    left = {chain: set(goals) for chain, goals in rules.items()} | {name: set() for name in names}
    for line in removal(saved("KUBE-SERVICES", *set(names), rules=lines)).text.splitlines():
        if line.startswith(":"):
            left[line.split()[0][1:]] = set()
        elif line.startswith("-D"):
            left[line.split()[1]].remove(line.split()[-1])
        elif line.startswith("-X"):
            assert not left.pop(line.split()[1])
            assert line.split()[1] not in {to for goals in left.values() for to in goals}
    assert left == {"PREROUTING": set()}


def test_nft_tables() -> None:
    tables = [("ip", "kube-proxy"), ("inet", "kube-proxy"), ("ip6", "nat"), ("ip6", "kube-proxy")]
    assert nft_script(tables) == "delete table ip kube-proxy\ndelete table ip6 kube-proxy\n"
    assert nft_script([("ip", "nat")]) == ""


# ipvsadm(8): --save --numeric prints what --restore reads.
IPVS = """\
-A -t 10.96.0.10:80 -s rr
-a -t 10.96.0.10:80 -r 10.244.0.11:8080 -m -w 1
-A -u 10.96.0.53:53 -s rr
-A -t 192.0.2.1:30080 -s rr
-A -t 192.0.2.7:443 -s wlc -p 300
-A -t [fd00:96::a]:80 -s rr
-A --sctp-service 192.0.2.1:30081 -s rr
-A -f 7 -s rr
"""
OURS = [
    VirtualServer("-t", "10.96.0.10", 80),
    VirtualServer("-u", "10.96.0.53", 53),
    VirtualServer("-t", "192.0.2.1", 30080),
    VirtualServer("-t", "fd00:96::a", 80),
    VirtualServer("--sctp-service", "192.0.2.1", 30081),
]


def test_virtual_servers() -> None:
    ports = node_ports((FILES / "ipvs-sets.txt").read_text())
    assert ports == {("TCP", 30080), ("SCTP", 30081)}
    vips = frozenset(("10.96.0.10", "10.96.0.53", "fd00:96::a"))
    assert virtual_servers(IPVS, vips, ports) == OURS, "those of keepalived, say, stay"
    assert [str(each) for each in OURS[2:4]] == ["192.0.2.1:30080", "[fd00:96::a]:80"]


def test_established_connections() -> None:
    """The format is that of ip_vs_conn_seq_show in Linux' net/netfilter/ipvs/ip_vs_conn.c."""
    text = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0A00000A D431 0A60000A 0050 0AF4000B 1F90 ESTABLISHED     899
TCP 0A00000A D432 0A60000A 0050 0AF4000B 1F90 TIME_WAIT        60
TCP 0A00000A D433 C0000207 01BB 0AF4000B 1F90 ESTABLISHED     899
TCP [fd00:0244:0000:0000:0000:0000:0000:0014] D431 [fd00:0096:0000:0000:0000:0000:0000:000a] 0050 \
[fd00:0244:0000:0000:0000:0000:0000:0011] 1F90 ESTABLISHED     899
"""
    assert established(text, OURS) == 2
