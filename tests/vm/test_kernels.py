"""The product on other kernels: what `check` says, and that it is so. Run by ``make test-vm``.

Each test is one start of a virtual machine, which takes some ten seconds, and everything in it is slow: the
tests that run inside are a choice that leaves no program, no hook and no way to attach out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from vm import kernels, machine

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--timeout=1800")


class Inside(NamedTuple):
    """What is run on every kernel with pytest, and which tests of it."""

    path: str
    choice: str = ""  # as pytest's -k; "" = all

    def __str__(self) -> str:
        return self.path


TESTS = [
    # Programs load, attach by links and by filters, are swapped, found again and removed.
    Inside(
        "tests/bpf/test_dataplane.py",
        "a_restart or come_go or clsact_filters or links_follow or TestCleanup or every_view or cookie or "
        "features",
    ),
    # What every program does, but not with every length of packet, and not with 1,500 flows.
    Inside("tests/packets", "libbpf and not every_length and not test_random and not run_out"),
    # The same source as BCC's compiler makes it, older and for older processors: it loads, and translates.
    Inside("tests/packets/test_translate.py", "bcc and not every_length"),
    # The agent and real traffic.
    Inside("tests/netns/test_services.py", "bpf"),
    # With the rights that deploy/ gives it.
    Inside("tests/netns/test_capabilities.py", "three_are_enough and clsact"),
]
# A mode that the machine at hand may have no kernel for. Debian 12's has all of IPVS as modules.
IPVS_KERNEL = "6.1"
IPVS_TESTS = [
    Inside("tests/netns/test_services.py", "ipvs"),
    Inside("tests/netns/test_ipvs.py"),
    Inside("tests/netns/test_takeover.py", "from_ipvs"),
]


@pytest.fixture(scope="module", params=kernels.KERNELS)
def kernel(request: pytest.FixtureRequest) -> kernels.Kernel:
    try:
        return kernels.fetch(request.param)
    except kernels.UnavailableError as error:
        pytest.skip(f"kernel {request.param}: {error}")


def version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a Linux version or release."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def run(kernel: kernels.Kernel, *command: str) -> str:
    """Return what a command printed under a kernel; it must end with 0."""
    result = machine.run(kernel, command, timeout_s=3000)
    print(f"Linux {kernel.release}, {result.duration_s:.0f} s\n{result.output}")  # pytest -rP shows it
    assert result.status == 0, result.output
    return result.output


def test_check(kernel: kernels.Kernel) -> None:
    """Each feature is found if and only if this kernel is of the version that brought it."""
    assert run(kernel, "uname", "-r").strip() == kernel.release
    report = json.loads(run(kernel, sys.executable, "-m", "ebpfproxy", "check", "-o", "json"))
    found = {each["name"]: each["ok"] for each in report["features"] if each["since"]}
    wanted = {
        each["name"]: version(kernel.release) >= version(each["since"])
        for each in report["features"]
        if each["since"]
    }
    assert found == wanted
    assert {each["name"]: each["reason"] for each in report["dataplanes"]}["bpf"] == ""


@pytest.mark.parametrize("tests", TESTS, ids=str)
def test_tests(kernel: kernels.Kernel, tests: Inside) -> None:
    output = run(kernel, *PYTEST, tests.path, "-k", tests.choice)
    assert re.search(r"\d+ passed", output)


@pytest.mark.parametrize("tests", IPVS_TESTS, ids=str)
def test_ipvs(tests: Inside) -> None:
    try:
        kernel = kernels.fetch(IPVS_KERNEL)
    except kernels.UnavailableError as error:
        pytest.skip(f"kernel {IPVS_KERNEL}: {error}")
    output = run(kernel, *PYTEST, tests.path, "-k", tests.choice)
    assert re.search(r"\d+ passed", output)


def test_demo(kernel: kernels.Kernel) -> None:
    output = run(kernel, "env", f"PYTHONPATH={ROOT / 'tests'}", sys.executable, "scripts/demo.py")
    assert "everything that was made is removed again" in output


class TestMachine:
    """The virtual machine itself."""

    @pytest.fixture
    def kernel(self) -> kernels.Kernel:
        try:
            return kernels.fetch("6.1")
        except kernels.UnavailableError as error:
            pytest.skip(str(error))

    def test_status_and_output_come_back(self, kernel: kernels.Kernel) -> None:
        result = machine.run(kernel, ["sh", "-c", "echo out; echo err >&2; exit 7"])
        assert (result.status, result.output) == (7, "out\nerr\n")

    def test_what_it_writes_is_lost(self, kernel: kernels.Kernel) -> None:
        file = ROOT / "written-in-a-virtual-machine"
        assert machine.run(kernel, ["sh", "-c", f"echo here >{file} && cat {file}"]).output == "here\n"
        assert not file.exists()

    def test_it_is_ended_when_the_time_is_over(self, kernel: kernels.Kernel) -> None:
        with pytest.raises(machine.BootError, match="no end after 30 s") as caught:
            machine.run(kernel, ["sh", "-c", "echo so far; sleep 1000"], timeout_s=30)
        assert "so far" in str(caught.value)
