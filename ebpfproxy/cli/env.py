"""``ebpfproxy env``: the variables by which containers find Services."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy import agent, config, status
from ebpfproxy.cli import output
from ebpfproxy.cli.exit_codes import ExitCode, NothingError
from ebpfproxy.cli.validate import manifest_files
from ebpfproxy.documents import DocumentError
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.resolve import AllocationOptions, Allocator, environment
from ebpfproxy.source import manifests

if TYPE_CHECKING:
    import argparse

    from ebpfproxy.model.objects import Object, ObjectKey


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the variables; exit status 3 if the namespace has none."""
    said = status.read(arguments.state_dir)
    directory = arguments.manifests or (said and said.manifests)
    if said and said.server and not directory:
        raise NothingError(f"the agent's Services come from {said.server}: ask there, or give --manifests")
    if not directory:
        raise NothingError(f"no agent has run with state directory {arguments.state_dir}: give --manifests")
    objects = allocated(
        read_objects(Path(directory)), _ledger(arguments.state_dir), _ranges(arguments.config)
    )
    found = environment(objects, arguments.namespace)
    if arguments.output in ("json", "yaml"):
        output.encode(found, arguments.output)
    else:
        for variable in found.items():
            print("=".join(variable))
    if not found:
        print(f"namespace {arguments.namespace} sees no Service with a cluster IP", file=sys.stderr)
    return ExitCode.OK if found else ExitCode.NOTHING


def read_objects(directory: Path) -> dict[ObjectKey, Object]:
    """Return the good objects in a directory of manifests; the file that sorts last wins."""
    objects: dict[ObjectKey, Object] = {}
    for file in manifest_files([directory]):
        try:
            objects |= manifests.read(file.name, file.read_bytes()).objects
        except (DocumentError, OSError) as error:
            print(f"ebpfproxy: {error}: left out", file=sys.stderr)
    return objects


def allocated(
    objects: dict[ObjectKey, Object], ledger: dict[str, Any], options: AllocationOptions
) -> dict[ObjectKey, Object]:
    """Return the objects with the cluster IPs that the agent gave them.

    A Service that has none yet, neither of its own nor from the agent, stays without.
    """
    full = Allocator(options, ledger).allocate(objects).objects
    return {
        key: full[key] if key in full and f"{key.namespace}/{key.name}" in ledger else obj
        for key, obj in objects.items()
    }


def _ledger(state_dir: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode((state_dir / agent.LEDGER_FILE).read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise EbpfproxyError(f"read allocations in {state_dir}: {error}") from error


def _ranges(config_file: Path | None) -> AllocationOptions:
    settings = config.load(config_file) if config_file else config.Config()
    return AllocationOptions(
        settings.service_cluster_ip_ranges, settings.service_node_port_range, settings.load_balancer_pools
    )
