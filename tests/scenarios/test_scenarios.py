"""Runs every scenario of ``cases/``: Kubernetes YAML in, tables out. README.md has the format."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from ebpfproxy.errors import InvalidObject
from ebpfproxy.model.objects import Object, ObjectKey, Problem, Service, decode, expand, key_of, problems_of
from ebpfproxy.model.services import Backend, Forwarding, Frontend, Policy, Readiness, Scheduler
from ebpfproxy.model.services import Service as ModelService
from ebpfproxy.resolve import (
    AllocationOptions,
    Allocator,
    NodeContext,
    ResolveOptions,
    Resolver,
    environment,
)

CASES = sorted((Path(__file__).parent / "cases").glob("*.txt"))
SECTIONS = {
    "node",
    "options",
    "ledger",
    "given",
    "expect",
    "settings",
    "forwarding",
    "endpoints",
    "allocated",
    "environment",
    "repairs",
    "problems",
}


class Section(msgspec.Struct):
    argument: str
    text: str


def read(path: Path) -> dict[str, Section]:
    head, *parts = re.split(r"^--- +", path.read_text(), flags=re.MULTILINE)
    assert head.startswith("# "), "a scenario begins with a comment: which rule, and where it comes from"
    sections = {}
    for part in parts:
        title, _, text = part.partition("\n")
        name, _, argument = title.partition(" ")
        assert name in SECTIONS, f"unknown section {name!r}"
        assert name not in sections, f"section {name!r} is there twice"
        sections[name] = Section(argument.strip(), text)
    assert {"given"} < sections.keys(), "a scenario has a section given and something to compare"
    return sections


def aligned(text: str) -> list[str]:
    """Return the lines of a table with its columns aligned, so that only contents are compared."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    rows = [re.split(r" {2,}", line) for line in lines if line]
    count = max((len(row) for row in rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]
    return ["  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address or '*'}:{port}"


# --- tables ------------------------------------------------------------------------------------------


def expect_table(services: tuple[ModelService, ...]) -> str:
    rows = ["SERVICE  FRONTEND  SCOPE  POLICY  BACKENDS"]
    for service in services:
        for frontend in service.frontends:
            place = f"{frontend.kind} {host_port(frontend.address, frontend.port)}/{service.protocol}"
            inside, outside = (outcome(service, frontend, is_external=each) for each in (False, True))
            scopes = {"any": inside} if inside == outside else {"internal": inside, "external": outside}
            rows += [f"{service.name}  {place}  {scope}  {what}" for scope, what in scopes.items()]
        if not service.frontends:
            rows.append(f"{service.name}  -")
    return "\n".join(rows)


def outcome(service: ModelService, frontend: Frontend, *, is_external: bool) -> str:
    pool = service.pool(frontend.kind, is_external=is_external)
    if frontend.kind == "ClusterIP":
        policy = service.internal_policy
    else:
        policy = service.external_policy if is_external else Policy.CLUSTER
    backends = " ".join(host_port(each.address, each.port) for each in pool.backends)
    return f"{policy}  {backends or pool.on_empty}"


def settings_table(services: tuple[ModelService, ...]) -> str:
    rows = ["SERVICE  FAMILY  SCHEDULER  AFFINITY  SOURCES  HEALTH"]
    for each in services:
        sources = " ".join(each.source_ranges) if each.source_ranges else "any"
        if each.has_source_ranges and not each.source_ranges:
            sources = "nobody"
        affinity = f"{each.affinity_s}s" if each.affinity_s else "-"
        health = each.health_check_node_port or "-"
        rows.append(f"{each.name}  IPv{each.name.family}  {each.scheduler}  {affinity}  {sources}  {health}")
    return "\n".join(rows)


def forwarding_table(services: tuple[ModelService, ...]) -> str:
    rows = ["SERVICE  FAMILY  PROTOCOL  FORWARDING"]
    rows += [
        f"{each.name}  IPv{each.name.family}  {each.protocol}  {'dsr' if each.is_dsr else 'snat'}"
        for each in services
    ]
    return "\n".join(rows)


def endpoints_table(services: tuple[ModelService, ...]) -> str:
    rows = ["SERVICE  ENDPOINT  STATE  NODE  ZONE  NOTES"]
    rows += [
        f"{service.name}  {host_port(each.address, each.port)}  {each.readiness}  {each.node or '-'}"
        f"  {each.zone or '-'}  {notes(each)}"
        for service in services
        for each in service.backends
    ]
    return "\n".join(rows)


def notes(backend: Backend) -> str:
    words = ["local"] * backend.is_local + ["hinted-elsewhere"] * backend.is_hinted_elsewhere
    words += [f"weight={backend.weight}"] * (backend.weight != 1)
    return " ".join(words) or "-"


def allocated_table(objects: dict[ObjectKey, Object]) -> str:
    rows = ["SERVICE  CLUSTER-IPS  NODE-PORTS  HEALTH  LOAD-BALANCER"]
    for _, each in sorted(objects.items()):
        if isinstance(each, Service):
            ports = [
                f"{port.port}/{port.protocol}={port.node_port}" for port in each.spec.ports if port.node_port
            ]
            cells = (
                f"{each.metadata.namespace}/{each.metadata.name}",
                " ".join(each.cluster_ips) or "-",
                " ".join(ports) or "-",
                str(each.spec.health_check_node_port or "-"),
                " ".join(ingress.ip for ingress in each.status.load_balancer.ingress) or "-",
            )
            rows.append("  ".join(cells))
    return "\n".join(rows)


# --- the test ----------------------------------------------------------------------------------------


def load(text: str) -> tuple[dict[ObjectKey, Object], list[Problem]]:
    objects: dict[ObjectKey, Object] = {}
    problems: list[Problem] = []
    for document in yaml.safe_load_all(text):
        for item in expand(document):
            try:
                obj = decode(item)
            except InvalidObject as error:
                problems += problems_of(error)
            else:
                objects |= {} if obj is None else {key_of(obj): obj}
    return objects, problems


def run(sections: dict[str, Section]) -> dict[str, str]:
    """Return the text that each section should have."""
    objects, problems = load(sections["given"].text)
    options: dict[str, Any] = yaml.safe_load(sections["options"].text) if "options" in sections else {}
    scheduler = Scheduler(options.pop("scheduler", "random"))
    forwarding = Forwarding(options.pop("forwarding", "snat"))
    repairs: tuple[str, ...] = ()
    if options:
        ledger = yaml.safe_load(sections["ledger"].text) if "ledger" in sections else {}
        allocation = Allocator(msgspec.convert(options, AllocationOptions), ledger).allocate(objects)
        objects, repairs = dict(allocation.objects), allocation.repairs
        problems += allocation.problems
    node = sections["node"].argument.split() if "node" in sections else ["n1"]
    resolution = Resolver().resolve(
        objects, NodeContext(*node), ResolveOptions(scheduler, forwarding=forwarding)
    )
    problems += resolution.problems
    namespace = sections["environment"].argument if "environment" in sections else ""
    return {
        "expect": expect_table(resolution.services),
        "settings": settings_table(resolution.services),
        "forwarding": forwarding_table(resolution.services),
        "endpoints": endpoints_table(resolution.services),
        "allocated": allocated_table(objects),
        "environment": "\n".join(
            f"{name}={value}" for name, value in environment(objects, namespace).items()
        ),
        "repairs": "\n".join(repairs),
        "problems": "\n".join(map(str, problems)),
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    sections = read(path)
    actual = run(sections)
    diffs: list[str] = []
    for name, text in actual.items():
        if name in sections or name == "problems":
            want = aligned(sections[name].text) if name in sections else []
            diffs += difflib.unified_diff(
                want, aligned(text), f"{path.name}: {name}", "actual", lineterm="", n=20
            )
    assert not diffs, "\n" + "\n".join(diffs)


def test_readiness_names_are_those_of_the_tables() -> None:
    assert {str(each) for each in Readiness} == {"ready", "terminating", "not-ready"}


def test_there_are_scenarios() -> None:
    assert len(CASES) >= 45
