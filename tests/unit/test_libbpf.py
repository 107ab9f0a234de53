"""What of the binding needs no kernel: layouts, the Maglev table, stamps, messages."""

from __future__ import annotations

import errno
import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
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
    from collections.abc import Iterator

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


Permutations = list[tuple[int, int]]


def maglev_table(size: int, permutations: Permutations) -> list[int]:
    """Return the table for equal weights: each wish in the order of how much it is wished.

    The permutations are the Maglev paper's (NSDI 2016, section 3.4). A backend with its share wishes no more.
    """
    count = len(permutations)
    ends = [(n + 1) * (size - count) // count for n in range(count)]
    left = [1 + end - start for start, end in pairwise([0, *ends])]
    wishes = sorted(
        (rank, backend, (offset + rank * skip) % size)
        for backend, (offset, skip) in enumerate(permutations)
        for rank in range(size)
    )
    entry = [-1] * size
    for _, backend, place in wishes:
        if entry[place] < 0 and left[backend]:
            entry[place] = backend
            left[backend] -= 1
    return entry


def fill(size: int, permutations: Permutations, weights: list[int] | None = None) -> list[int]:
    offsets, skips = zip(*permutations, strict=True)
    count = len(permutations)
    table = ffi.new("uint32_t[]", size)
    names = list(range(count))
    assert lib.maglev_fill(table, size, names, offsets, skips, weights or [1] * count, count) == 0
    return list(table)


@st.composite
def maglev_inputs(draw: st.DrawFn) -> tuple[int, Permutations]:
    size = draw(st.sampled_from([13, 31, 251]))
    pair = st.tuples(st.integers(0, size - 1), st.integers(1, size - 1))
    return size, draw(st.lists(pair, min_size=1, max_size=13))


class TestMaglev:
    def test_the_permutations_of_the_paper(self) -> None:
        # Table 1 of the paper: B0 wants 3 0 4 1 5 2 6, B1 0 2 4 6 1 3 5, B2 3 4 5 6 0 1 2. By hand, shares
        # are 2, 2 and 3: B0 gets 3, its first wish, and 1, its fourth; B1 0 and 2; B2 what is left: 4 5 6.
        assert fill(7, [(3, 4), (0, 2), (3, 1)]) == [1, 0, 1, 0, 2, 2, 2]

    @given(maglev_inputs())
    def test_a_place_goes_to_who_wants_it_most(self, given_: tuple[int, Permutations]) -> None:
        assert fill(*given_) == maglev_table(*given_)

    @given(maglev_inputs())
    def test_shares_differ_by_one_at_most(self, given_: tuple[int, Permutations]) -> None:
        size, permutations = given_
        shares = Counter(fill(size, permutations))
        counts = [shares[n] for n in range(len(permutations))]
        assert max(counts) - min(counts) <= 1

    @given(maglev_inputs(), st.data())
    def test_shares_follow_weights(self, given_: tuple[int, Permutations], data: st.DataObject) -> None:
        size, permutations = given_
        count = len(permutations)
        weights = data.draw(st.lists(st.integers(1, 65535), min_size=count, max_size=count))
        shares = Counter(fill(size, permutations, weights))
        for number, weight in enumerate(weights):
            assert abs(shares[number] - 1 - (size - count) * weight / sum(weights)) < 1

    def test_weights_are_relative(self) -> None:
        permutations = [(3, 4), (0, 2), (3, 1)]
        assert fill(251, permutations, [200, 100, 300]) == fill(251, permutations, [2, 1, 3])


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
