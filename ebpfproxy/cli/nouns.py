"""The commands that list rows: services, backends, connections, affinity, stats, maps.

They read the pinned maps. Where another mode than bpf serves, services and backends ask the running agent.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from ebpfproxy.cli import desired, pins
from ebpfproxy.cli.exit_codes import ExitCode, NothingError
from ebpfproxy.cli.output import Column, seconds, show, size
from ebpfproxy.dataplane.bpf import stats as counted
from ebpfproxy.dataplane.bpf import view
from ebpfproxy.errors import ConfigError
from ebpfproxy.model.addresses import endpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from ebpfproxy.dataplane.rows import AffinityRow, BackendRow, ServiceRow
    from ebpfproxy.model.services import DesiredState

T = TypeVar("T")


def services(arguments: argparse.Namespace) -> ExitCode:
    """List the ports of Services."""
    columns: list[Column[ServiceRow]] = [
        Column("SERVICE", lambda row: row.name),
        Column("TYPE", lambda row: row.kinds),
        Column("PROTOCOL", lambda row: row.protocol),
        Column("FAMILY", lambda row: f"IPv{row.family}", is_wide=True),
        Column("FRONTENDS", lambda row: row.frontends),
        Column("BACKENDS", lambda row: f"{row.backends_usable}/{row.backends_total}"),
        Column("SCHEDULER", lambda row: row.scheduler, is_wide=True),
        Column("AFFINITY", lambda row: seconds(row.affinity_s) if row.affinity_s else "", is_wide=True),
        Column("OPEN", lambda row: row.open),
        Column("CONNECTIONS", lambda row: row.connections),
        Column("REFUSED", lambda row: row.refused, is_wide=True),
    ]
    return _list(arguments, view.services, columns, "no Services are programmed", desired.services)


def backends(arguments: argparse.Namespace) -> ExitCode:
    """List backends."""
    columns: list[Column[BackendRow]] = [
        Column("SERVICE", lambda row: row.service),
        Column("PROTOCOL", lambda row: row.protocol),
        Column("BACKEND", lambda row: endpoint(row.address, row.port)),
        Column("STATE", lambda row: row.state),
        Column("USED", lambda row: "yes" if row.is_usable else "no"),
        Column("EJECTED", lambda row: seconds(row.ejected_s) if row.ejected_s else ""),
        Column("WEIGHT", lambda row: row.weight),
        Column("LOCAL", lambda row: "yes" if row.is_local else "no", is_wide=True),
        Column("HINT", lambda row: "elsewhere" if row.is_hinted_elsewhere else "", is_wide=True),
        Column("OPEN", lambda row: row.open),
        Column("CONNECTIONS", lambda row: row.connections),
        Column("ID", lambda row: row.id, is_wide=True),
    ]
    return _list(arguments, view.backends, columns, "no Service has backends", desired.backends)


def connections(arguments: argparse.Namespace) -> ExitCode:
    """List flows and sockets that are translated."""
    columns: list[Column[view.ConnectionRow]] = [
        Column("SERVICE", lambda row: row.service),
        Column("KIND", lambda row: row.kind),
        Column("PROTOCOL", lambda row: row.protocol),
        Column("CLIENT", lambda row: row.client),
        Column("SOURCE", lambda row: row.source),
        Column("VIP", lambda row: row.vip),
        Column("BACKEND", lambda row: row.backend),
        Column("STATE", lambda row: row.state),
        Column("IDLE", lambda row: seconds(row.idle_s)),
    ]
    wanted = {
        name: getattr(arguments, name)
        for name in ("client", "vip", "backend", "state", "kind")
        if getattr(arguments, name)
    }

    def read(maps: view.Maps, chosen: view.Chosen | None) -> list[view.ConnectionRow]:
        rows = view.connections(maps, chosen)
        return [row for row in rows if all(_is(getattr(row, name), text) for name, text in wanted.items())]

    empty = "nothing matches" if wanted else "no connections are open"
    return _list(arguments, read, columns, empty)


def _is(found: str, wanted: str) -> bool:
    """Return whether a value is the wanted one; an address is wanted with any port."""
    return wanted in (found, found.rpartition(":")[0].strip("[]"))


def stats(arguments: argparse.Namespace) -> ExitCode:
    """List what was counted of Services, backends or verdicts."""
    if arguments.of == "verdicts":
        columns: list[Column[view.VerdictRow]] = [
            Column("VERDICT", lambda row: row.verdict),
            Column("PACKETS", lambda row: row.count),
            Column("BYTES", lambda row: row.bytes),
        ]
        if arguments.service or arguments.namespace or arguments.protocol:
            raise ConfigError("stats --verdicts: verdicts are counted for the node, not for a Service")
        with pins.maps_for(arguments) as opened:
            show(view.verdicts(opened), columns, arguments.output, empty="there are no verdicts")
        return ExitCode.OK
    if arguments.of == "backends":
        of_backends: list[Column[counted.BackendStatsRow]] = [
            Column("SERVICE", lambda row: row.service),
            Column("PROTOCOL", lambda row: row.protocol),
            Column("BACKEND", lambda row: endpoint(row.address, row.port)),
            Column("OPEN", lambda row: row.open, is_wide=True),
            Column("CONNECTIONS", lambda row: row.connections),
            *_TRAFFIC,
        ]
        return _list(arguments, counted.backends, of_backends, "no Service has backends")
    of_services: list[Column[counted.ServiceStatsRow]] = [
        Column("SERVICE", lambda row: row.service),
        Column("PROTOCOL", lambda row: row.protocol),
        Column("FAMILY", lambda row: f"IPv{row.family}"),
        Column("CONNECTIONS", lambda row: row.connections),
        Column("REFUSED", lambda row: row.refused),
        Column("RETRIED", lambda row: row.retried),
        Column("EJECTED", lambda row: row.ejected, is_wide=True),
        *_TRAFFIC,
    ]
    return _list(arguments, counted.services, of_services, "no Services are programmed")


_TRAFFIC: list[Column[Any]] = [
    Column("PACKETS", lambda row: row.packets),
    Column("BYTES", lambda row: row.bytes),
    Column("REPLY-PACKETS", lambda row: row.reply_packets),
    Column("REPLY-BYTES", lambda row: row.reply_bytes),
]


def affinity(arguments: argparse.Namespace) -> ExitCode:
    """List clients that go back to their backend."""
    columns: list[Column[AffinityRow]] = [
        Column("SERVICE", lambda row: row.service),
        Column("CLIENT", lambda row: row.client),
        Column("BACKEND", lambda row: row.backend),
        Column("IDLE", lambda row: seconds(row.idle_s)),
        Column("EXPIRES", lambda row: seconds(row.expires_s)),
    ]
    return _list(arguments, view.affinity, columns, "no client is bound to a backend")


def maps(arguments: argparse.Namespace) -> ExitCode:
    """List the BPF maps."""
    columns: list[Column[view.MapRow]] = [
        Column("MAP", lambda row: row.name),
        Column("ENTRIES", lambda row: row.entries),
        Column("LIMIT", lambda row: row.limit),
        Column("FULL", lambda row: f"{row.percent:.1f}%"),
        Column("MEMORY", lambda row: size(row.bytes)),
    ]
    with pins.maps_for(arguments) as opened:
        show(view.map_usage(opened), columns, arguments.output, empty="there are no maps")
    return ExitCode.OK


def _list(
    arguments: argparse.Namespace,
    read: Callable[[view.Maps, view.Chosen | None], Sequence[T]],
    columns: Sequence[Column[T]],
    empty: str,
    of_agent: Callable[[DesiredState, view.Chosen | None], Sequence[T]] | None = None,
) -> ExitCode:
    """Print the rows that the filters leave.

    Args:
        arguments: of the command line.
        read: makes the rows from the maps.
        columns: of a table.
        empty: said where there is nothing.
        of_agent: makes the rows from what the agent wants, for modes that have no maps; None: it can't.

    Raises:
        NothingError: the Service that was named is not programmed, or another mode serves.
    """
    is_chosen = arguments.namespace or arguments.service
    matches = service_filter(arguments.namespace, arguments.service) if is_chosen else None
    mode = pins.other_mode(arguments) if of_agent is not None else None
    if mode is not None and of_agent is not None:
        state = desired.read(arguments.state_dir)
        _check_named(arguments, matches, desired.services(state, matches))
        rows = of_agent(state, matches)
    else:
        with pins.maps_for(arguments) as opened:
            if arguments.service:
                _check_named(arguments, matches, view.services(opened, matches))
            rows = read(opened, matches)
    protocol = getattr(arguments, "protocol", None)
    if protocol:
        rows = [row for row in rows if _protocol(row) == protocol]
    show(rows, columns, arguments.output, empty="nothing matches" if is_chosen or protocol else empty)
    if mode is not None and arguments.output in ("table", "wide"):
        print(f"\n{desired.note(mode)}", file=sys.stderr)
    return ExitCode.OK


def _check_named(
    arguments: argparse.Namespace, matches: view.Chosen | None, found: Sequence[ServiceRow]
) -> None:
    """Raise NothingError if a Service was named and there is none of that name."""
    if matches and arguments.service and not found:
        raise NothingError(
            f"no Service {arguments.service} is programmed"
            + (f" in namespace {arguments.namespace}" if arguments.namespace else "")
            + "; `ebpfproxy services` lists them (headless and ExternalName ones are for DNS only)"
        )


def _protocol(row: Any) -> str:
    return str(row.protocol)


def service_filter(namespace: str | None, name: str | None) -> Callable[[str], bool]:
    """Return whether ``namespace/name:port`` is meant by a namespace and by NAME, NAME:PORT or NS/NAME.

    None stands for any.
    """
    space, slash, rest = (name or "").rpartition("/")
    service, colon, port = rest.partition(":")
    pattern = re.compile(
        (re.escape(space) if slash else r"[^/]*")
        + "/"
        + (re.escape(service) if name else r"[^:]*")
        + (f":{re.escape(port)}" if colon else r"(:.*)?")
    )

    def matches(full: str) -> bool:
        return (namespace is None or full.startswith(f"{namespace}/")) and bool(pattern.fullmatch(full))

    return matches
