"""What of the loaders needs no kernel: choosing one, finding headers, the text for BCC."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ebpfproxy.errors import ConfigError, LoadError, UnsupportedError
from ebpfproxy.libbpf import STAMP, lib
from ebpfproxy.loader import bcc, check_stamp, choose, libbpf

ROOT = Path(__file__).resolve().parents[2]
RELEASE = os.uname().release


def headers(folder: Path) -> Path:
    """Make a folder look like kernel headers."""
    for file in ("include/linux/kconfig.h", "include/generated/autoconf.h"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


class TestChoose:
    @pytest.fixture(autouse=True)
    def _no_loader_is_usable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libbpf.LibbpfLoader, "usable", lambda self: "no objects")
        monkeypatch.setattr(bcc.BccLoader, "usable", lambda self: "no headers")

    @pytest.mark.parametrize(
        ("usable", "asked", "chosen"),
        [
            ({"libbpf", "bcc"}, "auto", "libbpf"),
            ({"bcc"}, "auto", "bcc"),
            ({"libbpf", "bcc"}, "bcc", "bcc"),
            ({"libbpf", "bcc"}, "libbpf", "libbpf"),
        ],
    )
    def test_the_first_that_can(
        self, monkeypatch: pytest.MonkeyPatch, usable: set[str], asked: str, chosen: str
    ) -> None:
        for loader in (libbpf.LibbpfLoader, bcc.BccLoader):
            if loader.name in usable:
                monkeypatch.setattr(loader, "usable", lambda self: None)
        assert choose(asked).name == chosen

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("auto", "loader libbpf: no objects; loader bcc: no headers"),
            ("libbpf", "loader libbpf: no objects"),
            ("bcc", "loader bcc: no headers"),
        ],
    )
    def test_why_none_can(self, asked: str, message: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            choose(asked)
        assert str(caught.value) == message

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(ConfigError, match=r"loader cilium: .* auto, libbpf, bcc"):
            choose("cilium")


class TestUsable:
    def test_libbpf_needs_objects(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(libbpf, "OBJECTS", tmp_path)
        assert libbpf.LibbpfLoader().usable() == (
            f"there are no compiled programs in {tmp_path}; run `make build`"
        )
        (tmp_path / "tc_lb.bpf.o").touch()
        assert libbpf.LibbpfLoader().usable() is None

    def test_pypis_package_named_bcc_is_not_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "bcc").mkdir()
        (tmp_path / "bcc" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(bcc, "SYSTEM_PACKAGES", tmp_path / "none")
        assert bcc.find_bcc() is None
        assert "apt-get install python3-bpfcc" in (bcc.BccLoader().usable() or "")

    def test_debians_is_found_also_from_a_virtual_environment(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(bcc, "SYSTEM_PACKAGES", tmp_path)
        (tmp_path / "bcc").mkdir()
        (tmp_path / "bcc" / "libbcc.py").touch()
        assert bcc.find_bcc() == tmp_path / "bcc"


class TestHeaders:
    def test_none_at_all(self, tmp_path: Path) -> None:
        problem = bcc.headers_problem({}, tmp_path)
        assert problem is not None
        assert problem.startswith(
            f"there are no kernel headers for {RELEASE}: install linux-headers-{RELEASE}"
        )
        assert "BCC_KERNEL_SOURCE" in problem
        assert "scripts/bcc-headers" in problem

    @pytest.mark.parametrize("folder", ["build", "source"])
    def test_the_running_kernels_own(self, tmp_path: Path, folder: str) -> None:
        headers(tmp_path / "lib/modules" / RELEASE / folder)
        assert bcc.headers_problem({}, tmp_path) is None

    def test_those_in_the_kernel_itself(self, tmp_path: Path) -> None:
        archive = tmp_path / "sys/kernel/kheaders.tar.xz"
        archive.parent.mkdir(parents=True)
        archive.touch()
        assert bcc.headers_problem({}, tmp_path) is None

    def test_the_environment_goes_first(self, tmp_path: Path) -> None:
        headers(tmp_path / "lib/modules" / RELEASE / "build")
        named = {"BCC_KERNEL_SOURCE": str(tmp_path / "mine")}
        problem = bcc.headers_problem(named, tmp_path)
        assert problem is not None
        assert problem.startswith(f"BCC_KERNEL_SOURCE={tmp_path}/mine holds no kernel headers")
        headers(tmp_path / "mine")
        assert bcc.headers_problem(named, tmp_path) is None

    def test_the_script_keeps_what_it_has(self, tmp_path: Path) -> None:
        """A whole folder is named again, and nothing is fetched: no network is needed."""
        own = Path("/lib/modules") / RELEASE / "build"
        expected = own if (own / "include/linux/kconfig.h").exists() else headers(tmp_path / "headers")
        result = subprocess.run(
            [ROOT / "scripts" / "bcc-headers", tmp_path], capture_output=True, text=True, check=True
        )
        assert result.stdout == f"{expected}\n"
        assert result.stderr == ""


class TestConfig:
    def test_the_initialiser_is_c(self) -> None:
        text = bcc.config_initialiser({"node_port_min": 30000, "host_netns": 1 << 40})
        assert text == (
            f"{{.node_port_min=30000ULL,.host_netns=1099511627776ULL,.abi={lib.ABI_VERSION}ULL,"
            f'.stamp="{STAMP}"}}'
        )

    @pytest.mark.parametrize(
        ("config", "error"), [({"node_port": 1}, KeyError), ({"node_port_min": 1 << 16}, OverflowError)]
    )
    def test_names_and_ranges_are_those_of_the_struct(
        self, config: dict[str, int], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            bcc.config_initialiser(config)


class TestStamp:
    def test_the_first_line_of_a_text(self, tmp_path: Path) -> None:
        text = tmp_path / "tc_lb.bcc.c"
        text.write_text("/* stamp: 1.2.3+0123456789ab */\nint x;\n")
        assert bcc.text_stamp(text) == "1.2.3+0123456789ab"
        text.write_text("int x;\n")
        assert bcc.text_stamp(text) == "none"

    def test_another_one_is_refused(self) -> None:
        check_stamp(Path("tc_lb.bpf.o"), STAMP)
        message = f"load tc_lb.bpf.o: it has stamp 1.2.3, this agent {STAMP}; run `make build`"
        with pytest.raises(LoadError, match=re.escape(message)):
            check_stamp(Path("tc_lb.bpf.o"), "1.2.3")
