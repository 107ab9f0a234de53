"""The real agent, run in a topology's node."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from rig import leaks
from rig.names import unique
from rig.topology import Topology
from rig.wait import eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

    from rig.objects import Object
    from rig.process import Place, Process

START_S = 180  # BCC compiles at start, on a machine that may be busy, or emulated


class Home(Protocol):
    """Where an agent can run: the node of a topology, or one of a cluster's."""

    @property
    def node_name(self) -> str:
        """The name of its Node."""

    @property
    def directory(self) -> Path:
        """Where files may be made."""

    @property
    def cgroup(self) -> Path:
        """Whose sockets are load-balanced."""

    @property
    def bpffs(self) -> Path:
        """A BPF file system of its own."""

    @property
    def on_node_bare(self) -> Place:
        """The node, outside of the cgroup whose sockets are load-balanced."""


class Agent:
    """``ebpfproxy run`` with a manifests directory of its own.

    Args:
        net: where it runs.
        mode: as the flag.
        loader: as the flag.
        arguments: further flags.
        config: fields of the KubeProxyConfiguration file; none = no file.
        env: further environment.
        attach: how to attach to devices: auto, tcx or clsact.
        prefix: a command that starts the agent: one that drops rights, say.
        source: flags that say where Services come from; None = its own manifests.
    """

    live: ClassVar[list[Agent]] = []

    def __init__(
        self,
        net: Home,
        *,
        mode: str = "bpf",
        loader: str = "libbpf",
        arguments: Sequence[str] = (),
        config: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        attach: str = "auto",
        prefix: Sequence[str] = (),
        source: Sequence[str | Path] | None = None,
    ) -> None:
        self.prefix = list(prefix)
        self.net, self.mode, self.loader = net, mode, loader
        self.arguments, self.env = list(arguments), env or {}
        directory = net.directory / unique("agent")
        self.manifests, self.state_dir = directory / "manifests", directory / "state"
        self.manifests.mkdir(parents=True)
        self.source = ["--manifests", self.manifests] if source is None else list(source)
        self.config_file: Path | None = None
        if attach != "auto":
            config = dict(config or {})
            config["ebpfproxy"] = {**config.get("ebpfproxy", {}), "deviceAttachment": attach}
        if config is not None:
            self.config_file = directory / "config.yaml"
            self.config_file.write_text(
                json.dumps(
                    {
                        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                        "kind": "KubeProxyConfiguration",
                        **config,
                    }
                )
            )
        self._notify_path = directory / "notify"
        self._notify: socket.socket | None = None
        self._processes: list[Process] = []
        self._syncs_before = 0  # when a manifest was last written
        Agent.live.append(self)

    # --- manifests

    def write(self, *objects: Object, file: str = "objects.json") -> None:
        """Replace one manifest file, by rename as a careful writer does."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=1)
        self.write_text(file, text)

    def write_text(self, file: str, text: str) -> None:
        self._syncs_before = self._syncs()
        temporary = self.manifests / f".{file}.new"
        temporary.write_text(text)
        temporary.replace(self.manifests / file)

    # --- the process

    @property
    def process(self) -> Process:
        return self._processes[-1]

    def start(self, *, wait: bool = True, loader: str = "") -> Self:
        """Start it; with ``wait`` return when it told systemd that it is ready."""
        self.loader = loader or self.loader
        if self.mode != "bpf" and isinstance(self.net, Topology):
            self.net.add_default_route()
        self._syncs_before = 0
        if self._notify:
            self._notify.close()
        self._notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._notify_path))
        flags: dict[str, str | Path] = {
            "--node-name": self.net.node_name,
            "--cgroup": self.net.cgroup,
            "--bpffs": self.net.bpffs,
            "--state-dir": self.state_dir,
            "--mode": self.mode,
            "--loader": self.loader,
        }
        if self.config_file:
            flags["--config"] = self.config_file
        command = [
            *self.prefix,
            *self.program("run", *self.source, *chain.from_iterable(flags.items()), *self.arguments),
        ]
        env = {"NOTIFY_SOCKET": str(self._notify_path), **self.env}
        self._processes.append(self.net.on_node_bare.start(*command, env=env))
        if wait:
            self.wait_notified("READY=1")
        return self

    @staticmethod
    def program(*arguments: str | Path) -> list[str | Path]:
        """Return the command line of the agent's program."""
        return [sys.executable, "-m", "ebpfproxy", *arguments]

    def wait_notified(self, line: str) -> None:
        """Wait for a line of systemd's notification protocol."""
        assert self._notify
        self._notify.settimeout(0.1)

        def told() -> bool:
            assert self._notify
            if self.process.poll() is not None:
                msg = f"the agent ended:\n{self.output()}"
                raise RuntimeError(msg)
            try:
                return line in self._notify.recv(4096).decode().split("\n")
            except TimeoutError:
                return False

        try:
            eventually(told, f"{line} from the agent", timeout_s=START_S)
        except AssertionError as error:
            msg = f"{error}\n{self.output()}"
            raise AssertionError(msg) from None

    def kill(self) -> None:
        """SIGKILL: nothing of it gets the chance to tidy up."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM, as systemd stops it; it must end well."""
        self.process.signal(signal.SIGTERM)
        status = self.process.wait()
        assert status == 0, f"exit status {status} on SIGTERM:\n{self.output()}"

    def restart(self, *, loader: str = "") -> None:
        """SIGKILL and start again."""
        self.kill()
        self.start(loader=loader)

    def reload(self) -> None:
        """SIGHUP, and wait until it is ready again."""
        self.process.signal(signal.SIGHUP)
        self.wait_notified("READY=1")

    def output(self) -> str:
        """Return the log of every start so far."""
        return "\n--- started again ---\n".join(process.output() for process in self._processes)

    def stop(self) -> None:
        """End every process of it; idempotent."""
        for process in self._processes:
            process.stop()
        for pid in leaks.proxies(str(self.state_dir)):  # those of mode userspace outlive the agent
            os.kill(pid, signal.SIGKILL)
        if self._notify:
            self._notify.close()
            self._notify = None
        if self in Agent.live:
            Agent.live.remove(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _syncs(self) -> int:
        """Return how many syncs the agent says it did."""
        file = self.state_dir / "status.json"
        return int(json.loads(file.read_text())["syncs"]) if file.exists() else 0

    # --- the command line, from the node

    def cli(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run another ``ebpfproxy`` command on the node."""
        return self.net.on_node_bare.run(sys.executable, "-m", "ebpfproxy", *arguments, check=check)

    def rows(self, noun: str, *arguments: str) -> Any:
        """Return what a reading command says with ``-o json``."""
        return json.loads(self.cli(noun, *arguments, "--bpffs", self.net.bpffs, "-o", "json").stdout)

    def status(self) -> Any:
        """Return what ``ebpfproxy status`` says; its exit status 3 means that no agent runs."""
        options: list[str | Path] = ["--state-dir", self.state_dir, "--bpffs", self.net.bpffs, "-o", "json"]
        return json.loads(self.cli("status", *options, check=False).stdout)

    def wait_synced(self) -> None:
        """Wait until the agent says that it synced after a manifest was last written."""
        eventually(
            lambda: self._syncs() > self._syncs_before,
            f"mode {self.mode} to sync after the last change",
            timeout_s=30,
        )

    def wait_backends(self, service: str, addresses: set[str]) -> None:
        """Wait until the kernel's maps give a Service exactly these backends for new connections.

        Args:
            service: as the command line names it, ``namespace/name:port``.
            addresses: of one family; backends of the other are not looked at.

        A mode without maps has programmed what was written last once it has synced again.
        """
        if self.mode != "bpf":
            self.wait_synced()
            return
        is_v6 = {":" in address for address in addresses} == {True}

        def match() -> bool:
            usable = {
                row["address"]
                for row in self.rows("backends")
                if row["service"] == service and (":" in row["address"]) == is_v6 and row["is_usable"]
            }
            return usable == addresses

        eventually(match, f"{service} to have {addresses}", every_s=0.05)
