"""``ebpfproxy explain``: what happens to a connection to a VIP, and why."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy.cli import desired, output, pins
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.cli.output import Column
from ebpfproxy.dataplane.bpf.explain import explain
from ebpfproxy.model.services import Protocol

if TYPE_CHECKING:
    import argparse

    from ebpfproxy.dataplane.explanation import Candidate, Excluded, Explanation

_CANDIDATES: list[Column[Candidate]] = [
    Column("CANDIDATE", lambda row: row.backend),
    Column("STATE", lambda row: row.state),
    Column("WEIGHT", lambda row: row.weight),
    Column("SHARE", lambda row: f"{row.share:.1%}"),
    Column("LOCAL", lambda row: "yes" if row.is_local else "no"),
]
_EXCLUDED: list[Column[Excluded]] = [
    Column("NOT", lambda row: row.backend),
    Column("BECAUSE", lambda row: row.reason),
]


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the explanation; exit status 3 if no frontend matches."""
    target = arguments.target
    asked = target.vip, target.port, Protocol(target.protocol), arguments.source
    mode = pins.other_mode(arguments)
    if mode is None:
        with pins.open_maps(arguments.bpffs) as maps:
            found = explain(maps, *asked)
    else:
        found = desired.explain(desired.read(arguments.state_dir), *asked)
    if arguments.output in ("json", "yaml"):
        output.encode(found, arguments.output)
    else:
        print("\n".join(_text(found)))
        if mode is not None:
            print(f"\n{desired.note(mode)}")
    return ExitCode.OK if found.matches else ExitCode.NOTHING


def _text(found: Explanation) -> list[str]:
    """Return an explanation for people, line by line."""
    source = f" from {found.source}" if found.source else ""
    lines = [f"{found.destination}{source}: {found.answer}"]
    for match, scopes in groupby(found.matches, lambda match: msgspec.structs.replace(match, scope="")):
        affinity = (
            f", client keeps its backend {output.seconds(match.affinity_s)}" if match.affinity_s else ""
        )
        scope = " and ".join(each.scope for each in scopes)
        lines += [
            "",
            f"{scope} traffic: frontend {match.frontend} ({match.kind}) of {match.service}",
            f"  policy {match.policy}, scheduler {match.scheduler}{affinity}",
        ]
        if match.affinity:
            left = output.seconds(match.affinity.expires_s)
            lines.append(f"  client {match.affinity.client} is bound to {match.affinity.backend} for {left}")
        if match.candidates:
            lines.append(textwrap.indent(output.table(match.candidates, _CANDIDATES), "  "))
        if match.excluded:
            lines.append(textwrap.indent(output.table(match.excluded, _EXCLUDED), "  "))
    return lines
