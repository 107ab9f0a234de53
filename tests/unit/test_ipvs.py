"""What the ipvs dataplane makes of Services: virtual servers, destinations, addresses, sets and rules."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import makers
from ebpfproxy.dataplane.ipvs import sets as rules
from ebpfproxy.dataplane.ipvs.dataplane import sysctls
from ebpfproxy.dataplane.ipvs.render import Context, Renderer, context_of, render_service
from ebpfproxy.dataplane.ipvs.unsupported import unsupported
from ebpfproxy.diff import diff
from ebpfproxy.model.services import (
    Backend,
    Empty,
    Frontend,
    Policy,
    Pool,
    Protocol,
    Scheduler,
    Service,
)
from ebpfproxy.netlink.ipvs import Server
from ebpfproxy.xtables import sets
from ebpfproxy.xtables.chains import Chain
from ebpfproxy.xtables.sets import Entry, Kind
from makers import cluster_ip, external_ip, load_balancer, node_port, state

if TYPE_CHECKING:
    from pathlib import Path

    from ebpfproxy.model.services import Frontend, Service
    from rig.kernel import Netns

HERE, FAR = Backend("10.244.0.1", 8080, is_local=True), Backend("10.244.1.1", 8080, weight=3)
CONTEXT = Context(frozenset({"192.0.2.1", "203.0.113.9", "127.0.0.1"}), ("192.0.2.1",))


CLUSTER_IP = cluster_ip()


def service(*frontends: Frontend, name: str = "web:http", **more: Any) -> Service:
    return makers.service(name, (HERE, FAR), (CLUSTER_IP, *frontends), **more)


def shown(made: Service, context: Context = CONTEXT) -> list[str]:
    """Return what ``ipvsadm -Sn`` would say."""
    part = render_service(made, context)
    flags = {6: "-t", 17: "-u", 132: "--sctp-service"}
    return [
        *(
            f"-A {flags[s.protocol]} {s.address}:{s.port} -s {each.scheduler}"
            + (f" -p {each.timeout_s}" if each.flags & 1 else "")
            + (" -b mh-port" if each.flags & 0x10 else "")
            for s, each in part.servers.items()
        ),
        *(
            f"-a {flags[d.server.protocol]} {d.server.address}:{d.server.port} -r {d.address}:{d.port} -w {w}"
            for d, w in part.destinations.items()
        ),
    ]


class Row(NamedTuple):
    what: str
    service: Service
    shown: list[str]


ONE = "-t 10.96.0.10:80"
TO_BOTH = [f"-a {ONE} -r 10.244.0.1:8080 -w 1", f"-a {ONE} -r 10.244.1.1:8080 -w 3"]
ROWS = [
    Row("kube-proxy's default is rr", service(), [f"-A {ONE} -s rr", *TO_BOTH]),
    *(
        Row(f"scheduler {name}", service(scheduler=Scheduler(name)), [f"-A {ONE} -s {name}", *TO_BOTH])
        for name in ("rr", "wrr", "lc", "wlc", "dh", "sh", "sed", "nq")
    ),
    Row(
        "maglev is mh",
        service(scheduler=Scheduler.MAGLEV),
        [f"-A {ONE} -s mh -b mh-port", *TO_BOTH],
    ),
    Row("affinity is persistence", service(affinity_s=10800), [f"-A {ONE} -s rr -p 10800", *TO_BOTH]),
    Row(
        "internal policy Local",
        service(internal_policy=Policy.LOCAL),
        [f"-A {ONE} -s rr", TO_BOTH[0]],
    ),
    Row(
        "internal policy Local, none here",
        service(internal_policy=Policy.LOCAL, local=Pool((), Empty.DROP)),
        [f"-A {ONE} -s rr"],
    ),
    Row("no endpoints", service(cluster=Pool(()), local=Pool(())), [f"-A {ONE} -s rr"]),
    Row(
        "a NodePort, on the node's addresses",
        service(node_port()),
        [
            f"-A {ONE} -s rr",
            "-A -t 192.0.2.1:30080 -s rr",
            *TO_BOTH,
            "-a -t 192.0.2.1:30080 -r 10.244.0.1:8080 -w 1",
            "-a -t 192.0.2.1:30080 -r 10.244.1.1:8080 -w 3",
        ],
    ),
    Row(
        "UDP and external policy Local",
        service(external_ip("203.0.113.5"), protocol=Protocol.UDP, external_policy=Policy.LOCAL),
        [
            "-A -u 10.96.0.10:80 -s rr",
            "-A -u 203.0.113.5:80 -s rr",
            *(line.replace("-t", "-u") for line in TO_BOTH),
            "-a -u 203.0.113.5:80 -r 10.244.0.1:8080 -w 1",
        ],
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_virtual_servers(row: Row) -> None:
    assert shown(row.service) == row.shown


def test_a_scheduler_that_only_ipvs_has() -> None:
    context = Context(default_scheduler=Scheduler.RANDOM, further_scheduler="lblcr")
    assert shown(service(), context)[0].endswith("-s lblcr")
    assert shown(service(scheduler=Scheduler.RR), context)[0].endswith("-s rr")


LB = load_balancer("203.0.113.7")
#: kube-proxy's sets; hash:ip,port and so on as ipset prints them.
ENTRIES = [
    (service(), ["KUBE-LOOP-BACK 10.244.0.1,tcp:8080,10.244.0.1", "KUBE-CLUSTER-IP 10.96.0.10,tcp:80"]),
    (service(external_ip("203.0.113.5")), ["KUBE-EXTERNAL-IP 203.0.113.5,tcp:80"]),
    (
        service(external_ip("203.0.113.5"), external_policy=Policy.LOCAL),
        ["KUBE-EXTERNAL-IP-LOCAL 203.0.113.5,tcp:80"],
    ),
    (service(LB), ["KUBE-LOAD-BALANCER 203.0.113.7,tcp:80"]),
    (
        service(LB, external_policy=Policy.LOCAL),
        ["KUBE-LOAD-BALANCER 203.0.113.7,tcp:80", "KUBE-LOAD-BALANCER-LOCAL 203.0.113.7,tcp:80"],
    ),
    (
        service(LB, external_policy=Policy.LOCAL, local=Pool((), Empty.DROP)),
        [
            "KUBE-LOAD-BALANCER 203.0.113.7,tcp:80",
            "KUBE-LOAD-BALANCER-LOCAL 203.0.113.7,tcp:80",
            "KUBE-NO-LOCAL-EXTERNAL 203.0.113.7,tcp:80",
        ],
    ),
    (
        service(internal_policy=Policy.LOCAL, local=Pool((), Empty.DROP)),
        ["KUBE-NO-LOCAL-INTERNAL 10.96.0.10,tcp:80"],
    ),
    (service(node_port()), ["KUBE-NODE-PORT-TCP 30080"]),
    (
        service(node_port(), external_policy=Policy.LOCAL, protocol=Protocol.UDP),
        ["KUBE-NODE-PORT-UDP 30080", "KUBE-NODE-PORT-LOCAL-UDP 30080"],
    ),
    (
        service(node_port(), protocol=Protocol.SCTP),
        ["KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30080"],
    ),
    (service(health_check_node_port=30123), ["KUBE-HEALTH-CHECK-NODE-PORT 30123"]),
    (
        service(LB, source_ranges=("198.51.100.7/32", "0.0.0.0/0"), has_source_ranges=True),
        [
            "KUBE-LOAD-BALANCER 203.0.113.7,tcp:80",
            "KUBE-LOAD-BALANCER-FW 203.0.113.7,tcp:80",
            "KUBE-LOAD-BALANCER-SOURCE-CIDR 203.0.113.7,tcp:80,198.51.100.7",
            "KUBE-LOAD-BALANCER-SOURCE-CIDR 203.0.113.7,tcp:80,0.0.0.0/1",
            "KUBE-LOAD-BALANCER-SOURCE-CIDR 203.0.113.7,tcp:80,128.0.0.0/1",
            "KUBE-LOAD-BALANCER-SOURCE-IP 203.0.113.7,tcp:80,203.0.113.7",
        ],
    ),
]


@pytest.mark.parametrize(("made", "entries"), ENTRIES)
def test_entries(made: Service, entries: list[str]) -> None:
    part = render_service(made, CONTEXT)
    found = [f"{each.set} {each.text}" for each in part.entries]
    usual = {f"KUBE-CLUSTER-IP 10.96.0.10,{made.protocol.lower()}:80"}
    usual.add(f"KUBE-LOOP-BACK 10.244.0.1,{made.protocol.lower()}:8080,10.244.0.1")
    assert sorted({*found} - usual) == sorted({*entries} - usual)
    assert usual <= {*found}


def test_a_node_outside_of_the_source_ranges_is_barred() -> None:
    part = render_service(service(LB, source_ranges=("198.51.100.0/24",), has_source_ranges=True), CONTEXT)
    assert part.barred == ("-s 203.0.113.7 -m ipvs --vaddr 203.0.113.7 --vproto tcp --vport 80",)


def test_vips_are_addresses_of_the_device_but_for_the_nodes_own() -> None:
    found = Renderer().render([service(external_ip("203.0.113.5"), external_ip("203.0.113.9"))], CONTEXT)
    assert set(found.addresses) == {"10.96.0.10", "203.0.113.5"}
    assert Entry("KUBE-IPVS-IPS", "203.0.113.5") in found.entries
    assert Entry("KUBE-IPVS-IPS", "203.0.113.9") not in found.entries


def test_a_change_costs_what_changed() -> None:
    renderer = Renderer()
    other = makers.service("other", [HERE, FAR], [cluster_ip("10.96.0.11")])
    before = renderer.render([service(), other], CONTEXT)
    after = renderer.render([service(cluster=Pool((FAR,))), other], CONTEXT)
    assert not diff(before.servers, after.servers)
    delta = diff(before.destinations, after.destinations)
    assert not delta.upsert
    assert [(each.server, each.address) for each in delta.delete] == [
        (Server(6, "10.96.0.10", 80), "10.244.0.1")
    ]


def test_context_has_no_loopback_node_ports() -> None:
    assert context_of(state(serving="192.0.2.1 127.0.0.1 ::1")).node_port_addresses == ("192.0.2.1",)


class TestRules:
    FIRM = rules.Firm(4, "0x4000", False, False, (), False, ())

    def services(self, *filled: str, **more: object) -> list[str]:
        firm = self.FIRM._replace(**more)  # type: ignore[arg-type]
        return list(rules.rules(firm, filled)[Chain("nat", "KUBE-SERVICES")])

    def test_without_services(self) -> None:
        assert self.services() == [
            "-s 127.0.0.0/8 -j RETURN",
            "-m addrtype --dst-type LOCAL -j KUBE-NODE-PORT",
        ]

    @pytest.mark.parametrize(
        ("more", "end"),
        [
            ({}, "src,dst -j KUBE-MARK-MASQ"),
            ({"masquerades_all": True}, "dst,dst -j KUBE-MARK-MASQ"),
            (
                {"masquerades_outside": True, "local_sources": ("10.244.0.0/16",)},
                "dst,dst ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ",
            ),
            (
                {"masquerades_outside": True, "local_sources": ("10.244.0.0/24", "10.244.1.0/24")},
                "dst,dst -j KUBE-MARK-OUTSIDE",
            ),
        ],
    )
    def test_cluster_ip(self, more: dict[str, object], end: str) -> None:
        """As kube-proxy's own ipvs mode writes them."""
        start = (
            '-m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" '
            "-m set --match-set KUBE-CLUSTER-IP "
        )
        found = self.services(rules.CLUSTER_IP, **more)
        assert found[1] == start + end
        assert found[-1] == "-m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT"

    def test_external_traffic(self) -> None:
        chains = rules.rules(self.FIRM, [rules.LOAD_BALANCER, rules.LOAD_BALANCER_LOCAL, "NODE-PORT-TCP"])
        goals = [rule.rpartition("-j ")[2] for rule in chains[Chain("nat", "KUBE-LOAD-BALANCER")]]
        assert goals == ["RETURN", "KUBE-MARK-MASQ"]
        comment = "Kubernetes nodeport TCP port for masquerade purpose"
        match = "-m set --match-set KUBE-NODE-PORT-TCP dst"
        (rule,) = chains[Chain("nat", "KUBE-NODE-PORT")]
        assert rule == f'-p tcp -m comment --comment "{comment}" {match} -j KUBE-MARK-MASQ'

    def test_ipv6_has_sets_of_its_own(self) -> None:
        firm = self.FIRM._replace(family=6)
        (rule,) = rules.rules(firm, [rules.LOAD_BALANCER_FW])[Chain("filter", "KUBE-PROXY-FIREWALL")]
        assert "--match-set KUBE-6-LOAD-BALANCER-FW dst,dst -j KUBE-SOURCE-RANGES-FIREWALL" in rule

    def test_what_listens_on_every_address_does_not_answer_on_vips(self) -> None:
        chain = rules.rules(self.FIRM, [])[Chain("filter", "KUBE-IPVS-FILTER")]
        assert chain[-1] == "-m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT"

    def test_every_chain_is_known_to_cleanup(self) -> None:
        from ebpfproxy.xtables.names import is_of_proxy

        assert all(is_of_proxy(chain.name) for chain in rules.rules(self.FIRM, rules.NAMES))


def test_ipset_script() -> None:
    delta = diff({Entry("KUBE-A", "10.0.0.1"): None}, {Entry("KUBE-A", "10.0.0.2"): None})
    kinds = [("KUBE-A", Kind("hash:ip", 4)), ("KUBE-B", Kind("bitmap:port", 6))]
    added, deleted = sets.script(kinds, delta)
    assert added.splitlines() == [
        "create KUBE-A hash:ip family inet hashsize 1024 maxelem 65536 -exist",
        "create KUBE-B bitmap:port range 0-65535 -exist",
        "add KUBE-A 10.0.0.2 -exist",
    ]
    assert deleted == "del KUBE-A 10.0.0.1 -exist\n"
    saved = "create KUBE-A hash:ip family inet\nadd KUBE-A 10.0.0.1\nadd OTHER 10.0.0.2\n"
    assert list(sets.parse(saved, {"KUBE-A"})) == [Entry("KUBE-A", "10.0.0.1")]


@pytest.mark.parametrize(
    ("release", "reuse"), [("4.19.0-27-amd64", "0"), ("5.8.1", "0"), ("5.10.0", None), ("6.1.0", None)]
)
def test_sysctls(release: str, reuse: str | None) -> None:
    wanted = sysctls(has_strict_arp=False, release=release)
    assert wanted.get("net/ipv4/vs/conn_reuse_mode") == reuse
    assert "net/ipv4/conf/all/arp_ignore" not in wanted
    assert sysctls(has_strict_arp=True, release=release)["net/ipv4/conf/all/arp_announce"] == "2"


def test_unsupported() -> None:
    wanted = state(
        service(node_port(), external_policy=Policy.LOCAL), service(name="six", family=6), serving="127.0.0.1"
    )
    assert [text.partition(": ")[0] for text in unsupported(wanted, frozenset({4}))] == [
        "IPv6 is not served, as ip6tables can't be used",
        "externalTrafficPolicy Local",
        "NodePorts do not answer on 127.0.0.1 and ::1",
    ]


# Runs in a namespace and a process of its own: makes every set and rule, reads them back, removes them.
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/unit"]
from test_ipvs import CONTEXT, ENTRIES, TestRules
from ebpfproxy.dataplane.ipvs import cleanup, sets as rules
from ebpfproxy.dataplane.ipvs.render import render_service
from ebpfproxy.diff import diff
from ebpfproxy.sysctl import Ledger
from ebpfproxy.xtables import sets
from ebpfproxy.xtables.programmer import Programmer
from ebpfproxy.xtables.tool import Tool
directory, variant = Path(sys.argv[1]), sys.argv[2]
for family in (4, 6):
    kinds = rules.kinds(family)
    wanted = {e: None for made, _ in ENTRIES for e in render_service(made, CONTEXT).entries if e.set in kinds}
    sets.restore(sets.script(kinds.items(), diff({}, wanted))[0])
    assert not diff(sets.save(list(kinds)), wanted)
    programmer = Programmer(Tool(family, variant), "ipvs")
    local = ("10.0.0.0/8", "11.0.0.0/8") if family == 4 else ("fd00::/64",)
    firm = TestRules.FIRM._replace(family=family, masquerades_outside=True, local_sources=local)
    programmer.apply(rules.rules(firm, rules.NAMES), rules.JUMPS)
    assert programmer.is_intact()
assert cleanup.cleanup(directory / "ledger") == [], "where the mode never ran it is kube-proxy's"
Ledger(directory / "ledger").mark()
print(len(cleanup.cleanup(directory / "ledger")), len(cleanup.cleanup(directory / "ledger")))
"""


@pytest.mark.root
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_the_kernel_takes_every_set_and_rule(netns: Netns, tmp_path: Path, variant: str) -> None:
    done = netns.place().run(sys.executable, "-c", SCRIPT, tmp_path, variant)
    # Three tables and two families, and 17 sets of kube-proxy's and two of ours in each.
    assert done.stdout.split() == [str(2 * 3 + 2 * 19), "0"]
    assert "KUBE" not in netns.place().run(f"iptables-{variant}-save").stdout
