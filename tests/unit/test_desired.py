"""Rows that are made from what the agent wants of the dataplane."""

from __future__ import annotations

from ebpfproxy.cli import desired
from ebpfproxy.model.services import Backend, Policy, Readiness
from makers import node_port, service, state

ELSEWHERE = Backend("10.244.1.1", 8080)
ENDING_HERE = Backend("10.244.0.1", 8080, Readiness.TERMINATING, is_local=True)


def test_a_backend_is_used_whoever_may_get_it() -> None:
    """Clients outside get the ending one of this node (policy Local), all others the ready one."""
    wanted = state(
        service(backends=[ELSEWHERE, ENDING_HERE], frontends=[node_port()], external_policy=Policy.LOCAL)
    )
    assert [row.is_usable for row in desired.backends(wanted)] == [True, True]
    (row,) = desired.services(wanted)
    assert (row.backends_usable, row.backends_total) == (2, 2)
