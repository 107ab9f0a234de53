"""The table of modes, which one is chosen, and what becomes of the one before."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy import config, files, metrics
from ebpfproxy.config import Config
from ebpfproxy.dataplane import chosen as chosen_module
from ebpfproxy.dataplane import modes, nat
from ebpfproxy.dataplane.chosen import RECORD, ChosenDataplane, PassedOver
from ebpfproxy.dataplane.modes import Made, Site
from ebpfproxy.dataplane.nftables import kernel
from ebpfproxy.errors import ConfigError, DataplaneError, EbpfproxyError, KernelError, UnsupportedError
from ebpfproxy.model.services import DesiredState
from makers import service
from unit.fakes import FakeDataplane

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

STATE = DesiredState(())


class FakeMode(FakeDataplane):
    """A mode and its dataplane in one."""

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self.name, self.events = name, events
        self.reason: EbpfproxyError | None = None  # why it can't start
        self.cleanup_failures: list[EbpfproxyError] = []
        self.on_sync = lambda _: events.append(f"{name} synced")
        self.cleaned: list[Site] = []

    def usable(self) -> str | None:
        return str(self.reason) if self.reason else None

    def make(self, _settings: Config, site: Site, stack: ExitStack) -> Made:
        stack.callback(self.events.append, f"{self.name} unlocked")
        return Made(self, site)

    def start(self) -> None:
        if self.reason:
            raise self.reason
        self.events.append(f"{self.name} started")

    def reading(self, _site: Site) -> metrics.Reading:
        return metrics.Reading(verdicts={self.name: 1})

    def cleanup(self, site: Site) -> list[str]:
        if self.cleanup_failures:
            raise self.cleanup_failures.pop(0)
        self.events.append(f"{self.name} removed")
        self.cleaned.append(site)
        return ["everything"]


class Machine:
    """What can run on it, and what happened."""

    def __init__(self, state_dir: Path, patch: pytest.MonkeyPatch) -> None:
        self.state_dir = state_dir
        self.events: list[str] = []
        self.modes = {name: FakeMode(name, self.events) for name in ("bpf", "nftables", "iptables")}
        patch.setattr(modes, "names", lambda: tuple(self.modes))
        patch.setattr(modes, "load", self.modes.__getitem__)

    def choose(self, mode: str) -> ChosenDataplane:
        return ChosenDataplane(Config(mode=mode), Site(self.state_dir))

    def record(self) -> Any:
        return json.loads((self.state_dir / RECORD).read_text())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("mode", "scheduler"),  # what the systems that these modes replace do
    [("bpf", "random"), ("iptables", "random"), ("ipvs", "rr"), ("userspace", "rr")],
)
def test_usual_scheduler(tmp_path: Path, mode: str, scheduler: str) -> None:
    made = ChosenDataplane(Config(), Site(tmp_path))
    made.mode = mode
    assert made.usual_scheduler == scheduler


def test_the_configuration_knows_the_same_modes() -> None:
    assert tuple(each.name for each in modes.TABLE) == config.MODES
    assert set(modes.names()) <= set(config.MODES)


@pytest.mark.parametrize("name", modes.names())
def test_every_mode_is_a_plug(name: str) -> None:
    plug = modes.load(name)
    assert all(callable(getattr(plug, each)) for each in ("usable", "make", "reading", "cleanup"))


def test_auto_takes_the_first_that_starts(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    machine.modes["bpf"].reason = UnsupportedError("this kernel is old")
    chosen = machine.choose("auto")
    chosen.start()
    assert (chosen.mode, chosen.passed_over) == ("nftables", [PassedOver("bpf", "this kernel is old")])
    assert machine.events == ["bpf unlocked", "nftables started"]
    assert machine.modes["bpf"].is_closed
    assert "mode bpf can't be used here: this kernel is old" in caplog.text
    assert "serving in mode nftables" in caplog.text
    assert chosen.reading().verdicts == {"nftables": 1}
    chosen.close()
    assert machine.modes["nftables"].is_closed
    assert machine.events[-1] == "nftables unlocked"


def test_when_none_starts_every_reason_is_told(machine: Machine) -> None:
    for name, mode in machine.modes.items():
        mode.reason = KernelError(f"{name} is refused", 1)
    with pytest.raises(UnsupportedError, match=r"bpf: bpf is refused; nftables: .*; iptables: iptables is"):
        machine.choose("auto").start()


def test_a_mode_that_was_asked_for_is_the_only_one_tried(machine: Machine) -> None:
    machine.modes["bpf"].reason = KernelError("refused", 1)
    with pytest.raises(KernelError, match="refused"):
        machine.choose("bpf").start()
    assert machine.events == ["bpf unlocked"]


@pytest.mark.parametrize("error", [files.LockedError("in use"), ConfigError("wrong flag")])
def test_auto_does_not_pass_over_what_the_administrator_must_see(
    machine: Machine, error: EbpfproxyError
) -> None:
    machine.modes["bpf"].reason = error
    with pytest.raises(type(error)):
        machine.choose("auto").start()


def test_a_mode_that_this_version_lacks(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="this version has auto, bpf, nftables, iptables"):
        machine.choose("ipvs").start()


def test_the_old_mode_goes_after_the_new_one_is_complete(machine: Machine) -> None:
    first = machine.choose("bpf")
    first.start()
    first.sync(STATE)
    first.close()
    machine.events.clear()
    second = machine.choose("nftables")
    second.start()
    assert machine.record() == {"bpf": "", "nftables": ""}
    second.tick()
    second.sync(STATE)
    second.tick()
    second.tick()
    assert machine.events == ["nftables started", "nftables synced", "bpf removed"]
    assert machine.record() == {"nftables": ""}


def test_the_old_mode_stays_while_the_new_one_fails(machine: Machine) -> None:
    machine.choose("bpf").start()
    second = machine.choose("nftables")
    second.start()
    machine.modes["nftables"].failures = [DataplaneError("no room")]
    with pytest.raises(DataplaneError):
        second.sync(STATE)
    second.tick()
    assert "bpf removed" not in machine.events
    assert machine.record() == {"bpf": "", "nftables": ""}


def test_what_can_not_be_removed_is_a_problem_and_tried_again(machine: Machine) -> None:
    machine.choose("bpf").start()
    second = machine.choose("nftables")
    second.start()
    second.sync(STATE)
    machine.modes["bpf"].cleanup_failures = [KernelError("remove pin: busy", 16)]
    second.tick()
    assert second.problems == ["mode bpf, used earlier, still has something in the kernel: remove pin: busy"]
    second.tick()
    assert second.problems == []
    assert machine.record() == {"nftables": ""}


def test_a_mode_that_auto_could_not_start_leaves_nothing(machine: Machine) -> None:
    """It may have got half way."""
    machine.modes["bpf"].reason = KernelError("refused", 1)
    chosen = machine.choose("auto")
    chosen.start()
    chosen.sync(STATE)
    chosen.tick()
    assert machine.events[-1] == "bpf removed"
    assert machine.record() == {"nftables": ""}


def test_translated_connections_keep_their_nat_until_the_last_one_ends(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a mode that lets the kernel translate to one that has no chain of NAT itself."""
    is_needed = [True, False]
    monkeypatch.setattr(kernel, "is_missing", lambda: False)
    monkeypatch.setattr(nat, "hold", lambda: machine.events.append("nat held"))
    monkeypatch.setattr(nat, "is_needed", lambda: is_needed.pop(0))
    monkeypatch.setattr(nat, "release", lambda: machine.events.append("nat released"))
    monkeypatch.setattr(chosen_module, "KEEPER_CHECK_S", 0)
    machine.choose("nftables").start()
    second = machine.choose("bpf")
    second.start()
    second.sync(STATE)
    machine.events.clear()
    second.tick()
    assert machine.events == ["nat held", "nftables removed"], "in this order"
    assert machine.record() == {"bpf": "", "nat": ""}
    second.tick()
    assert machine.record() == {"bpf": "", "nat": ""}, "it is needed"
    second.close()
    third = machine.choose("bpf")
    third.start()
    third.sync(STATE)
    third.tick()
    assert machine.events[-1] == "nat released", "also after a restart"
    assert machine.record() == {"bpf": ""}


def test_the_place_of_the_old_mode_is_remembered(machine: Machine, tmp_path: Path) -> None:
    ChosenDataplane(Config(mode="bpf"), Site(machine.state_dir, bpffs=tmp_path / "fs")).start()
    second = machine.choose("nftables")
    second.start()
    second.sync(STATE)
    second.tick()
    assert machine.modes["bpf"].cleaned == [Site(machine.state_dir, bpffs=tmp_path / "fs")]


@pytest.mark.parametrize(("mode", "words"), [("bpf", []), ("iptables", ["forwarding dsr", "default/web"])])
def test_a_mode_without_dsr_says_so(machine: Machine, mode: str, words: list[str]) -> None:
    chosen = machine.choose(mode)
    chosen.start()
    told = chosen.unsupported(DesiredState((service("web", is_dsr=True), service("plain"))))
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)
    assert "plain" not in "".join(told)
