"""Virtual machines that Vagrant made, as places where processes can be started."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rig import probe
from rig.process import Place

from .manifests import FILE, text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: What `vagrant ssh-config` wrote.
SSH_CONFIG = os.environ.get("EBPFPROXY_SSH_CONFIG", "")
#: Emulated processors are twenty times slower, and there are three of them on this machine.
SLOW_S = 300


@dataclass(frozen=True)
class Machine(Place):
    """One of Vagrant's; commands run as root there."""

    name: str = ""

    def argv(self, command: Sequence[str | Path]) -> list[str]:
        # What the tests start here by path is in the provisioner's folder there.
        known = {sys.executable: "python3", str(probe.CHILD): f"/opt/rig/{probe.CHILD.name}"}
        words = ["sudo", *(known.get(str(word), str(word)) for word in command)]
        return [
            *["ssh", "-F", SSH_CONFIG, "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60"],
            *["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6", self.name, shlex.join(words)],
        ]

    def shell(self, script: str, *, check: bool = True) -> str:
        """Run a script of bash; return what it wrote."""
        return self.run("bash", "-euc", script, timeout_s=SLOW_S, check=check).stdout

    def boot_id(self) -> str:
        """Return what is another one after each boot; "" while it can't be asked."""
        return self.run("cat", "/proc/sys/kernel/random/boot_id", timeout_s=SLOW_S, check=False).stdout

    def set_endpoints(self, pods: Iterable[str]) -> None:
        """Write the manifests with these pods, by rename; who answers tells when they are programmed."""
        path = f"/etc/ebpfproxy/manifests/{FILE}"
        self.run(
            *["bash", "-c", f"cat >{path}.new && mv {path}.new {path}"],
            text=text(pods),
            timeout_s=SLOW_S,
        )
