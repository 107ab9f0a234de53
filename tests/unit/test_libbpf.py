"""What of the binding needs no kernel: layouts, the Maglev table, stamps, messages."""

from __future__ import annotations

import errno
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpfproxy
from ebpfproxy.errors import KernelError, LoadError
from ebpfproxy.libbpf import STAMP, Map, MapDefinition, Object, check, ffi, lib
from ebpfproxy.libbpf.objects import log_tail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
ABI = ROOT / "bpf" / "lib" / "abi.h"
STRUCTS = re.findall(r"^struct (\w+) \{", ABI.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def every_struct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Object]:
    """An object that has a variable of every struct of abi.h, built as all programs are."""
    folder = tmp_path_factory.mktemp("layouts")
    variables = "".join(f"struct {name} a_{name};\n" for name in STRUCTS)
    (folder / "layouts.bpf.c").write_text(f'#include "platform.h"\n{variables}LICENSE("GPL");\n')
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "bpf"), f"OUT={folder}", f"SOURCES={folder}/layouts.bpf.c",
         f"PYTHON={sys.executable}", f"{folder}/layouts.bpf.o"],
        check=True,
    )  # fmt: skip
    with Object(folder / "layouts.bpf.o") as opened:
        yield opened


def fields(struct: str) -> dict[str, int]:
    """Return the offsets of a struct's members as the agent sees them."""
    return {name: field.offset for name, field in ffi.typeof(f"struct {struct}").fields}


class TestLayouts:
    @pytest.mark.parametrize("struct", STRUCTS)
    def test_clang_and_cffi_agree(self, every_struct: Object, struct: str) -> None:
        assert every_struct.layout(struct) == (ffi.sizeof(f"struct {struct}"), fields(struct))

    @pytest.mark.parametrize("struct", STRUCTS)
    def test_no_byte_is_unnamed(self, struct: str) -> None:
        members = ffi.typeof(f"struct {struct}").fields
        assert sum(ffi.sizeof(field.type) for _, field in members) == ffi.sizeof(f"struct {struct}")

    def test_a_struct_that_is_not_there(self, every_struct: Object) -> None:
        assert every_struct.layout("nothing") is None

    def test_an_object_is_what_its_source_says(self, every_struct: Object) -> None:
        assert every_struct.maps == {}
        assert every_struct.programs == {}
        with pytest.raises(LoadError, match="has no constant struct addr config; run `make build`"):
            every_struct.constant("config", "struct addr")
        assert every_struct.constant("config", "struct config").abi == lib.ABI_VERSION


class TestStamp:
    def test_it_is_version_and_checksum(self) -> None:
        assert f"{ebpfproxy.__version__}+{hashlib.sha256(ABI.read_bytes()).hexdigest()[:12]}" == STAMP
        assert len(STAMP) < lib.STAMP_MAX

    def test_objects_carry_the_same(self, every_struct: Object) -> None:
        config = every_struct.constant("config", "struct config")
        assert ffi.string(ffi.cast("char *", config.stamp)).decode() == STAMP


def maglev_table(size: int, permutations: Sequence[tuple[int, int]]) -> list[int]:
    """Return the table as the pseudocode of the Maglev paper fills it (NSDI 2016, section 3.4)."""
    permutation = [[(offset + j * skip) % size for j in range(size)] for offset, skip in permutations]
    following = [0] * len(permutations)
    entry = [-1] * size
    filled = 0
    while True:
        for i in range(len(permutations)):
            c = permutation[i][following[i]]
            while entry[c] >= 0:
                following[i] += 1
                c = permutation[i][following[i]]
            entry[c] = i
            following[i] += 1
            filled += 1
            if filled == size:
                return entry


def fill(size: int, permutations: Sequence[tuple[int, int]]) -> list[int]:
    table = ffi.new("uint32_t[]", size)
    offsets = ffi.new("uint32_t[]", [offset for offset, _ in permutations])
    skips = ffi.new("uint32_t[]", [skip for _, skip in permutations])
    lib.maglev_fill(table, size, offsets, skips, len(permutations))
    return list(table)


@st.composite
def maglev_inputs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw(st.sampled_from([2, 7, 13, 251]))
    pair = st.tuples(st.integers(0, size - 1), st.integers(1, size - 1))
    return size, draw(st.lists(pair, min_size=1, max_size=12))


class TestMaglev:
    def test_the_example_of_the_paper(self) -> None:
        # Table 1 of the paper: permutations of B0, B1, B2 for a table of 7, and the table that results.
        assert fill(7, [(3, 4), (0, 2), (3, 1)]) == [1, 0, 1, 0, 2, 2, 0]

    @given(maglev_inputs())
    def test_it_is_the_table_of_the_pseudocode(self, given_: tuple[int, list[tuple[int, int]]]) -> None:
        assert fill(*given_) == maglev_table(*given_)

    @given(maglev_inputs())
    def test_shares_differ_by_one_at_most(self, given_: tuple[int, list[tuple[int, int]]]) -> None:
        size, permutations = given_
        shares = Counter(fill(size, permutations))
        counts = [shares[n] for n in range(len(permutations))]
        assert max(counts) - min(counts) <= 1


class TestMessages:
    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (errno.ENOENT, "open it: No such file or directory"),
            (errno.EPERM, "open it: Operation not permitted: this needs root"),
            (524, "open it: not supported by this kernel"),
        ],
    )
    def test_operation_and_reason(self, number: int, text: str) -> None:
        with pytest.raises(KernelError, match=re.escape(text)) as caught:
            check(-number, "open it")
        assert caught.value.errno == number
        assert check(7, "open it") == 7

    def test_the_last_lines_of_a_log_without_statistics(self) -> None:
        log = "\n".join(
            [*(f"{n}: r0 = 0" for n in range(100)), "", "R1 invalid mem access", "processed 9 insns"]
        )
        lines = log_tail(log).splitlines()
        assert len(lines) == 20
        assert lines[-1].strip() == "R1 invalid mem access"

    def test_a_map_that_nobody_may_create(self) -> None:
        with pytest.raises(KernelError, match="create map nothing: "):
            Map.create(MapDefinition("nothing", 9999, 4, 4, 1, 0))


def test_reading_commands_start_fast() -> None:
    """The binding pulls in nothing that a reading command would wait for."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, ebpfproxy.libbpf; print(*sys.modules)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.split()  # fmt: skip
    assert not {"cffi", "pycparser", "msgspec", "pyroute2", "yaml", "asyncio", "subprocess"} & set(loaded)
