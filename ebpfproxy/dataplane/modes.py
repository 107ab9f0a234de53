"""The modes: every dataplane there is, in the order in which ``auto`` tries them.

A mode is a package ``ebpfproxy.dataplane.<name>`` with a module ``mode`` that is a :class:`Plug`. A mode
without that module is not listed. Nothing here imports a mode before it is asked for: the command line lists
their names, and the agent pays for the one that it runs.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from ebpfproxy.dataplane import Dataplane
from ebpfproxy.model.services import Scheduler

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ebpfproxy.config import Config
    from ebpfproxy.metrics import Reading

AUTO = "auto"


class Mode(NamedTuple):
    """One way to make the kernel serve."""

    name: str
    works_by: str  # for people
    needs: str  # of the machine
    scheduler: Scheduler = Scheduler.RANDOM  # of Services that name none, if the configuration does not
    services_by: str = "ebpfproxy services"  # the command that shows what is programmed
    connections_by: str = "conntrack -L --dst-nat"  # the command that shows what is translated


#: The one table; the order is that of ``auto``.
TABLE = (
    Mode(
        "bpf",
        "BPF programs on sockets and devices",
        "Linux 5.10, cgroup v2, a BPF file system; CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON",
        connections_by="ebpfproxy connections",
    ),
    Mode(
        "nftables",
        "one nftables table",
        "Linux 5.10, nft 1.0.1; CAP_NET_ADMIN",
        services_by="nft list table ip ebpfproxy",
    ),
    Mode(
        "ipvs",
        "IPVS, with ipsets and a few iptables rules",
        "IPVS in the kernel, ipset, iptables; CAP_NET_ADMIN",
        Scheduler.RR,
        services_by="ipvsadm -Ln",
        connections_by="ipvsadm -Lnc",
    ),
    Mode(
        "iptables",
        "iptables chains as kube-proxy makes them",
        "iptables 1.8; CAP_NET_ADMIN",
        services_by="iptables-save -t nat",
    ),
    Mode(
        "userspace",
        "a proxy process for TCP and UDP",
        "nothing; CAP_NET_ADMIN for VIPs",
        Scheduler.RR,
        services_by="nft list table inet ebpfproxy-userspace",
        connections_by="ss -tunp",
    ),
)


class Site(NamedTuple):
    """Where a dataplane works on this machine; None = to be found, or not needed by its mode."""

    state_dir: Path
    cgroup: Path | None = None
    bpffs: Path | None = None


class Runnable(Dataplane, Protocol):
    """A dataplane that has to be started."""

    problems: list[str]  # what is missing on this machine, one sentence each

    def start(self) -> None:
        """Make ready what ``sync`` needs.

        Raises:
            EbpfproxyError: this machine can't run it; the message says why.
        """


class Made(NamedTuple):
    """A dataplane that is not started yet, and where it will work."""

    dataplane: Runnable
    site: Site  # with what was found; what the mode does not use is None


class Plug(Protocol):
    """What ``ebpfproxy.dataplane.<name>.mode`` offers. Importing it is cheap."""

    def usable(self) -> str | None:
        """Return in one sentence why this machine can't run the mode, None if it can; changes nothing."""

    def make(self, settings: Config, site: Site, stack: ExitStack) -> Made:
        """Make the dataplane.

        Args:
            settings: the configuration, flags applied.
            site: as the flags say.
            stack: gets what has to be released when the dataplane is closed, locks for instance.

        Raises:
            LockedError: another agent is at work in the same place.
            ConfigError: the configuration or a flag is wrong.
            EbpfproxyError: this machine can't run it; the message says why.
        """

    def reading(self, site: Site) -> Reading:
        """Return what the dataplane counts in the kernel; called from another thread."""

    def cleanup(self, site: Site) -> list[str]:
        """Remove everything that this mode ever made, and nothing of others; may be repeated.

        Returns:
            What was removed, one line each; empty: there was nothing.

        Raises:
            EbpfproxyError: something could not be removed; call again.
        """


def names() -> tuple[str, ...]:
    """Return the modes that this version has, in the order of ``auto``."""
    here = Path(__file__).parent
    return tuple(each.name for each in TABLE if (here / each.name / "mode.py").exists())


def find(name: str) -> Mode | None:
    """Return the row of a mode, None if there is none of that name."""
    return next((each for each in TABLE if each.name == name), None)


def load(name: str) -> Plug:
    """Return a mode that is listed."""
    return cast("Plug", import_module(f"ebpfproxy.dataplane.{name}.mode"))


def why_not(name: str) -> str | None:
    """Return in one sentence why this machine can't run a mode, None if it can."""
    return load(name).usable()


def lacking(name: str) -> list[str]:
    """Return one sentence for each thing that a usable mode can't do here: the machine lacks what it takes.

    A mode that can run only in full has no word for it.
    """
    ask = getattr(load(name), "lacking", None)
    return list(ask()) if ask is not None and why_not(name) is None else []
