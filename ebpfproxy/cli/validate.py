"""``ebpfproxy validate``: what is wrong with manifests, one line a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy import config, documents
from ebpfproxy.cli import output
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.resolve import AllocationOptions, validate_documents
from ebpfproxy.source.manifests import SUFFIXES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from pathlib import Path


class Report(msgspec.Struct, frozen=True):
    """What was read and what is wrong with it."""

    files: int
    objects: int
    problems: tuple[str, ...]


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the problems; exit status 1 if there are any."""
    report = validate(arguments.paths, arguments.config)
    if arguments.output in ("json", "yaml"):
        output.encode(report, arguments.output)
    else:
        for problem in report.problems:
            print(problem)
        count = len(report.problems)
        print(
            f"{_count(report.objects, 'object')} in {_count(report.files, 'file')}: "
            + (_count(count, "problem") if count else "no problems")
        )
    return ExitCode.FAILED if report.problems else ExitCode.OK


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def validate(paths: Iterable[Path], config_file: Path | None = None) -> Report:
    """Read manifests and say what is wrong with them.

    Raises:
        EbpfproxyError: a path does not exist.
        ConfigError: the configuration file is wrong.
    """
    settings = config.load(config_file) if config_file else config.Config()
    problems: list[str] = []
    contents: list[tuple[str, int, Any]] = []
    files = manifest_files(paths)
    for file in files:
        try:
            found = documents.read(str(file), file.read_bytes())
        except (EbpfproxyError, OSError) as error:
            problems.append(str(error))
            continue
        contents += [(str(file), number, document) for number, document in enumerate(found)]
    options = AllocationOptions(
        settings.service_cluster_ip_ranges, settings.service_node_port_range, settings.load_balancer_pools
    )
    wrong, objects = validate_documents(contents, options)
    return Report(len(files), objects, (*problems, *map(str, wrong)))


def manifest_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files that ``paths`` name: a directory's manifests as the agent would read them.

    Raises:
        EbpfproxyError: a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(
                entry
                for entry in path.iterdir()
                if entry.name.endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
            )
        elif path.exists():
            files.append(path)
        else:
            raise EbpfproxyError(f"validate {path}: there is no such file or directory")
    return files
