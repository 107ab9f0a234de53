"""Both loaders: the same programs, the same pinned maps, the same refusals."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw, raw

from ebpfproxy.errors import ConfigError, LayoutError, LoadError, UnsupportedError
from ebpfproxy.libbpf import STAMP, Map, MapDefinition, lib
from ebpfproxy.loader import Loaded, Loader, LoadOptions
from ebpfproxy.loader.bcc import BccLoader
from ebpfproxy.loader.libbpf import LibbpfLoader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

LOADERS: dict[str, type[Loader]] = {"libbpf": LibbpfLoader, "bcc": BccLoader}
NAMES = ["counts", "flows", "names", "places", "plain", "prefixes"]


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, sys.byteorder)


def prefix(bits: int, *address: int) -> bytes:
    """Return a key of map prefixes: an IPv4 prefix among IPv6 ones."""
    return number(96 + bits, 4) + bytes(10) + b"\xff\xff" + bytes(address)


class Rig:
    """Loads the test programs with one loader; pins in a bpffs of its own."""

    def __init__(self, loader: Loader, bpffs: Path, objects: Path) -> None:
        self.loader = loader
        self.bpffs = bpffs
        self.pins = bpffs / "ebpfproxy" / "maps"
        self.objects = objects

    @contextmanager
    def load(self, *names: str, **options: Any) -> Iterator[Loaded]:
        wanted = LoadOptions(
            maps_dir=self.pins, objects=names or ("sample",), **{"directory": self.objects, **options}
        )
        loaded = self.loader.load(wanted)
        try:
            yield loaded
        finally:
            loaded.close()

    def try_load(self, *names: str, **options: Any) -> None:
        with self.load(*names, **options):
            pass

    def left(self) -> list[str]:
        """Return all that is on the bpffs, apart from the kernel's own."""
        found = (str(path.relative_to(self.bpffs)) for path in self.bpffs.rglob("*"))
        return sorted(path for path in found if not path.endswith(".debug"))


@pytest.fixture(params=LOADERS)
def rig(request: pytest.FixtureRequest, bpffs: Path, objects: Path, headers: None) -> Rig:
    return Rig(LOADERS[request.param](), bpffs, objects)


class TestPrograms:
    def test_what_is_loaded(self, rig: Rig) -> None:
        assert rig.loader.usable() is None
        with rig.load() as loaded:
            assert loaded.loader == rig.loader.name
            assert sorted(loaded.maps) == NAMES
            assert {name: (p.name, p.type, p.attach_type) for name, p in loaded.programs.items()} == {
                "sock_sample": (
                    "sock_sample",
                    lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
                    lib.BPF_CGROUP_INET4_CONNECT,
                ),
                "tc_sample": ("tc_sample", lib.BPF_PROG_TYPE_SCHED_CLS, 0),
                "tc_plain": ("tc_plain", lib.BPF_PROG_TYPE_SCHED_CLS, 0),
            }
        pinned = ["ebpfproxy", "ebpfproxy/maps", *(f"ebpfproxy/maps/{name}" for name in NAMES)]
        assert rig.left() == pinned

    def test_maps_helpers_and_constants_work(self, rig: Rig) -> None:
        frame = Ether() / IP(src="198.51.100.7", dst="203.0.113.1") / UDP(sport=1, dport=2) / Raw(b"hello")
        foreign = raw(Ether() / IP(src="192.0.2.1", dst="203.0.113.1") / UDP() / Raw(b"hello"))
        with rig.load(config={"node_port_max": 4711}) as loaded:
            loaded.maps["prefixes"].update(prefix(24, 198, 51, 100, 0), number(1, 4))
            program = loaded.programs["tc_sample"]

            first, second = program.run(raw(frame)), program.run(raw(frame))
            assert first.retval == second.retval == 4711
            assert first.data == second.data
            got = IP(first.data[14:])
            assert got.dst == "10.0.0.1"
            right = got.copy()
            del right.chksum
            assert got.chksum == IP(raw(right)).chksum

            other = program.run(foreign)
            assert (other.retval, other.data) == (0, foreign)

            counted = {
                n: loaded.maps["counts"].get_percpu_sums(number(n, 4))[0] for n in range(lib.VERDICT_MAX)
            }
            assert {n: count for n, count in counted.items() if count} == {
                lib.VERDICT_NEW: 1,  # BPF_NOEXIST took it
                lib.VERDICT_ESTABLISHED: 1,  # BPF_NOEXIST found it
                lib.VERDICT_NOT_OURS: 1,
            }
            ((source, first_seen_ns),) = loaded.maps["flows"].items()
            assert source == bytes(10) + b"\xff\xff" + bytes([198, 51, 100, 7])
            assert int.from_bytes(first_seen_ns, sys.byteorder) > 0
            total = loaded.maps["places"].mmap()[:4]
            assert int.from_bytes(total, sys.byteorder) == 2 * len(raw(frame))
            total.release()

    def test_two_objects_share_their_maps(self, rig: Rig, tmp_path: Path) -> None:
        for kind in ("bpf.o", "bcc.c"):
            for name in ("sample", "other"):
                shutil.copy(rig.objects / f"sample.{kind}", tmp_path / f"{name}.{kind}")
        with rig.load("sample", "other", directory=tmp_path) as loaded:
            assert sorted(loaded.maps) == NAMES


class TestTakeOver:
    def test_a_second_run_finds_the_entries_of_the_first(self, rig: Rig) -> None:
        with rig.load() as first:
            first.maps["names"].update(number(1, 4), number(10, 8))
            first.maps["places"].update(number(3, 4), number(30, 4))
        with rig.load() as second:
            second.finish()
            assert second.maps["names"].items() == [(number(1, 4), number(10, 8))]
            assert second.maps["places"].get(number(3, 4)) == number(30, 4)

    def test_either_loader_takes_over_from_the_other(self, bpffs: Path, objects: Path, headers: None) -> None:
        for before, after in ((LibbpfLoader(), BccLoader()), (BccLoader(), LibbpfLoader())):
            with Rig(before, bpffs, objects).load() as first:
                first.maps["names"].update(number(1, 4), number(10, 8))
                with Rig(after, bpffs, objects).load() as second:
                    assert second.maps["names"].delete(number(1, 4))
                    assert first.maps["names"].items() == []

    def test_a_run_that_died_half_way_is_no_obstacle(self, rig: Rig) -> None:
        folder = rig.pins.with_name("maps-new")
        (folder / "programs").mkdir(parents=True)
        with Map.create(MapDefinition("names", lib.BPF_MAP_TYPE_HASH, 1, 1, 1, 0)) as left:
            left.pin(folder / "names")
            left.pin(folder / "programs" / "names")
        rig.try_load()
        assert rig.left() == ["ebpfproxy", "ebpfproxy/maps", *(f"ebpfproxy/maps/{name}" for name in NAMES)]


class TestKept:
    """Programs of an earlier run are taken over if the very same would be loaded."""

    def test_what_makes_other_programs(self, rig: Rig) -> None:
        kept = rig.bpffs / "ebpfproxy" / "programs"

        def ids(**options: Any) -> dict[str, int]:
            with rig.load(programs_dir=kept, **options) as loaded:
                return {name: each.id for name, each in loaded.programs.items()}

        first = ids()
        assert ids() == first
        for other in ({"config": {"node_port_max": 4711}}, {"sizes": {"names": 100}}):
            changed = ids(**other)
            assert not set(changed.values()) & set(first.values())
            assert ids(**other) == changed
            (only,) = kept.iterdir()
            assert {path.name for path in only.iterdir()} == set(changed)

    def test_nothing_is_kept_unless_asked_for(self, rig: Rig) -> None:
        with rig.load() as first, rig.load() as second:
            assert not {p.id for p in first.programs.values()} & {p.id for p in second.programs.values()}


class TestResize:
    @pytest.mark.parametrize("size", [33, 128], ids=["smaller", "larger"])
    def test_all_entries_move(self, rig: Rig, size: int) -> None:
        names = {number(n, 4): number(n + 1, 8) for n in range(33)}
        places = {number(n, 4): number(n + 1, 4) for n in range(33)}
        with rig.load() as first:
            for name, entries in (("names", names), ("places", places), ("plain", places)):
                first.maps[name].update_batch(entries)
            first.maps["prefixes"].update(prefix(24, 198, 51, 100, 0), number(7, 4))
        sizes = {"names": size, "places": size, "plain": size, "prefixes": size, "flows": 4 * size}
        with rig.load(sizes=sizes) as second:
            second.finish()
            assert {name: second.maps[name].max_entries for name in sizes} == sizes
            assert dict(second.maps["names"].items()) == names
            for name in ("places", "plain"):
                found = dict(second.maps[name].items())
                assert len(found) == size
                assert {key: value for key, value in found.items() if any(value)} == places
            assert second.maps["prefixes"].items() == [(prefix(24, 198, 51, 100, 0), number(7, 4))]
            # It is these maps that the programs use.
            second.programs["tc_sample"].run(raw(Ether() / IP(src="198.51.100.7") / UDP()))
            assert second.maps["flows"].count() == 1
        with Map.open(rig.pins / "names") as pinned:
            assert pinned.max_entries == size
        assert not any("maps-" in path for path in rig.left())

    def test_an_lru_map_loses_nothing(self, rig: Rig) -> None:
        flows = {n.to_bytes(16, "big"): number(n, 8) for n in range(500)}
        with rig.load() as first:
            first.maps["flows"].update_batch(flows)
        with rig.load(sizes={"flows": 2048}) as second:
            assert dict(second.maps["flows"].items()) == flows

    def test_what_attached_programs_write_meanwhile_arrives_too(self, rig: Rig) -> None:
        with rig.load() as first:
            first.maps["names"].update(number(1, 4), number(1, 8))
            with rig.load(sizes={"names": 100}) as second:
                first.maps["names"].update(number(2, 4), number(2, 8))
                second.maps["names"].update(number(1, 4), number(11, 8))
                second.finish()
                assert dict(second.maps["names"].items()) == {
                    number(1, 4): number(11, 8),  # what is newer stays
                    number(2, 4): number(2, 8),
                }
        assert not any("maps-" in path for path in rig.left())

    def test_it_arrives_also_when_the_run_died_in_between(self, rig: Rig) -> None:
        with rig.load() as attached:
            rig.try_load(sizes={"names": 100})
            attached.maps["names"].update(number(1, 4), number(1, 8))
            rig.try_load(sizes={"names": 200})
            with rig.load(sizes={"names": 200}) as last:
                assert last.maps["names"].items() == [(number(1, 4), number(1, 8))]
                last.finish()
                assert last.maps["names"].items() == [(number(1, 4), number(1, 8))]
        assert not any("maps-" in path for path in rig.left())

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "names",
                (
                    "shrink map names from 64 to 40 entries: 41 are in use; "
                    "set ebpfproxy.mapSizes.names to at least 41"
                ),
            ),
            (
                "places",
                (
                    "shrink map places from 64 to 40 entries: 41 are in use; "
                    "set ebpfproxy.mapSizes.places to at least 41"
                ),
            ),
            (
                "plain",
                (
                    "shrink map plain from 64 to 40 entries: 41 are in use; "
                    "set ebpfproxy.mapSizes.plain to at least 41"
                ),
            ),
        ],
    )
    def test_it_refuses_to_lose_entries(self, rig: Rig, name: str, message: str) -> None:
        with rig.load() as first:
            each = first.maps[name]
            if name == "names":
                each.update_batch({number(n, 4): number(n, 8) for n in range(41)})
            else:
                each.update(number(40, 4), number(1, 4))
            left = rig.left()
            with pytest.raises(LoadError) as caught:
                rig.try_load(sizes={name: 40})
            assert str(caught.value) == message
            assert rig.left() == left

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"nmaes": 5}, r"mapSizes\.nmaes: there is no such map; there are counts, flows, names"),
            ({"counts": 99}, r"mapSizes\.counts: the size of this map is fixed"),
            ({"names": 0}, r"mapSizes\.names is 0: a map has 1 to 2\^32 - 1 entries"),
            ({"names": 1 << 32}, r"mapSizes\.names is 4294967296"),
        ],
    )
    def test_wrong_sizes(self, rig: Rig, sizes: dict[str, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            rig.try_load(sizes=sizes)
        assert rig.left() == []


class TestRefusals:
    """Whatever is refused, nothing that was there has changed."""

    def test_the_verifier_says_why(self, rig: Rig) -> None:
        with pytest.raises(LoadError) as caught:
            rig.try_load("refused", config={"node_port_min": 1})
        first, *_ = str(caught.value).splitlines()
        assert "load program tc_refused of refused" in first
        assert "invalid access to packet" in str(caught.value)
        assert rig.left() == ["ebpfproxy", "ebpfproxy/maps"]

    def test_a_refusal_leaves_the_pinned_maps_alone(self, rig: Rig) -> None:
        with rig.load() as first:
            first.maps["names"].update(number(1, 4), number(10, 8))
            left = rig.left()
            with pytest.raises(LoadError):
                rig.try_load("refused", sizes={"names": 1000}, config={"node_port_min": 1})
            assert rig.left() == left
            with Map.open(rig.pins / "names") as pinned:
                assert pinned.max_entries == 64
                assert pinned.items() == [(number(1, 4), number(10, 8))]

    @pytest.mark.parametrize(
        "other",
        [
            {"type": lib.BPF_MAP_TYPE_LRU_HASH, "flags": 0},
            {"key_size": 8},
            {"value_size": 16},
            {"flags": 0},
        ],
        ids=",".join,
    )
    def test_another_layout(self, rig: Rig, other: dict[str, Any]) -> None:
        need = MapDefinition("names", lib.BPF_MAP_TYPE_HASH, 4, 8, 64, lib.BPF_F_NO_PREALLOC)
        have = need._replace(**other)
        rig.pins.mkdir(parents=True)
        with Map.create(have) as pinned:
            pinned.pin(rig.pins / "names")
        left = rig.left()
        with pytest.raises(LayoutError) as caught:
            rig.try_load()
        message = str(caught.value)
        assert f"pinned map {rig.pins}/names has type {have.type}, key {have.key_size} bytes" in message
        assert "this version needs type 1, key 4 bytes, value 8 bytes, flags 0x1" in message
        assert "`ebpfproxy cleanup`" in message
        assert rig.left() == left

    def test_another_stamp(self, rig: Rig, tmp_path: Path) -> None:
        other = f"9.9.9{STAMP[5:]}"
        assert other != STAMP
        kind = "bpf.o" if rig.loader.name == "libbpf" else "bcc.c"
        for each in ("bpf.o", "bcc.c"):
            shutil.copy(rig.objects / f"sample.{each}", tmp_path)
        changed = tmp_path / f"sample.{kind}"
        changed.write_bytes(changed.read_bytes().replace(STAMP.encode(), other.encode()))
        with pytest.raises(LoadError) as caught:
            rig.try_load(directory=tmp_path)
        assert str(caught.value) == (
            f"load {changed}: it has stamp {other}, this agent {STAMP}; run `make build`"
        )
        assert not any(path.startswith("ebpfproxy/maps/") for path in rig.left())

    def test_a_file_that_is_missing(self, rig: Rig, tmp_path: Path) -> None:
        with pytest.raises(
            LoadError, match=r"open BPF object .*/sample.bpf.o: no such file; run `make build`"
        ):
            rig.try_load(directory=tmp_path)

    def test_a_file_that_is_no_object(self, rig: Rig, tmp_path: Path) -> None:
        (tmp_path / "sample.bpf.o").write_text("hello")
        with pytest.raises(LoadError, match=r"sample\.bpf\.o' is not a proper ELF object; run `make build`"):
            rig.try_load(directory=tmp_path)

    def test_a_folder_that_is_no_bpffs(self, rig: Rig, tmp_path: Path) -> None:
        rig.pins = tmp_path / "maps"
        with pytest.raises(UnsupportedError, match=rf"{tmp_path}/maps is on no bpffs: .* --bpffs"):
            rig.try_load()


class TestBcc:
    @pytest.mark.usefixtures("headers")
    def test_a_source_that_does_not_compile(self, bpffs: Path, objects: Path, tmp_path: Path) -> None:
        rig = Rig(BccLoader(), bpffs, tmp_path)
        for kind in ("bpf.o", "bcc.c"):
            shutil.copy(objects / f"sample.{kind}", tmp_path)
        with (tmp_path / "sample.bcc.c").open("a") as file:
            file.write("int broken(void) { return nowhere; }\n")
        with pytest.raises(LoadError) as caught:
            rig.try_load()
        assert str(caught.value).startswith("compile sample.bcc.c: ")
        assert "use of undeclared identifier 'nowhere'" in str(caught.value)
        assert not any(path.startswith("ebpfproxy/maps/") for path in rig.left())
