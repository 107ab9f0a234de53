"""The directory source: real files, real inotify. Waits are generous, and no time is asserted."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy.errors import SourceError
from ebpfproxy.model.objects import Object, ObjectKey, Service
from ebpfproxy.source import Reported, SourceEvent, directory, manifests
from ebpfproxy.source.directory import DirectorySource
from ebpfproxy.store import Delete, Reach, Set, Store, Synced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 20.0


def service(name: str, port: int = 80, **spec: Any) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"ports": [{"port": port}], **spec},
        }
    )


def documents(*texts: str) -> str:
    return "\n---\n".join(texts)


class Watch:
    """A running source and the store behind it."""

    def __init__(self, path: Path, last_good: Path | None = None) -> None:
        self.source = DirectorySource(path, last_good)
        self.events: list[SourceEvent] = []
        self.problems: tuple[str, ...] = ()
        self.store = Store()
        self._queue: queue.Queue[tuple[SourceEvent, ...]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.until(self.store.ready)

    def _run(self) -> None:
        for batch in self.source.batches():
            self._queue.put(batch)

    def until(self, is_done: Callable[[], bool]) -> None:
        """Apply batches until ``is_done``."""
        while not is_done():
            try:
                batch = self._queue.get(timeout=TIMEOUT_S)
            except queue.Empty:
                pytest.fail(f"nothing came; have {self.ports}, problems {self.problems}")
            for event in batch:
                self.events.append(event)
                if isinstance(event, Reported):
                    self.problems = event.problems
                elif not isinstance(event, Reach):
                    self.store.apply(event)

    @property
    def objects(self) -> dict[ObjectKey, Object]:
        return dict(self.store.take().objects)

    @property
    def ports(self) -> dict[str, int]:
        """Name and port of each Service."""
        return {
            obj.metadata.name: obj.spec.ports[0].port
            for obj in self.objects.values()
            if isinstance(obj, Service)
        }

    def expect(self, ports: dict[str, int], *problems: str) -> None:
        """Wait for exactly these Services and problems (each given by a part of its text)."""
        self.until(
            lambda: (
                self.ports == ports
                and len(self.problems) == len(problems)
                and all(part in text for part, text in zip(problems, self.problems, strict=True))
            )
        )

    def close(self) -> None:
        self.source.close()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "manifests"
    path.mkdir()
    return path


@pytest.fixture
def watch(path: Path) -> Iterator[Callable[..., Watch]]:
    watches: list[Watch] = []

    def start(last_good: Path | None = None) -> Watch:
        watches.append(Watch(path, last_good))
        return watches[-1]

    yield start
    for each in watches:
        each.close()


@pytest.fixture(autouse=True)
def _settle_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_SETTLED_S", 0.3)
    monkeypatch.setattr(directory, "_LOOK_S", 600.0)  # only what inotify tells counts


# --- at the start ------------------------------------------------------------------------------------


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"watch directory .*/none: No such file or directory"):
        DirectorySource(tmp_path / "none")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="Not a directory"):
        DirectorySource(tmp_path / "file")


def test_an_empty_directory_is_synced(watch: Callable[..., Watch]) -> None:
    assert watch().events == [Synced("objects")]


def test_all_that_is_there_comes_before_synced(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "b.yml").write_text(documents(service("b1", 1), service("b2", 2)))
    (path / "a.yaml").write_text(service("a", 3))
    (path / "c.json").write_text(service("c", 4) + "\n" + service("d", 5))
    (path / "README.md").write_text("no manifest")
    (path / ".hidden.yaml").write_text(service("hidden"))
    (path / "backup.yaml~").write_text(service("backup"))
    (path / "sub.yaml").mkdir()
    (path / "sub").mkdir()
    (path / "sub" / "x.yaml").write_text(service("deep"))
    os.mkfifo(path / "fifo.yaml")
    events = watch().events
    assert isinstance(events[-1], Synced)
    named = [(e.object.metadata.name, e.source) for e in events if isinstance(e, Set)]
    assert named == [("a", "a.yaml"), ("b1", "b.yml"), ("b2", "b.yml"), ("c", "c.json"), ("d", "c.json")]


# --- changes -----------------------------------------------------------------------------------------


def test_only_what_changed_is_told(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "a.yaml").write_text(documents(service("a1", 1), service("a2", 2), service("a3", 3)))
    (path / "b.yaml").write_text(service("b", 4))
    running = watch()
    running.events.clear()
    (path / "a.yaml").write_text(documents(service("a1", 1), service("a2", 22), service("a4", 5)))
    running.expect({"a1": 1, "a2": 22, "a4": 5, "b": 4})
    told = [
        ("set", e.object.metadata.name) if isinstance(e, Set) else ("delete", e.key.name)
        for e in running.events
        if isinstance(e, Set | Delete)
    ]
    assert told == [("set", "a2"), ("set", "a4"), ("delete", "a3")]


def test_files_come_change_and_go(path: Path, watch: Callable[..., Watch]) -> None:
    running = watch()
    (path / "new.yaml").write_text(service("a", 1))
    running.expect({"a": 1})
    (path / "new.yaml").write_text(service("a", 2))
    running.expect({"a": 2})
    (path / "new.yaml").rename(path / "other.yaml")
    (path / "last.yaml").write_text(service("z", 9))
    running.expect({"a": 2, "z": 9})
    (path / "other.yaml").unlink()
    running.expect({"z": 9})
    (path / "last.yaml").rename(path / "last.off")
    running.expect({})


def test_same_size_writes_in_quick_succession_are_all_seen(path: Path, watch: Callable[..., Watch]) -> None:
    running = watch()
    for port in range(100, 200):
        (path / "a.yaml").write_text(service("a", port))
    running.expect({"a": 199})


def test_renaming_over_a_file_is_one_change(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "a.yaml").write_text(service("a", 1))
    running = watch()
    running.events.clear()
    for port in range(2, 30):
        (path / ".a.tmp").write_text(service("a", port))
        (path / ".a.tmp").replace(path / "a.yaml")
    running.expect({"a": 29})
    assert not [event for event in running.events if isinstance(event, Delete)]


def test_an_editor_that_moves_the_old_version_away_is_no_deletion(
    path: Path, watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_REMOVAL_S", 5.0)
    (path / "a.yaml").write_text(service("a", 1))
    running = watch()
    running.events.clear()
    (path / "a.yaml").rename(path / "a.yaml~")
    (path / "a.yaml").write_text(service("a", 2))
    running.expect({"a": 2})
    assert not [event for event in running.events if isinstance(event, Delete)]


def test_links_are_followed(path: Path, tmp_path: Path, watch: Callable[..., Watch]) -> None:
    (tmp_path / "elsewhere").write_text(service("soft", 1))
    (tmp_path / "other").write_text(service("hard", 2))
    running = watch()
    (path / "soft.yaml").symlink_to(tmp_path / "elsewhere")
    (path / "hard.yaml").hardlink_to(tmp_path / "other")
    running.expect({"soft": 1, "hard": 2})


def test_a_mounted_config_map_changes_as_a_whole(path: Path, watch: Callable[..., Watch]) -> None:
    """The kubelet's atomic writer: files are links through ``..data``, which is swapped by a rename."""

    def publish(version: str, files: dict[str, str]) -> None:
        (path / version).mkdir()
        for name, text in files.items():
            (path / version / name).write_text(text)
        (path / "..data_tmp").symlink_to(version)
        (path / "..data_tmp").replace(path / "..data")

    publish("..v1", {"a.yaml": service("a", 1), "b.yaml": service("b", 1)})
    (path / "a.yaml").symlink_to("..data/a.yaml")
    (path / "b.yaml").symlink_to("..data/b.yaml")
    running = watch()
    assert running.ports == {"a": 1, "b": 1}
    publish("..v2", {"a.yaml": service("a", 2), "c.yaml": service("c", 2)})
    (path / "c.yaml").symlink_to("..data/c.yaml")
    (path / "b.yaml").unlink()
    shutil.rmtree(path / "..v1")
    running.expect({"a": 2, "c": 2})


def test_what_inotify_does_not_tell_is_found_by_looking(
    path: Path, tmp_path: Path, watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_LOOK_S", 0.05)
    (tmp_path / "target").write_text(service("a", 1))
    (path / "a.yaml").symlink_to(tmp_path / "target")
    running = watch()
    (tmp_path / "target").write_text(service("a", 22))
    running.expect({"a": 22})


def test_an_overflow_makes_it_look_at_everything(
    path: Path, watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    import inotify_simple

    (path / "gone.yaml").write_text(service("gone", 1))
    real = inotify_simple.INotify.read
    overflow = inotify_simple.Event(-1, inotify_simple.flags.Q_OVERFLOW, 0, "")

    def lossy(self: Any, **options: Any) -> list[Any]:
        return [overflow] if list(real(self, **options)) else []

    monkeypatch.setattr(inotify_simple.INotify, "read", lossy)
    running = watch()
    (path / "new.yaml").write_text(service("new", 2))
    (path / "gone.yaml").unlink()
    running.expect({"new": 2})


def test_rereading_finds_what_hides_behind_an_unchanged_stamp(
    path: Path, watch: Callable[..., Watch]
) -> None:
    (path / "a.yaml").write_text(service("a", 1))
    running = watch()
    running.source.reread()
    (path / "b.yaml").write_text(service("b", 2))
    running.expect({"a": 1, "b": 2})


def test_kinds_that_are_left_out_are_said_once(
    path: Path, watch: Callable[..., Watch], caplog: pytest.LogCaptureFixture
) -> None:
    other = '{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}'
    with caplog.at_level("INFO", "ebpfproxy"):
        (path / "a.yaml").write_text(documents(service("a", 1), other))
        running = watch()
        (path / "a.yaml").write_text(documents(service("a", 2), other))
        running.expect({"a": 2})
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a.yaml: left out kinds that Services are not made of: 1 Deployment (apps/v1)"]


# --- broken files and objects ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "kind: Service\n  bad: indent\n", "a.yaml, line 2, column 6: is not YAML: "),
        ("a.yaml", "ok: 1\n---\nx: [1, 2\n", "a.yaml, line 4, column 1: is not YAML: "),
        ("a.yaml", "ok: 1\nx: \x00\n", "a.yaml, line 2: is not YAML: "),
        ("a.yaml", "x: !!python/object:os.system {}\n", "a.yaml, line 1, column 4: is not YAML: "),
        ("a.yaml", "x: 1\ny: {}\nx: 2\n", "a.yaml, line 3, column 1: is not YAML: the key 'x' is there tw"),
        ("a.json", '{"kind": "Service",\n "metadata": }', "a.json, line 2, column 14: is not JSON: "),
        ("a.json", "[" * 200_000, "a.json: is not JSON: nested too deep"),
    ],
)
def test_a_file_that_does_not_parse_keeps_its_objects(
    path: Path, watch: Callable[..., Watch], name: str, text: str, problem: str
) -> None:
    (path / name).write_text(service("a", 1))
    running = watch()
    (path / name).write_text(text)
    running.expect({"a": 1}, problem)
    assert running.problems[0].endswith("; its last 1 good objects stay")
    (path / "b.yaml").write_text(service("b", 2))
    running.expect({"a": 1, "b": 2}, problem)
    (path / name).write_text(service("a", 3))
    running.expect({"a": 3, "b": 2})


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_as_editors_write_them(
    path: Path, watch: Callable[..., Watch], name: str, encoding: str, newline: str
) -> None:
    text = json.dumps(json.loads(service("a", 1)), indent=1)
    (path / name).write_text(text, encoding=encoding, newline=newline)
    watch().expect({"a": 1})


def test_anchors_and_merged_keys(path: Path, watch: Callable[..., Watch]) -> None:
    """What ``<<`` merges in gives way to what is written beside it; YAML 1.1 merge key type."""
    (path / "a.yaml").write_text(
        """
        apiVersion: v1
        kind: List
        items:
        - &a {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1}]}}
        - <<: *a
          metadata: {name: b}
        """
    )
    watch().expect({"a": 1, "b": 1})


def test_a_half_written_file_is_read_again_when_it_is_whole(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "a.yaml").write_text(service("a", 1))
    running = watch()
    with (path / "a.yaml").open("w") as file:
        file.write('{"kind": "Service", ')
        file.flush()
        running.source.reread()  # a look at the worst moment
        running.expect({"a": 1}, "a.yaml, line ")
        file.seek(0)
        file.write(service("a", 2))
    running.expect({"a": 2})


def test_an_unreadable_file_keeps_its_objects(
    path: Path, watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path / "a.yaml").write_text(service("a", 1))
    running = watch()
    real = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "a.yaml":
            raise PermissionError(13, "Permission denied")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        running.source.reread()
        running.expect({"a": 1}, "a.yaml: can't be read: Permission denied; its last 1 good objects stay")
    (path / "a.yaml").chmod(0o644)
    running.expect({"a": 1})


def test_a_wrong_object_keeps_its_last_version_and_the_others_go_on(
    path: Path, watch: Callable[..., Watch]
) -> None:
    (path / "a.yaml").write_text(documents(service("a", 1), service("b", 2)))
    running = watch()
    (path / "a.yaml").write_text(documents(service("a", 10), service("b", 70000), service("new", -1)))
    running.expect(
        {"a": 10, "b": 2},
        "a.yaml, document 2: Service default/b: spec.ports[0].port: ",
        "a.yaml, document 3: Service default/new: spec.ports[0].port: ",
    )
    (path / "a.yaml").write_text(documents(service("a", 10)))
    running.expect({"a": 10})


def test_a_wrong_item_of_a_list_is_named_by_its_place(path: Path, watch: Callable[..., Watch]) -> None:
    items = ",".join([service("a", 1), service("b", 0), service("c", 3)])
    (path / "all.yaml").write_text(f'{{"apiVersion": "v1", "kind": "List", "items": [{items}]}}')
    running = watch()
    running.expect({"a": 1, "c": 3}, "all.yaml, document 1, item 2: Service default/b: spec.ports[0].port: ")


@pytest.mark.parametrize(
    "text",
    ["just text", "- a\n- b\n", "kind: Service\n", "apiVersion: v1\nkind: Service\nmetadata: 5\n", "&a [*a]"],
)
def test_a_document_that_is_no_object_is_named(path: Path, watch: Callable[..., Watch], text: str) -> None:
    (path / "a.yaml").write_text(documents(text, service("b", 1)))
    running = watch()
    assert running.ports == {"b": 1}
    assert running.problems
    assert running.problems[0].startswith("a.yaml, document 1: ")


def test_one_object_in_two_files_is_named_with_both(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "a.yaml").write_text(service("x", 1))
    (path / "b.yaml").write_text(service("x", 2))
    running = watch()
    (problem,) = running.store.problems()
    assert "Service default/x" in str(problem)
    assert "a.yaml" in str(problem)
    assert "b.yaml" in str(problem)
    (path / "b.yaml").unlink()
    running.until(lambda: not running.store.problems())
    assert running.ports == {"x": 1}


def test_one_object_twice_in_a_file_counts_as_the_first_says(path: Path, watch: Callable[..., Watch]) -> None:
    (path / "a.yaml").write_text(documents(service("x", 1), service("x", 2)))
    running = watch()
    running.expect({"x": 1}, "a.yaml, document 2: Service default/x: is defined in document 1 too")


# --- the directory itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["remove", "move"])
def test_a_directory_that_goes_and_comes_back(path: Path, watch: Callable[..., Watch], how: str) -> None:
    (path / "a.yaml").write_text(service("a", 1))
    (path / "b.yaml").write_text(service("b", 2))
    running = watch()
    if how == "move":
        path.rename(path.with_name("away"))
    else:
        shutil.rmtree(path)
    running.expect({"a": 1, "b": 2}, "is gone: its last objects stay")
    path.mkdir()
    running.expect({"a": 1, "b": 2}, "is back: its last objects stay until it holds manifests")
    (path / "a.yaml").write_text(service("a", 11))
    running.until(lambda: running.ports == {"a": 11, "b": 2})  # what is new counts at once
    running.expect({"a": 11})  # what did not come back is gone after a while
    (path / "c.yaml").write_text(service("c", 3))
    running.expect({"a": 11, "c": 3})


def test_a_link_to_the_directory_can_be_turned(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text(service("a", int(version[1])))
    (tmp_path / "current").symlink_to("v1")
    running = Watch(tmp_path / "current")
    try:
        assert running.ports == {"a": 1}
        (tmp_path / "next").symlink_to("v2")
        (tmp_path / "next").replace(tmp_path / "current")
        running.expect({"a": 2})
    finally:
        running.close()


# --- last good copies --------------------------------------------------------------------------------


def test_a_restart_with_a_broken_file_has_the_last_good_version(
    path: Path, tmp_path: Path, watch: Callable[..., Watch]
) -> None:
    state = tmp_path / "last-good"
    (path / "a.yaml").write_text(documents(service("a", 1), service("b", 2)))
    watch(state).close()
    (path / "a.yaml").write_text("x: [")
    running = watch(state)
    running.expect({"a": 1, "b": 2}, "its last 2 good objects stay")


def test_a_restart_with_a_wrong_object_has_its_last_good_version(
    path: Path, tmp_path: Path, watch: Callable[..., Watch]
) -> None:
    state = tmp_path / "last-good"
    (path / "a.yaml").write_text(documents(service("a", 1), service("b", 2)))
    running = watch(state)
    (path / "a.yaml").write_text(documents(service("a", 10), service("b", -1)))
    running.expect({"a": 10, "b": 2}, "Service default/b")
    running.close()
    again = watch(state)  # the file is as wrong as before
    again.expect({"a": 10, "b": 2}, "Service default/b")
    again.close()
    (path / "a.yaml").write_text("x: [")
    watch(state).expect({"a": 10, "b": 2}, "its last 2 good objects stay")


def test_a_removed_file_leaves_no_copy(path: Path, tmp_path: Path, watch: Callable[..., Watch]) -> None:
    state = tmp_path / "last-good"
    for name in ("a", "b", "c"):
        (path / f"{name}.yaml").write_text(service(name, 1))
    running = watch(state)
    (path / "a.yaml").unlink()
    running.expect({"b": 1, "c": 1})
    running.close()
    (path / "b.yaml").unlink()  # while no agent runs
    again = watch(state)
    again.close()
    assert [each.name for each in state.iterdir()] == ["c.yaml.json"]


def test_a_broken_copy_is_passed_over(path: Path, tmp_path: Path, watch: Callable[..., Watch]) -> None:
    state = tmp_path / "last-good"
    state.mkdir()
    (state / "a.yaml.json").write_text("{")
    (path / "a.yaml").write_text("x: [")
    (path / "b.yaml").write_text(service("b", 1))
    watch(state).expect({"b": 1}, "a.yaml, line 2")


# --- parsing -----------------------------------------------------------------------------------------


def test_times_and_base_60_stay_text() -> None:
    text = """
    apiVersion: v1
    kind: Service
    metadata:
      name: x
      creationTimestamp: 2024-05-06T07:08:09Z
      labels: {when: 2024-05-06, base60: 22:30, octal: "010"}
    spec: {ports: [{port: 0x50}]}
    """
    (service_key,) = (manifest := manifests.read("x.yaml", text.encode())).objects
    obj = manifest.objects[service_key]
    assert isinstance(obj, Service)
    assert obj.metadata.labels == {"when": "2024-05-06", "base60": "22:30", "octal": "010"}
    assert obj.spec.ports[0].port == 80
    assert manifest.problems == ()


def test_kinds_that_are_not_ours_are_counted() -> None:
    text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n"
    manifest = manifests.read("x.yaml", documents(text, text).encode())
    assert dict(manifest.ignored) == {"Deployment (apps/v1)": 2}
    assert (manifest.objects, manifest.problems) == ({}, ())
