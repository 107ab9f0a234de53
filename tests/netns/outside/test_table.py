"""Every row of services.yaml, over TCP and UDP, IPv4 and IPv6, with XDP and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rig import kernel
from rig.cluster import CLIENT_IPS, OTHER_CLIENT_IPS

from . import table

if TYPE_CHECKING:
    from .conftest import World
    from .table import Case, Row

pytestmark = [pytest.mark.root, pytest.mark.netns]

#: A SYN is sent again after 1 s (RFC 6298 2.1): what is refused earlier was refused at once.
AT_ONCE_S = 0.9
#: Long enough for an answer that nobody should send.
LOST_S = 0.2


def rows() -> list[object]:
    return [
        pytest.param(
            *(case, row, family, transport),
            id=f"{case.name}-{row.source}-{row.target}-v{'46'[family]}-{transport}",
        )
        for case in table.read()
        for row in case.rows
        for family in (0, 1)
        for transport in case.transports
    ]


@pytest.mark.parametrize(("case", "row", "family", "transport"), rows())
def test_row(world: World, case: Case, row: Row, family: int, transport: str) -> None:
    address, port = case.address(row.target, world.cluster, family)
    is_second = row.source == "client2"
    probe = world.probe("client" if is_second else row.source)
    # The client's own choice of address is the first one.
    bind = (OTHER_CLIENT_IPS[family], 0) if is_second else None
    if row.source == "client":
        bind = (CLIENT_IPS[family], 0)

    def ask(count: int, *, connect: bool = False) -> list[str]:
        if transport == "tcp":
            return probe.answers(address, port, count, bind)
        return probe.udp_answers(address, port, count, connect=connect, bind=bind)

    if row.outcome == "answered":
        # Three times around.
        answers = ask(3 * len(row.answers))
        assert table.readable(answers, table.owners(world.cluster, family)) == row.answers
    elif row.outcome == "refused":
        is_socket = row.source.startswith("node-") or row.source.endswith("+")
        errors = (ConnectionRefusedError, *([kernel.REFUSED] if is_socket else []))
        with probe.impatient(AT_ONCE_S), pytest.raises(errors):
            ask(1, connect=True)
    else:
        with probe.impatient(LOST_S), pytest.raises(TimeoutError):
            ask(1)
