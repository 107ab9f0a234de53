"""The iptables dataplane's rules, against those that kube-proxy's own tests publish, and their changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

import makers
from ebpfproxy.dataplane.iptables import features
from ebpfproxy.dataplane.iptables.render import (
    JUMPS,
    Context,
    Host,
    Renderer,
    balance,
    context_of,
    host_of,
    render_service,
)
from ebpfproxy.dataplane.iptables.unsupported import unsupported
from ebpfproxy.diff import Delta, diff
from ebpfproxy.errors import DataplaneError
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
from ebpfproxy.xtables import names, probe
from ebpfproxy.xtables.chains import (
    Chain,
    Edit,
    Saved,
    comment,
    edit,
    has_jump,
    parse,
    removal,
    target,
    transaction,
)
from ebpfproxy.xtables.programmer import Programmer
from ebpfproxy.xtables.tool import Tool
from makers import cluster_ip, external_ip, load_balancer, node_port, state

if TYPE_CHECKING:
    from ebpfproxy.model.services import Frontend, Service

REJECT, DROP = Pool(()), Pool((), Empty.DROP)
CONTEXT = Context(local_sources=("10.0.0.0/8",), masquerades_outside=True)
HOST = Host(serving=(), serves_everywhere=True, has_localhost=True, has_random_fully=False)
NAT = {
    "SVC1": "KUBE-SVC-XPGD46QRK7WJZT7O",
    "SEP1": "KUBE-SEP-SXIVWICOYRO3J4NJ",
}


def service(
    number: int, *ends: str, port: int = 80, external: tuple[Frontend, ...] = (), **more: Any
) -> Service:
    """Return nsN/svcN:p80 as the published rules have it."""
    frontends = (cluster_ip(f"172.30.0.4{number}"), *external)
    return makers.service(
        f"ns{number}/svc{number}:p80", [Backend(each, port) for each in ends], frontends, **more
    )


PUBLISHED = (
    service(1, "10.180.0.1"),
    service(
        2,
        "10.180.0.2",
        external=(
            external_ip("192.168.99.22"),
            load_balancer("1.2.3.4"),
            node_port(3001),
        ),
        external_policy=Policy.LOCAL,
        health_check_node_port=30000,
    ),
    service(3, "10.180.0.3", external=(node_port(3003),)),
    service(4, "10.180.0.4", "10.180.0.5", external=(external_ip("192.168.99.33"),)),
    service(
        5,
        "10.180.0.3",
        external=(load_balancer("5.6.7.8"), node_port(3002)),
        source_ranges=("203.0.113.0/25",),
        has_source_ranges=True,
        affinity_s=10800,
    ),
    service(6),
)


def _published() -> dict[str, list[str]]:
    """Return the rules of each chain, named "table chain"."""
    found: dict[str, list[str]] = {}
    table = ""
    for line in Path(__file__).with_name("kube_proxy_rules.txt").read_text().splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            found.setdefault(f"{table} {chain}", []).append(rule)
    return found


RULES = _published()
#: Where we differ: kube-proxy answers a SYN with an ICMP error, of which the kernel sends one a second.
RULES["filter KUBE-SERVICES"] = [f"{rule} --reject-with tcp-reset" for rule in RULES["filter KUBE-SERVICES"]]
CHAINS = Renderer().chains(PUBLISHED, CONTEXT, HOST)


@pytest.mark.parametrize("chain", RULES)
def test_rules_are_kube_proxys(chain: str) -> None:
    assert list(CHAINS[Chain(*chain.split())]) == RULES[chain]


def test_chains_are_kube_proxys() -> None:
    more = {
        *("KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SVC-GNZBNJ2PO5MGZ6GT", "KUBE-SVC-X27LE4BHSL4DOUIK"),
        *("KUBE-SEP-SXIVWICOYRO3J4NJ", "KUBE-SEP-RS4RBKLTHTF2IUXJ", "KUBE-SEP-OYPFS5VJICHGATKP"),
        "KUBE-SEP-C6EBXVWJJZMIWKLZ",
    }
    assert {" ".join(chain) for chain in CHAINS} == {*RULES, *(f"nat {name}" for name in more)}


@pytest.mark.parametrize(
    ("scheduler", "weights", "shares"),
    [
        # 1/3, 1/2 and the rest, in kube-proxy's ten digits
        ("random", (1, 1, 1), ["random --probability 0.3333333333", "random --probability 0.5000000000", ""]),
        ("random", (1, 9, 1), ["random --probability 0.0909090909", "random --probability 0.9000000000", ""]),
        ("wrr", (2, 1, 1), ["random --probability 0.5000000000", "random --probability 0.5000000000", ""]),
        ("rr", (1, 1, 1), ["nth --every 3 --packet 0", "nth --every 2 --packet 0", ""]),
        ("random", (1,), [""]),
    ],
)
def test_shares(scheduler: str, weights: tuple[int, ...], shares: list[str]) -> None:
    backends = tuple(Backend(f"10.0.0.{n}", 80, weight=weight) for n, weight in enumerate(weights))
    made = service(1, scheduler=Scheduler(scheduler), cluster=Pool(backends))
    found = balance(made, made.cluster, Context(is_large=True))
    modes = [rule.partition("--mode ")[2].partition(" -j ")[0] for rule in found]
    assert modes == shares
    assert all("comment" not in rule for rule in found)


def test_policies() -> None:
    near, far = Backend("10.180.0.1", 80, is_local=True), Backend("10.180.0.2", 80)
    internal = service(1, cluster=Pool((near, far)), local=Pool((near,)), internal_policy=Policy.LOCAL)
    own = render_service(internal, CONTEXT).own
    assert [chain.name for chain in own] == ["KUBE-SVL-XPGD46QRK7WJZT7O", names.of_backend(internal, near)]
    none_here = service(1, cluster=Pool((far,)), local=DROP, internal_policy=Policy.LOCAL)
    (rule,) = render_service(none_here, CONTEXT).shared[Chain("filter", "KUBE-SERVICES")]
    assert rule.endswith("-j DROP")
    assert "has no local endpoints" in rule


def test_source_ranges_of_the_other_family_only_let_nobody_in() -> None:
    guarded = service(1, "10.0.0.1", external=(load_balancer("5.6.7.8"),), has_source_ranges=True)
    part = render_service(guarded, CONTEXT)
    assert [rule for rule in part.own[Chain("nat", names.of_service("FW", guarded))] if " -j " in rule] == []
    assert part.shared[Chain("filter", "KUBE-PROXY-FIREWALL")][0].endswith("-d 5.6.7.8 --dport 80 -j DROP")


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({"masquerades_all": True}, ["-j KUBE-MARK-MASQ"]),
        (
            {"masquerades_outside": True, "local_sources": ("10.0.0.0/8",)},
            ["! -s 10.0.0.0/8 -j KUBE-MARK-MASQ"],
        ),
        (
            {"masquerades_outside": True, "local_sources": ("10.0.0.0/24", "10.0.1.0/24")},
            ["-j KUBE-MARK-OUTSIDE"],
        ),
        ({"masquerades_outside": True}, []),
        ({"local_sources": ("10.0.0.0/8",)}, []),
    ],
)
def test_masquerade_of_cluster_ip_clients(more: dict[str, object], ends: list[str]) -> None:
    chains = Renderer().chains([PUBLISHED[0]], Context(**more), HOST)  # type: ignore[arg-type]
    rules = chains[Chain("nat", NAT["SVC1"])][:-1]
    assert [rule.partition("--dport 80 ")[2] for rule in rules] == ends
    if ends == ["-j KUBE-MARK-OUTSIDE"]:
        assert chains[Chain("nat", "KUBE-MARK-OUTSIDE")] == (
            *("-s 10.0.0.0/24 -j RETURN", "-s 10.0.1.0/24 -j RETURN"),
            "-j KUBE-MARK-MASQ",
        )


@pytest.mark.parametrize(
    ("serving", "local", "allows_localhost", "rules"),
    [
        ("192.0.2.1 127.0.0.1", "", True, ["-m addrtype --dst-type LOCAL"]),
        (
            "192.0.2.1 127.0.0.1",
            "",
            False,
            ["-m addrtype --dst-type LOCAL ! -d 127.0.0.0/8"],
        ),
        ("192.0.2.1", "192.0.2.2 127.0.0.1", True, ["-d 192.0.2.1"]),
        ("127.0.0.1", "192.0.2.1", True, ["-d 127.0.0.1"]),
        (
            "2001:db8::1 ::1",
            "fe80::1",
            True,
            ["-m addrtype --dst-type LOCAL ! -d ::1/128"],
        ),
        ("", "192.0.2.1", True, []),
    ],
)
def test_node_port_addresses(serving: str, local: str, allows_localhost: bool, rules: list[str]) -> None:
    family = 6 if ":" in serving else 4
    addresses = state(serving=serving, local=local).addresses
    host = host_of(addresses, family, has_random_fully=True, allows_localhost=allows_localhost)
    found = Renderer().chains([], Context(family=family), host)[Chain("nat", "KUBE-SERVICES")]
    assert [rule.partition('chain" ')[2].removesuffix(" -j KUBE-NODEPORTS") for rule in found] == rules


def test_renderer_works_out_what_changed_only() -> None:
    renderer = Renderer()
    before = renderer.chains(PUBLISHED, CONTEXT, HOST)
    ends = PUBLISHED[3].backends[:1]
    fourth = msgspec.structs.replace(PUBLISHED[3], backends=ends, cluster=Pool(ends))
    changed = (*PUBLISHED[:3], fourth, *PUBLISHED[4:])
    delta = diff(before, renderer.chains(changed, CONTEXT, HOST))
    assert [chain.name for chain in delta.upsert] == ["KUBE-SVC-4SW47YFZTEDKD3PK"]
    assert [chain.name for chain in delta.delete] == ["KUBE-SEP-C6EBXVWJJZMIWKLZ"]


def test_context() -> None:
    wanted = state(
        local="127.0.0.1 192.0.2.1 2001:db8::1",
        local_sources=frozenset({"10.1.0.0/16", "fd00::/64"}),
        masquerades_all=True,
    )
    found = context_of(wanted, 4, mark=1 << 14, is_large=False, has_recent=True)
    assert found == Context(4, "0x4000", True, False, ("10.1.0.0/16",), ("192.0.2.1",))


class TestTransaction:
    A, B = Chain("nat", "KUBE-SEP-A"), Chain("nat", "KUBE-SVC-B")
    TOP = Chain("nat", "KUBE-SERVICES")

    def test_one_table_is_one_commit(self) -> None:
        text = transaction(Delta({self.TOP: ("-j KUBE-SVC-B",), self.B: ()}, [self.A]), JUMPS[-1:])
        assert text.splitlines() == [
            "*nat",
            ":KUBE-SVC-B - [0:0]",
            ":KUBE-SERVICES - [0:0]",
            ":KUBE-SEP-A - [0:0]",
            "-A KUBE-SERVICES -j KUBE-SVC-B",
            '-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
            "-X KUBE-SEP-A",
            "COMMIT",
        ]

    def test_many_chains_come_in_an_order_that_is_complete_at_every_moment(self) -> None:
        some = {
            Chain("nat", f"KUBE-{kind}-{n}"): () for n in range(3) for kind in ("SVC", "SEP", "FW", "EXT")
        }
        text = transaction(Delta({self.TOP: (), **some}, [self.A, self.B]), block=4)
        blocks = [part.split() for part in text.split("COMMIT") if part.strip()]
        kinds = [[line.split("-")[1] for line in block if line.startswith(":")] for block in blocks]
        assert [kind for block in kinds[:3] for kind in block] == [
            *["SEP"] * 3,
            *["SVC"] * 3,
            *["EXT"] * 3,
            *["FW"] * 3,
        ]
        assert kinds[3:] == [["SERVICES"], ["SEP", "SVC"], []], "what goes is emptied, then deleted"
        assert [line for line in blocks[-1] if line.startswith("KUBE")] == ["KUBE-SEP-A", "KUBE-SVC-B"]

    def test_no_chain_goes_that_another_leads_to(self) -> None:
        """Played through, as the kernel refuses it."""
        leads = {f"KUBE-{kind}-{n}": f"KUBE-{to}-{n}" for n in range(6) for kind, to in
                 (("EXT", "SVC"), ("SVC", "SEP"))}  # fmt: skip
        names = sorted({*leads, *leads.values()})
        for line in transaction(Delta({}, [Chain("nat", name) for name in names]), block=4).splitlines():
            if line.startswith(":"):
                leads.pop(line.split()[0][1:], None)
            elif line.startswith("-X"):
                name = line.split()[1]
                assert name not in leads
                assert name not in leads.values()
                names.remove(name)
        assert not names

    def test_nothing_to_do(self) -> None:
        assert transaction(Delta({}, [])) == ""

    @pytest.mark.parametrize(
        ("have", "want", "change"),
        [
            (("a", "b"), ("b", "c"), Edit(["c"], ["a"])),
            (("a", "b"), ("b", "a"), Edit([], [])),
            (("a", "a"), ("a",), Edit([], ["a"])),
            (("a",), ("a", f'"NOTE: {"this must be the last rule in this chain"}"'), None),
            ((), tuple(map(str, range(100))), None),
        ],
    )
    def test_edit(self, have: tuple[str, ...], want: tuple[str, ...], change: Edit | None) -> None:
        assert edit(have, want) == change


# What iptables-save prints, of kube-proxy, of kubelet and of others.
SAVED = parse(
    """*nat
:PREROUTING ACCEPT [5:300]
:POSTROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SEP-SXIVWICOYRO3J4NJ - [0:0]
:CNI-HOSTPORT - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "not -j KUBE-SERVICES" -j CNI-HOSTPORT
-A CNI-HOSTPORT -s 10.0.0.1/32 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -j KUBE-SEP-SXIVWICOYRO3J4NJ
COMMIT
"""
)


def test_reading_what_the_tool_prints() -> None:
    assert target(SAVED.rules[1]) == "CNI-HOSTPORT"
    assert comment(SAVED.rules[0]) == "kubernetes service portals"
    there = next(jump for jump in JUMPS if jump.source == "PREROUTING")
    assert has_jump(SAVED, there)
    assert not has_jump(SAVED, there._replace(source="OUTPUT"))


def test_removal_leaves_what_is_others() -> None:
    doomed = [Chain("nat", name) for name in SAVED.chains if names.is_of_proxy(name)]
    plan = removal({"nat": SAVED, "filter": Saved(frozenset(), ())}, doomed)
    assert plan.chains == [Chain("nat", "KUBE-SEP-SXIVWICOYRO3J4NJ"), Chain("nat", "KUBE-SERVICES")]
    assert plan.kept == [Chain("nat", "KUBE-MARK-MASQ")]
    assert plan.rules == {"nat": [SAVED.rules[0]]}


def test_what_led_to_a_chain_does_not_keep_it_when_it_is_written_anew() -> None:
    """A switch from mode iptables to ipvs: KUBE-SERVICES stays, and leads to no endpoint any more."""
    gone = Chain("nat", "KUBE-SEP-SXIVWICOYRO3J4NJ")
    assert removal({"nat": SAVED}, [gone]).kept == [gone]
    plan = removal({"nat": SAVED}, [gone], rewritten=[Chain("nat", "KUBE-SERVICES")])
    assert (plan.chains, plan.kept, plan.rules) == ([gone], [], {})


def test_unsupported_names_what_is_not_done() -> None:
    wanted = state(
        service(1, scheduler=Scheduler.MAGLEV),
        service(2, affinity_s=60),
        service(3, protocol=Protocol.SCTP),
        service(4, family=6, external=(node_port(3001),)),
        serving="::1",
    )
    good = unsupported(wanted, families=frozenset({4, 6}), has_affinity=True, has_sctp=True)
    assert [text.partition(": ")[0] for text in good] == [
        "scheduler maglev",
        "sessionAffinity",
        "NodePorts do not answer on ::1, for IPv6 has no route_localnet",
    ]
    bad = unsupported(wanted, families=frozenset({4}), has_affinity=False, has_sctp=False)
    assert [text.partition(": ")[0] for text in bad] == [
        "IPv6 is not served, as ip6tables can't be used",
        "scheduler maglev",
        "sessionAffinity",
        "SCTP is not served, as the kernel has no match sctp",
        "NodePorts do not answer on ::1, for IPv6 has no route_localnet",
    ]


class RefusingTool:
    """Stands for iptables: takes everything, or nothing."""

    variant, family, name = "nft", 4, "iptables-nft"

    def __init__(self) -> None:
        self.refuses = False

    def save(self, table: str) -> Saved:
        return Saved(frozenset(), ())

    def restore(self, text: str) -> None:
        if self.refuses:
            raise DataplaneError("no")


def test_rules_are_counted_by_table() -> None:
    tool = RefusingTool()
    programmer = Programmer(cast("Tool", tool), "iptables")
    chains = {Chain("nat", "KUBE-A"): ("-j B", "-j C"), Chain("filter", "KUBE-D"): ("-j E",)}
    programmer.apply(chains, ())
    assert programmer.totals() == {"mangle": 1, "filter": 2, "nat": 3} == programmer.written
    programmer.apply(chains | {Chain("nat", "KUBE-A"): ("-j B",)}, ())
    assert programmer.totals() == {"mangle": 1, "filter": 2, "nat": 2}
    assert programmer.written == {"mangle": 0, "filter": 0, "nat": 1}
    tool.refuses = True
    with pytest.raises(DataplaneError):
        programmer.apply({}, ())
    assert programmer.failures == 1


class Lacking(Tool):
    """Tools on a kernel that lacks some matches."""

    def try_apart(self, text: str, setup: str = "") -> str:
        assert not setup
        return "no such match" if re.search(r"-m (recent|sctp) ", text) else ""


def test_what_the_kernel_lacks_is_found_by_trying() -> None:
    tool = Lacking(4, "nft")
    assert features.problems(tool, features.lacking(tool)) == [
        "no sessionAffinity: ClientIP: the kernel, or iptables-nft, lacks the match recent",
        "no SCTP: the kernel, or iptables-nft, lacks the match sctp",
    ]
    assert probe.missing(tool, features.REQUIRED) == []
