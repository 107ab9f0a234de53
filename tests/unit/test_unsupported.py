"""What the BPF dataplane says it does not do."""

from __future__ import annotations

import msgspec
import pytest

from ebpfproxy.dataplane.bpf.dataplane import unsupported
from ebpfproxy.model.services import Backend, DesiredState, Policy, Protocol, Service
from makers import cluster_ip, load_balancer, node_port, service

HERE, THERE = Backend("10.1.0.1", 80, is_local=True), Backend("10.1.0.2", 80)
PLAIN = service("web", [HERE, THERE], [cluster_ip("10.96.0.1")])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (PLAIN, None),
        (service("web", [HERE], [node_port(30080)]), None),
        (service("web", [HERE, THERE], [node_port(30080)], external_policy=Policy.LOCAL), None),
        (service("web", [THERE], [node_port(30080)]), None),
        (service("web", [HERE], [cluster_ip("10.96.0.1")], protocol=Protocol.SCTP), "SCTP"),
        (service("web", [], [cluster_ip("10.96.0.1")]), None),
        (
            service("web", [HERE], [load_balancer("192.0.2.9")], source_ranges=("10.0.0.0/8",)),
            "left to the real load balancer",
        ),
        (msgspec.structs.replace(PLAIN, health_check_node_port=32000), None),
    ],
)
def test_one_sentence_that_names_the_service(wanted: Service, words: str | None) -> None:
    sentences = unsupported(DesiredState((wanted,)))
    if words is None:
        assert sentences == []
    else:
        (sentence,) = sentences
        assert words in sentence
        assert "default/web" in sentence


def test_many_services_are_counted() -> None:
    many = tuple(
        service(f"s{n}", [HERE], [cluster_ip(f"10.96.0.{n}")], protocol=Protocol.SCTP) for n in range(1, 6)
    )
    (sentence,) = unsupported(DesiredState(many))
    assert "default/s1, default/s2, default/s3 and 2 more" in sentence
