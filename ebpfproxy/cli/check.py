"""``ebpfproxy check``: what this machine can run, and why not the rest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import status
from ebpfproxy.cli import output
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.cli.output import Column
from ebpfproxy.dataplane import capabilities, modes
from ebpfproxy.dataplane.bpf import features
from ebpfproxy.loader.bcc import BccLoader
from ebpfproxy.loader.libbpf import LibbpfLoader

if TYPE_CHECKING:
    import argparse


class Choice(msgspec.Struct, frozen=True):
    """A dataplane or a loader."""

    name: str
    reason: str  # why this machine can't run it; "" = it can


class Report(msgspec.Struct, frozen=True):
    """What this machine can run."""

    dataplanes: tuple[Choice, ...]
    loaders: tuple[Choice, ...]
    features: tuple[features.Feature, ...]
    lacking: tuple[str, ...]  # what usable dataplanes can't do on this machine
    unsupported: tuple[str, ...]  # what the Services of the agent ask for and its dataplane does not do


_CHOICES: list[Column[Choice]] = [
    Column("NAME", lambda row: row.name),
    Column("USABLE", lambda row: "no" if row.reason else "yes"),
    Column("BECAUSE", lambda row: row.reason),
]
_FEATURES: list[Column[features.Feature]] = [
    Column("FEATURE", lambda row: row.name),
    Column("HERE", lambda row: "yes" if row.ok else "NO" if row.required else "no"),
    Column("LINUX", lambda row: row.since),
    Column("NEEDED FOR", lambda row: row.needed_for),
    Column("DETAIL", lambda row: row.detail, is_wide=True),
]


class Capability(msgspec.Struct, frozen=True):
    """A feature, and the modes that lack it."""

    name: str
    what: str
    limits: dict[str, str]  # mode -> why not


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the report; exit status 1 if no dataplane can run."""
    if arguments.capabilities:
        _show_capabilities(arguments.output)
        return ExitCode.OK
    said = status.read(arguments.state_dir)
    choices = tuple(Choice(each.name, each.usable() or "") for each in (LibbpfLoader(), BccLoader()))
    report = Report(
        dataplanes=tuple(Choice(name, modes.why_not(name) or "") for name in modes.names()),
        loaders=choices,
        features=tuple(features.probe()),
        lacking=tuple(f"mode {name}: {each}" for name in modes.names() for each in modes.lacking(name)),
        unsupported=said.unsupported if said else (),
    )
    if arguments.output in ("json", "yaml"):
        output.encode(report, arguments.output)
    else:
        print(_text(report, is_wide=arguments.output == "wide"))
    return ExitCode.FAILED if all(each.reason for each in report.dataplanes) else ExitCode.OK


def _show_capabilities(style: str) -> None:
    """Print which mode does what."""
    listed = modes.names()
    rows = [
        Capability(each.name, each.what, {mode: why for mode, why in each.limits.items() if mode in listed})
        for each in capabilities.FEATURES
    ]
    if style in ("json", "yaml"):
        output.encode(rows, style)
        return
    columns: list[Column[Capability]] = [Column("FEATURE", lambda row: row.what)]
    columns += [Column(mode.upper(), partial(_can, mode)) for mode in listed]
    reasons = [
        f"{row.what}\n"
        + "\n".join(
            f"  {', '.join(names)}: {why}" for why, names in capabilities.by_reason(row.limits).items()
        )
        for row in rows
        if row.limits
    ]
    print(output.table(rows, columns) + "\n\nwhy not\n" + "\n".join(reasons))


def _can(mode: str, row: Capability) -> str:
    return "no" if mode in row.limits else "yes"


def _text(report: Report, *, is_wide: bool) -> str:
    parts = [
        "dataplanes, in the order of --mode auto\n" + output.table(report.dataplanes, _CHOICES),
        "loaders\n" + output.table(report.loaders, _CHOICES),
        "kernel and machine\n" + output.table(report.features, _FEATURES, is_wide=is_wide),
    ]
    missing = [f"{each.name}: {each.detail}" for each in report.features if not each.ok]
    missing += report.lacking
    if missing:
        parts.append("what is missing\n" + "\n".join(missing))
    if report.unsupported:
        parts.append("asked for and not done\n" + "\n".join(report.unsupported))
    return "\n\n".join(parts)
