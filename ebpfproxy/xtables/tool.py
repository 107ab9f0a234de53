"""Runs iptables and its kin. One object is one IP family in one variant.

The variants keep their rules in different places in the kernel: "nft" (iptables over nf_tables) and "legacy".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebpfproxy.errors import DataplaneError, UnsupportedError
from ebpfproxy.xtables.chains import TABLES, Saved, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIANTS = ("nft", "legacy")
LOCK_WAIT_S = 5  # for /run/xtables.lock, which legacy tools hold while they work (kube-proxy's number)
_TIMEOUT_S = 120
#: What runs a command in a network namespace of its own, and so with nobody else's rules.
APART = ("unshare", "--net", "--")
# Chains that kubelet makes: where they are, the node's other rules are (kubernetes KEP-3178).
_HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY")


@dataclass(frozen=True)
class Tool:
    """The commands of one IP family in one variant."""

    family: int  # 4 | 6
    variant: str  # nft | legacy

    def _command(self, verb: str = "") -> str:
        end = f"-{verb}" if verb else ""
        return f"ip{'6' if self.family == 6 else ''}tables-{self.variant}{end}"

    @property
    def name(self) -> str:
        """The command that people would type."""
        return self._command()

    def is_installed(self) -> bool:
        """Return whether the commands are there."""
        return all(shutil.which(self._command(verb)) for verb in ("", "save", "restore"))

    def is_in_use(self) -> bool:
        """Return whether there may be rules; asking for a legacy table makes one where is none."""
        if self.variant == "nft":
            return True
        listed = Path(f"/proc/net/ip{'6' if self.family == 6 else ''}_tables_names")
        return listed.exists() and listed.read_text(encoding="ascii").strip() != ""

    def version(self) -> tuple[int, ...]:
        """Return the version, (1, 8, 9) say."""
        match = re.search(r"v([\d.]+)", self._run([self._command(), "--version"], "ask for the version"))
        return tuple(map(int, match[1].split("."))) if match else ()

    def has_random_fully(self) -> bool:
        """Return whether MASQUERADE knows --random-fully (1.6.2)."""
        return self.version() >= (1, 6, 2)

    def save(self, table: str) -> Saved:
        """Return a table.

        Raises:
            DataplaneError: it can't be read.
        """
        return parse(self._run([self._command("save"), "-t", table], f"read table {table}"))

    def restore(self, text: str) -> None:
        """Apply the input of iptables-restore; what it does not name stays.

        Raises:
            DataplaneError: a table was refused, and is as it was.
        """
        wait = ["-w", str(LOCK_WAIT_S)] if self.variant == "legacy" else []
        self._run([self._command("restore"), *wait, "--noflush", "--counters"], "write rules", text)

    def rules(self, table: str, chain: str) -> list[str] | None:
        """Return the rules of one chain as the tool prints them; None: there is no such chain."""
        wait = ["-w", str(LOCK_WAIT_S)]
        done = _call([self._command(), *wait, "-t", table, "-S", chain])
        return None if done.returncode else done.stdout.splitlines()

    def try_apart(self, text: str, setup: str = "") -> str:
        """Return why the kernel refuses rules, tried in a namespace of their own; "" = it takes them.

        Args:
            text: input of iptables-restore.
            setup: a shell command that comes first.
        """
        restore = f"exec {self._command('restore')} --noflush"
        done = _call([*APART, "sh", "-ec", f"{setup}\n{restore}"], text)
        return _reason(done) if done.returncode else ""

    def _run(self, command: Sequence[str], what: str, text: str = "") -> str:
        done = _call(command, text)
        if done.returncode:
            raise DataplaneError(f"{what} with {command[0]}: {_reason(done, text)}")
        return done.stdout


def _call(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise UnsupportedError(f"{command[0]} is not installed (Debian package iptables)") from error
    except subprocess.TimeoutExpired as error:
        raise DataplaneError(f"{command[0]} gave no answer in {_TIMEOUT_S} s") from error


def _reason(done: subprocess.CompletedProcess[str], text: str = "") -> str:
    """Return what a tool said of its failure, with the line of its input that it names."""
    said = "; ".join(
        line.strip() for line in done.stderr.splitlines() if line.strip() and "Try `" not in line
    )
    match = re.search(r"line:? (\d+)", said)
    lines = text.splitlines()
    where = f" ({lines[int(match[1]) - 1]})" if match and 0 < int(match[1]) <= len(lines) else ""
    return (said or f"exit status {done.returncode}") + where


def choose_variant(wanted: str = "auto") -> str:
    """Return the variant to use: where kubelet and others have their rules, else what ``iptables`` is here.

    Raises:
        UnsupportedError: it, or any, is not installed.
    """
    installed = [each for each in VARIANTS if Tool(4, each).is_installed()]
    if wanted != "auto":
        if wanted in installed:
            return wanted
        raise UnsupportedError(f"{Tool(4, wanted).name} is not installed (Debian package iptables)")
    if not installed:
        raise UnsupportedError("iptables is not installed (Debian package iptables)")
    for variant in installed:
        tool = Tool(4, variant)
        try:
            chains = tool.save("mangle").chains if tool.is_in_use() else frozenset[str]()
        except DataplaneError:
            continue
        if any(hint in chains for hint in _HINTS):
            return variant
    usual = (
        "legacy"
        if shutil.which("iptables") and "(legacy)" in _call(["iptables", "--version"]).stdout
        else "nft"
    )
    for variant in (usual, *installed):
        if variant in installed and can_read(Tool(4, variant)):
            return variant
    return installed[0]


def can_read(tool: Tool) -> bool:
    """Return whether the kernel lets these commands see the tables."""
    try:
        for table in TABLES:
            tool.save(table)
    except DataplaneError:
        return False
    return True
