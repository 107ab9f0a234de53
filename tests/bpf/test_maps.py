"""Maps, programs and links in the kernel."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy.errors import KernelError, MapFullError, UnsupportedError
from ebpfproxy.libbpf import TCX_INGRESS, Link, Map, MapDefinition, Object, Program, lib, maps
from ebpfproxy.libbpf import probes as kernel
from rig.process import Place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rig.kernel import Netns

pytestmark = pytest.mark.root

HASH = MapDefinition("names", lib.BPF_MAP_TYPE_HASH, 4, 8, 64, lib.BPF_F_NO_PREALLOC)
LRU = MapDefinition("flows", lib.BPF_MAP_TYPE_LRU_HASH, 16, 8, 1024, 0)
TRIE = MapDefinition("prefixes", lib.BPF_MAP_TYPE_LPM_TRIE, 20, 4, 64, lib.BPF_F_NO_PREALLOC)
ARRAY = MapDefinition("slots", lib.BPF_MAP_TYPE_ARRAY, 4, 4, 600, lib.BPF_F_MMAPABLE)
COUNTS = MapDefinition("verdicts", lib.BPF_MAP_TYPE_PERCPU_ARRAY, 4, 8, 4, 0)


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, sys.byteorder)


def entries(definition: MapDefinition, count: int) -> dict[bytes, bytes]:
    """Return ``count`` different entries that fit a map."""
    if definition.type == lib.BPF_MAP_TYPE_LPM_TRIE:
        keys = [number(128, 4) + bytes(12) + n.to_bytes(4, "big") for n in range(count)]
    else:
        keys = [number(n, definition.key_size) for n in range(count)]
    return {key: number(n + 1, definition.value_size) for n, key in enumerate(keys)}


@pytest.fixture(params=[HASH, LRU, TRIE], ids=lambda definition: definition.name)
def hashlike(request: pytest.FixtureRequest) -> Iterator[Map]:
    with Map.create(request.param) as made:
        yield made


@pytest.fixture
def without_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has no batch operations (before 5.6)."""

    class Old:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: -errno.EINVAL) if name.endswith("_batch") else getattr(lib, name)

    monkeypatch.setattr(maps, "lib", Old())


class TestOneEntry:
    def test_an_entry_is_written_read_and_removed(self, hashlike: Map) -> None:
        (key, value), *_ = entries(hashlike.definition, 1).items()
        assert hashlike.get(key) is None
        hashlike.update(key, value)
        assert hashlike.get(key) == value
        assert hashlike.delete(key)
        assert not hashlike.delete(key)
        assert hashlike.get(key) is None

    def test_noexist_keeps_what_is_there(self) -> None:
        with Map.create(HASH) as names:
            names.update(number(1, 4), number(10, 8))
            with pytest.raises(KernelError, match="update map names: File exists") as caught:
                names.update(number(1, 4), number(11, 8), lib.BPF_NOEXIST)
            assert caught.value.errno == errno.EEXIST
            assert names.get(number(1, 4)) == number(10, 8)

    @pytest.mark.parametrize(
        ("key", "value"), [(b"123", bytes(8)), (b"1234", bytes(7)), (b"12345", bytes(8))]
    )
    def test_keys_and_values_of_another_size_never_reach_the_kernel(self, key: bytes, value: bytes) -> None:
        with Map.create(HASH) as names, pytest.raises(ValueError, match="map names"):
            names.update(key, value)

    def test_a_trie_finds_the_longest_prefix(self) -> None:
        def key(bits: int, *address: int) -> bytes:
            return number(bits, 4) + bytes(12) + bytes(address)

        with Map.create(TRIE) as prefixes:
            prefixes.update(key(96 + 8, 10, 0, 0, 0), number(8, 4))
            prefixes.update(key(96 + 24, 10, 1, 2, 0), number(24, 4))
            assert prefixes.get(key(128, 10, 1, 2, 3)) == number(24, 4)
            assert prefixes.get(key(128, 10, 1, 3, 3)) == number(8, 4)
            assert prefixes.get(key(128, 11, 1, 2, 3)) is None


class TestManyEntries:
    def test_what_is_written_in_bulk_is_read_in_bulk(self, hashlike: Map) -> None:
        wanted = entries(hashlike.definition, 60)
        hashlike.update_batch(wanted)
        assert dict(hashlike.items()) == wanted
        assert hashlike.count() == 60

    @pytest.mark.usefixtures("without_batches")
    def test_so_it_is_without_batch_operations(self, hashlike: Map) -> None:
        wanted = entries(hashlike.definition, 60)
        hashlike.update_batch(wanted)
        assert dict(hashlike.items()) == wanted
        assert hashlike.count() == 60
        assert hashlike.delete_batch([*wanted, *wanted]) == 60
        assert hashlike.items() == []

    def test_a_bulk_larger_than_one_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(maps, "BATCH_BYTES", 1000)
        big = HASH._replace(max_entries=10_000)
        wanted = entries(big, 9_000)
        with Map.create(big) as names:
            names.update_batch(wanted)
            assert dict(names.items()) == wanted
            assert sum(len(chunk) for chunk in names.chunks(100)) == 9_000

    def test_removal_passes_over_keys_that_are_not_there(self, hashlike: Map) -> None:
        wanted = entries(hashlike.definition, 30)
        keys = list(wanted)
        hashlike.update_batch({key: wanted[key] for key in keys[::3]})
        assert hashlike.delete_batch(keys) == 10
        assert hashlike.count() == 0

    def test_nothing_is_nothing(self, hashlike: Map) -> None:
        hashlike.update_batch({})
        assert hashlike.delete_batch([]) == 0
        assert hashlike.items() == []

    def test_array_items_are_every_index(self) -> None:
        with Map.create(ARRAY) as slots:
            slots.update(number(5, 4), number(77, 4))
            found = slots.items()
            assert [key for key, _ in found] == [number(n, 4) for n in range(600)]
            assert [n for n, (_, value) in enumerate(found) if any(value)] == [5]
            assert slots.count() == 600

    @pytest.mark.parametrize("kind", [lib.BPF_MAP_TYPE_HASH, lib.BPF_MAP_TYPE_LRU_HASH])
    def test_a_large_map_is_estimated_from_a_part(self, kind: int) -> None:
        """The error is about 1/sqrt(2000), 2.2 %; the hash has another seed each time."""
        with Map.create(HASH._replace(type=kind, max_entries=50_000, flags=0)) as names:
            for count in (0, 1999, 20_000):
                names.update_batch(entries(names.definition, count))
                assert names.estimate(2000) == pytest.approx(count, rel=0 if count < 2000 else 0.12)
                assert names.estimate() == count, "it fits into one part"

    def test_a_small_map_is_counted(self, hashlike: Map) -> None:
        hashlike.update_batch(entries(hashlike.definition, 9))
        assert hashlike.estimate() == 9


class TestFull:
    @pytest.mark.parametrize("batch", [True, False], ids=["bulk", "single"])
    @pytest.mark.parametrize("definition", [HASH, TRIE], ids=lambda definition: definition.name)
    def test_the_error_names_map_limit_and_setting(self, definition: MapDefinition, batch: bool) -> None:
        with Map.create(definition) as full:
            wanted = entries(definition, 65)

            def write() -> None:
                if batch:
                    full.update_batch(wanted)
                for key, value in wanted.items():
                    full.update(key, value)

            with pytest.raises(MapFullError) as caught:
                write()
            assert str(caught.value) == (
                f"update map {definition.name}: all 64 entries are in use; "
                f"raise ebpfproxy.mapSizes.{definition.name} in the configuration"
            )
            assert full.count() == 64, "what fitted stays"

    def test_an_array_has_no_index_beyond_its_end(self) -> None:
        with (
            Map.create(ARRAY) as slots,
            pytest.raises(
                MapFullError, match=r"index beyond its 600 entries; raise ebpfproxy\.mapSizes\.slots"
            ),
        ):
            slots.update(number(600, 4), bytes(4))


class TestMemory:
    def test_memory_and_system_calls_see_the_same(self) -> None:
        with Map.create(ARRAY) as slots:
            view = slots.mmap()
            assert len(view) == 600 * slots.stride == 4800  # values of 4 bytes lie 8 bytes apart
            view[8 * 7 : 8 * 7 + 4] = number(77, 4)
            assert slots.get(number(7, 4)) == number(77, 4)
            slots.update(number(8, 4), number(88, 4))
            assert bytes(view[64:68]) == number(88, 4)
            assert slots.mmap() is view

    def test_closing_frees_the_memory_also_with_a_slice_left(self) -> None:
        slots = Map.create(ARRAY)
        left = slots.mmap()[:8]
        slots.close()
        slots.close()
        assert bytes(left) == bytes(8)

    def test_other_maps_have_none(self) -> None:
        with (
            Map.create(HASH) as names,
            pytest.raises(KernelError, match="names into memory: it lacks BPF_F_MMAPABLE"),
        ):
            names.mmap()


class TestPerCpu:
    def test_values_of_all_cpus_are_summed(self) -> None:
        cpus = lib.libbpf_num_possible_cpus()
        with Map.create(COUNTS) as verdicts:
            verdicts.update(number(2, 4), b"".join(number(n + 1, 8) for n in range(cpus)))
            assert verdicts.get_percpu_sums(number(2, 4))[0] == cpus * (cpus + 1) // 2
            assert verdicts.get_percpu_sums(number(3, 4))[0] == 0
            assert [len(value) for _, value in verdicts.items()] == [8 * cpus] * 4


class TestPins:
    def test_a_pinned_map_outlives_its_descriptor(self, bpffs: Path) -> None:
        with Map.create(HASH) as names:
            names.update(number(1, 4), number(10, 8))
            names.pin(bpffs / "names")
        with Map.open(bpffs / "names") as again:
            assert again.definition == HASH
            assert again.get(number(1, 4)) == number(10, 8)

    def test_nothing_there(self, bpffs: Path) -> None:
        with pytest.raises(KernelError, match=r"open pinned map .*/none: No such file") as caught:
            Map.open(bpffs / "none")
        assert caught.value.errno == errno.ENOENT

    def test_what_bpftool_sees(self, bpffs: Path) -> None:
        with Map.create(LRU) as flows:
            flows.pin(bpffs / "flows")
            flows.update(bytes(16), number(7, 8))
        shown = subprocess.run(
            ["bpftool", "--json", "map", "show", "pinned", str(bpffs / "flows")],
            capture_output=True,
            check=True,
        )
        found = json.loads(shown.stdout)
        fields = ("name", "type", "bytes_key", "bytes_value", "max_entries")
        assert [found[field] for field in fields] == ["flows", "lru_hash", 16, 8, 1024]


CONNECT = """
import errno, socket, sys
s = socket.socket()
print(errno.errorcode[s.connect_ex(("127.0.0.1", int(sys.argv[1])))] )
"""


@pytest.fixture
def sample(objects: Path) -> Iterator[Object]:
    with Object(objects / "sample.bpf.o") as opened:
        opened.constant("config", "struct config").node_port_min = 9
        opened.load()
        yield opened


@pytest.fixture
def refusing(sample: Object) -> Iterator[Program]:
    """Refuses connections to port 9."""
    with sample.program("sock_sample") as program:
        yield program


class TestLinks:
    """Nothing listens on ports 9 and 1 of loopback: a connection is refused, by whom is the question."""

    @staticmethod
    def connect(cgroup: Path, port: int) -> str:
        return Place(cgroup=cgroup).run(sys.executable, "-c", CONNECT, str(port)).stdout.strip()

    def test_a_link_works_in_its_cgroup_until_it_is_detached(self, refusing: Program, cgroup: Path) -> None:
        assert self.connect(cgroup, 9) == "ECONNREFUSED"
        with Link.attach_cgroup(refusing, cgroup) as link:
            assert self.connect(cgroup, 9) == "EPERM"
            assert self.connect(cgroup, 1) == "ECONNREFUSED"
            info = link.info()
            assert info.program_id == refusing.id
            assert info.attach_type == lib.BPF_CGROUP_INET4_CONNECT
            assert info.cgroup_id == cgroup.stat().st_ino
            link.detach()
            assert self.connect(cgroup, 9) == "ECONNREFUSED"
            assert link.info().cgroup_id == 0

    def test_a_pinned_link_outlives_us_and_its_program_can_be_swapped(
        self, refusing: Program, cgroup: Path, bpffs: Path, objects: Path
    ) -> None:
        with Link.attach_cgroup(refusing, cgroup) as link:
            link.pin(bpffs / "connect4")
        assert self.connect(cgroup, 9) == "EPERM"
        with Object(objects / "sample.bpf.o") as other, Link.open(bpffs / "connect4") as link:
            other.constant("config", "struct config").node_port_min = 1
            other.load()
            with other.program("sock_sample") as program:
                link.update(program)
                assert link.info().program_id == program.id
            assert self.connect(cgroup, 9) == "ECONNREFUSED"
            assert self.connect(cgroup, 1) == "EPERM"
        (bpffs / "connect4").unlink()
        assert self.connect(cgroup, 1) == "ECONNREFUSED"

    def test_a_folder_that_is_no_cgroup(self, refusing: Program, tmp_path: Path) -> None:
        with pytest.raises(
            UnsupportedError, match=f"attach program sock_sample to cgroup {tmp_path}.*--cgroup"
        ):
            Link.attach_cgroup(refusing, tmp_path)
        with pytest.raises(KernelError, match="No such file") as caught:
            Link.attach_cgroup(refusing, tmp_path / "none")
        assert caught.value.errno == errno.ENOENT

    @pytest.mark.skipif(not kernel.has_tcx(), reason="tcx links came with Linux 6.6")
    def test_a_device_link(self, sample: Object, netns: Netns, bpffs: Path) -> None:
        with sample.program("tc_sample") as program:
            program.pin(bpffs / "program")
        attach = (
            "import sys; from ebpfproxy.libbpf import Link, Program\n"
            "Link.attach_tcx(Program.open(sys.argv[1]), 1, int(sys.argv[2])).pin(sys.argv[3])\n"
        )
        netns.place().run(
            sys.executable, "-c", attach, bpffs / "program", str(TCX_INGRESS), bpffs / "link",
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        with sample.map("counts") as counts, Link.open(bpffs / "link") as link:
            assert (link.info().ifindex, link.info().attach_type) == (1, TCX_INGRESS)
            send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))"
            netns.place().run(sys.executable, "-c", send)
            not_ours = number(lib.VERDICT_NOT_OURS, 4)
            assert counts.get_percpu_sums(not_ours)[0] == 2, (
                "the datagram and the ICMP error come in on loopback"
            )


class TestProgram:
    def test_it_is_what_was_loaded(self, sample: Object) -> None:
        with sample.program("tc_sample") as program:
            assert program.type == lib.BPF_PROG_TYPE_SCHED_CLS
            assert len(program.tag) == 16
        with sample.program("sock_sample") as program:
            assert program.attach_type == lib.BPF_CGROUP_INET4_CONNECT

    def test_a_run_gives_back_the_packet(self, sample: Object) -> None:
        with sample.program("tc_sample") as program:
            frame = bytes(range(64))
            result = program.run(frame, repeat=3)
            assert (result.retval, result.data) == (0, frame)

    def test_each_of_several_frames_is_run_once(self) -> None:
        frames = [bytes([number] * 64) for number in range(5)]
        with Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_XDP, 0, 2)) as program:
            assert [result for result, _ in program.time_each(frames)] == [2] * 5
            with pytest.raises(KernelError, match="run program probe on 5 frames of 4 bytes"):
                program.time_each([bytes(4)] * 5)

    def test_the_context_reaches_the_program(self, sample: Object) -> None:
        with sample.program("tc_plain") as program, sample.map("plain") as plain:
            # struct __sk_buff: len, pkt_type, mark (uapi/linux/bpf.h)
            program.run(bytes(64), ctx=number(0, 4) + number(0, 4) + number(42, 4))
            assert plain.get(number(0, 4)) == number(42, 4)

    def test_a_device_that_does_not_exist(self, sample: Object) -> None:
        taken = {index for index, _ in socket.if_nameindex()}
        free = next(index for index in itertools.count(1000) if index not in taken)
        with (
            sample.program("tc_plain") as program,
            pytest.raises(KernelError, match="run program tc_plain on 64 bytes"),
        ):
            program.run(bytes(64), ifindex=free)


class TestProbes:
    def test_a_kernel_that_runs_these_tests_has_what_they_use(self) -> None:
        assert kernel.has_map_type(lib.BPF_MAP_TYPE_LPM_TRIE)
        assert kernel.has_program_type(lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR)
        assert kernel.has_helper(lib.BPF_PROG_TYPE_SCHED_CLS, lib.BPF_FUNC_csum_diff)
        assert kernel.has_mmapable_arrays()

    def test_what_no_kernel_has(self) -> None:
        assert not kernel.has_map_type(1_000)
        assert not kernel.has_program_type(1_000)
        # A packet has no return value of a system call: bpf_set_retval is for cgroup programs.
        assert not kernel.has_helper(lib.BPF_PROG_TYPE_XDP, 187)
