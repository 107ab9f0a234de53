"""Puts the rules into the kernel with nft or, where there is none, iptables."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Protocol

from ebpfproxy.dataplane.userspace import netfilter
from ebpfproxy.diff import diff
from ebpfproxy.errors import DataplaneError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ebpfproxy.dataplane.userspace.netfilter import Elements
    from ebpfproxy.dataplane.userspace.render import Redirects

_TIMEOUT_S = 60
_IPTABLES = {4: "iptables", 6: "ip6tables"}


class Rules(Protocol):
    """What leads VIPs to the proxy."""

    tool: str

    def apply(self, redirects: Redirects, ports: Mapping[str, int]) -> None:
        """Make the rules so; ``ports`` are the listeners'.

        Raises:
            DataplaneError: the kernel refused them.
        """

    def is_there(self) -> bool:
        """Return whether nobody removed them."""


class NftRules:
    """One nftables table; elements are changed one by one."""

    tool = "nft"

    def __init__(self) -> None:
        self._have: Elements | None = None  # None: unknown, write the whole

    def apply(self, redirects: Redirects, ports: Mapping[str, int]) -> None:
        """Make the rules so."""
        wanted = netfilter.elements(redirects, ports)
        if self._have is None:
            text = netfilter.nft_whole(wanted)
        else:
            text = netfilter.nft_change(self._have, diff(self._have, wanted))
        have, self._have = self._have, None  # until it is through
        if text:
            _run(["nft", "-f", "-"], text)
        self._have = wanted
        del have

    def is_there(self) -> bool:
        """Return whether nobody removed them."""
        return not _fails(["nft", "list", "chain", "inet", netfilter.TABLE, "refuse"])


class IptablesRules:
    """Chains of our own in iptables and ip6tables, entered first."""

    tool = "iptables"

    def __init__(self) -> None:
        self._have: dict[int, str] = {}

    def apply(self, redirects: Redirects, ports: Mapping[str, int]) -> None:
        """Make the rules so."""
        for family, command in _IPTABLES.items():
            text = netfilter.iptables_whole(family, redirects, ports)
            if self._have.get(family) == text:
                continue
            self._have.pop(family, None)
            _run([f"{command}-restore", "--wait", "--noflush"], text)
            for table, chain in netfilter.JUMPS:
                jump = [chain, "-j", netfilter.CHAIN]
                if _fails([command, "--wait", "-t", table, "-C", *jump]):
                    _run([command, "--wait", "-t", table, "-I", *jump])
            self._have[family] = text

    def is_there(self) -> bool:
        """Return whether nobody removed them."""
        return not any(
            _fails([command, "--wait", "-t", table, "-C", chain, "-j", netfilter.CHAIN])
            for command in _IPTABLES.values()
            for table, chain in netfilter.JUMPS
        )


def find() -> tuple[Rules | None, str]:
    """Return the rules that this machine can have; None and why not."""
    reasons = []
    found: list[tuple[type[NftRules | IptablesRules], Sequence[list[str]]]] = [
        # --check asks the kernel and changes nothing.
        (NftRules, [["nft", "--check", "-f", "-"]]),
        (IptablesRules, [[command, "--wait", "-t", "nat", "-S", "OUTPUT"] for command in _IPTABLES.values()]),
    ]
    for kind, tests in found:
        if not shutil.which(tests[0][0]):
            reasons.append(f"{kind.tool} is not installed")
            continue
        text = netfilter.nft_whole({}) if kind is NftRules else ""
        try:
            for test in tests:
                _run(test, text)
        except DataplaneError as error:
            reasons.append(str(error))
        else:
            return kind(), ""
    return None, "; ".join(reasons)


def remove() -> list[str]:
    """Remove our table and chains; return what was removed."""
    removed = []
    if shutil.which("nft") and not _fails(["nft", "list", "chain", "inet", netfilter.TABLE, "refuse"]):
        _run(["nft", "delete", "table", "inet", netfilter.TABLE])
        removed.append(f"nftables table inet {netfilter.TABLE}")
    for command in _IPTABLES.values():
        if not shutil.which(command):
            continue
        for table, chains in (
            ("nat", [netfilter.CHAIN]),
            ("filter", [netfilter.CHAIN, f"{netfilter.CHAIN}-REFUSE"]),
        ):
            if _fails([command, "--wait", "-t", table, "-n", "-L", netfilter.CHAIN]):
                continue
            for where, chain in netfilter.JUMPS:
                jump = ["--wait", "-t", table, "-D", chain, "-j", netfilter.CHAIN]
                while where == table and not _fails([command, *jump]):
                    pass
            for chain in chains:
                _run([command, "--wait", "-t", table, "-F", chain])
            for chain in chains:
                _run([command, "--wait", "-t", table, "-X", chain])
            removed.append(f"{command} chain {netfilter.CHAIN} of table {table}")
    return removed


def _fails(command: Sequence[str]) -> bool:
    try:
        _run(command)
    except DataplaneError:
        return True
    return False


def _run(command: Sequence[str], text: str = "") -> None:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataplaneError(f"run {' '.join(command)}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise DataplaneError(f"{' '.join(command)}: {said[0] if said else f'status {done.returncode}'}")
