"""Settings of the kernel that are changed come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ebpfproxy import sysctl
from ebpfproxy.sysctl import Ledger

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree = tmp_path / "proc"
    (tree / "net").mkdir(parents=True)
    (tree / "net/a").write_text("0\n")
    (tree / "net/b").write_text("7\n")
    monkeypatch.setattr(sysctl, "_PROC", tree)
    return tree


def test_what_was_changed_comes_back_in_a_later_run(proc: Path, tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger").set({"net/a": "1", "net/b": "7"}) == []
    assert Ledger(tmp_path / "ledger").set({"net/a": "2"}) == []
    assert (proc / "net/a").read_text() == "2"
    assert len(Ledger(tmp_path / "ledger").restore()) == 1
    assert ((proc / "net/a").read_text(), (proc / "net/b").read_text()) == ("0", "7\n")
    assert Ledger(tmp_path / "ledger").restore() == []


def test_what_somebody_else_changed_since_stays(proc: Path, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").set({"net/a": "1"})
    (proc / "net/a").write_text("5")
    assert Ledger(tmp_path / "ledger").restore() == []
    assert (proc / "net/a").read_text() == "5"


def test_what_the_kernel_does_not_have_is_said(proc: Path, tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger").set({"net/c": "1"}) == ["this kernel has no setting net.c (to be 1)"]


def test_a_mark_says_that_we_were_here(proc: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    assert not ledger.exists
    ledger.mark()
    assert Ledger(tmp_path / "ledger").exists
    assert Ledger(tmp_path / "ledger").restore() == []
    assert not Ledger(tmp_path / "ledger").exists
