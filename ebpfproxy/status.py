"""What the agent says of itself in a file, for ``ebpfproxy status``, and where it tells the desired state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import files

if TYPE_CHECKING:
    from pathlib import Path

FILE = "status.json"
#: In the state directory too: a unix socket that answers HTTP with the desired state, in MessagePack.
SOCKET = "agent.sock"


class Status(msgspec.Struct, frozen=True):
    """The agent as it was when it last wrote this."""

    pid: int
    version: str
    state: str  # starting | running | failing | stopped
    node: str
    mode: str  # "" = none yet
    manifests: str  # "" = Services come from an API server
    cgroup: str  # "" where the mode needs none
    bpffs: str  # "
    started: str  # RFC 3339, UTC; so are the times below
    loader: str = ""
    passed_over: tuple[str, ...] = ()  # the modes that could not be used, with the reasons
    devices: tuple[str, ...] = ()
    last_sync: str = ""  # the last one that succeeded; "" = none yet
    last_sync_s: float = 0.0  # how long it took
    syncs: int = 0
    failures: int = 0  # in a row, since the last success
    services: int = 0  # ports of Services, in each family
    backends: int = 0
    problems: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    unused_settings: tuple[str, ...] = ()
    server: str = ""  # URL of the API server


def write(state_dir: Path, status: Status) -> None:
    """Replace the status file in ``state_dir``; it need not outlive a power failure."""
    data = msgspec.json.format(msgspec.json.encode(status), indent=2)
    files.write_atomic(state_dir / FILE, data + b"\n", durable=False)


def read(state_dir: Path) -> Status | None:
    """Return the last status that an agent wrote, None if there is none or it is of another version."""
    try:
        return msgspec.json.decode((state_dir / FILE).read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None
