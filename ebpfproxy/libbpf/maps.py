"""BPF maps: single and bulk reads and writes, bytes in and bytes out."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

from ebpfproxy.errors import KernelError, MapFullError
from ebpfproxy.libbpf._ffi import ffi, lib
from ebpfproxy.libbpf.descriptor import Descriptor
from ebpfproxy.libbpf.errors import ENOTSUPP, check, kernel_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    Path = str | os.PathLike[str]

ARRAYS = frozenset({lib.BPF_MAP_TYPE_ARRAY, lib.BPF_MAP_TYPE_PERCPU_ARRAY})
PER_CPU = frozenset(
    {lib.BPF_MAP_TYPE_PERCPU_ARRAY, lib.BPF_MAP_TYPE_PERCPU_HASH, lib.BPF_MAP_TYPE_LRU_PERCPU_HASH}
)

HASHES = frozenset({lib.BPF_MAP_TYPE_HASH, lib.BPF_MAP_TYPE_LRU_HASH})

# What a kernel answers that has no batch operation for a type (before 5.6; per-CPU arrays before 5.13).
NO_BATCH = frozenset({ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP})
# One batch call moves at most this much; big enough that the system calls don't count.
BATCH_BYTES = 4 << 20


def align8(size: int) -> int:
    """Return ``size`` rounded up to 8: how the kernel spaces array values and per-CPU values."""
    return (size + 7) & ~7


def split(data: memoryview, size: int) -> Iterator[bytes]:
    """Yield ``data`` in pieces of ``size`` bytes."""
    return itertools.chain.from_iterable(struct.iter_unpack(f"{size}s", data))


class MapDefinition(NamedTuple):
    """What a map is, in an object file or in the kernel."""

    name: str
    type: int  # lib.BPF_MAP_TYPE_*
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Map(Descriptor):
    """An open BPF map.

    Keys and values are packed bytes in the layout of abi.h. A value of a per-CPU map is one value per
    possible CPU, each padded to 8 bytes.

    Attributes:
        stride: distance of two values in ``mmap()`` and between CPUs: value_size rounded up to 8.
    """

    kind = "map"

    def __init__(self, fd: int, definition: MapDefinition) -> None:
        super().__init__(fd)
        self.definition = definition
        self.name, self.type, self.key_size, self.value_size, self.max_entries, self.flags = definition
        self.stride = align8(self.value_size)
        self._item_size = (
            self.stride * lib.libbpf_num_possible_cpus() if self.type in PER_CPU else self.value_size
        )
        self._mmap: mmap.mmap | None = None
        self._view: memoryview | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return the map pinned at ``path``.

        Raises:
            KernelError: errno ENOENT if nothing is pinned there.
        """
        return cls.from_fd(check(lib.bpf_obj_get(os.fsencode(path)), f"open pinned map {os.fspath(path)}"))

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return the map of a file descriptor and own that descriptor."""
        info = ffi.new("struct bpf_map_info *")
        size = ffi.new("__u32 *", ffi.sizeof("struct bpf_map_info"))
        result = lib.bpf_obj_get_info_by_fd(fd, info, size)
        if result < 0:
            os.close(fd)
            raise kernel_error(result, "read map information")
        return cls(
            fd,
            MapDefinition(
                ffi.string(info.name).decode(),
                info.type,
                info.key_size,
                info.value_size,
                info.max_entries,
                info.map_flags,
            ),
        )

    @classmethod
    def create(cls, definition: MapDefinition) -> Self:
        """Return a new, empty map."""
        result = lib.glue_map_create(
            definition.type,
            definition.name.encode(),
            definition.key_size,
            definition.value_size,
            definition.max_entries,
            definition.flags,
        )
        return cls(check(result, f"create map {definition.name}"), definition)

    @property
    def id(self) -> int:
        """The kernel's number for it: no other map's while this one exists."""
        info = ffi.new("struct bpf_map_info *")
        size = ffi.new("__u32 *", ffi.sizeof("struct bpf_map_info"))
        check(lib.bpf_obj_get_info_by_fd(self.fd, info, size), f"read information of map {self.name}")
        return int(info.id)

    # ---- one entry ----

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, None if there is none."""
        value = ffi.new("char[]", self._item_size)
        result = lib.bpf_map_lookup_elem(self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        check(result, f"look up in map {self.name}")
        return bytes(ffi.buffer(value))

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Write one entry.

        Args:
            key: key_size bytes.
            value: value_size bytes (per-CPU: of all CPUs).
            flags: lib.BPF_ANY, BPF_NOEXIST or BPF_EXIST.

        Raises:
            MapFullError: there is no room, or an array has no such index.
            KernelError: errno EEXIST or ENOENT as ``flags`` ask, or any other failure.
        """
        if len(value) != self._item_size:
            raise ValueError(f"map {self.name}: a value has {self._item_size} bytes, not {len(value)}")
        result = lib.bpf_map_update_elem(self.fd, self._key(key), value, flags)
        if result < 0:
            raise self._update_error(result)

    def delete(self, key: bytes) -> bool:
        """Remove an entry; return whether it existed."""
        result = lib.bpf_map_delete_elem(self.fd, self._key(key))
        if result == -errno.ENOENT:
            return False
        check(result, f"remove from map {self.name}")
        return True

    def get_percpu_sums(self, key: bytes) -> tuple[int, ...]:
        """Return the sums over all CPUs of a per-CPU value made of __u64 only; () without an entry."""
        value = self.get(key)
        columns = self.stride // 8
        numbers = memoryview(value).cast("Q").tolist() if value else []
        return tuple(sum(numbers[column::columns]) for column in range(columns if value else 0))

    # ---- many entries ----

    def items(self) -> list[tuple[bytes, bytes]]:
        """Return all entries (of an array: every index); not a snapshot while programs write."""
        return list(itertools.chain.from_iterable(self.chunks()))

    def chunks(self, size: int | None = None) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield all entries in lists of about ``size``; in between, anyone may write and delete."""
        for keys, values in self.blocks(size):
            yield list(zip(split(keys, self.key_size), split(values, self._item_size), strict=True))

    def blocks(self, size: int | None = None) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield the memory of about ``size`` keys and that of their values, each valid until the next."""
        begun = False
        try:
            for _, keys, values in self._batches(size):
                begun = True
                yield keys, values
        except KernelError as error:
            # EINTR: keys vanished faster than the kernel could follow (LPM tries).
            if begun or error.errno not in NO_BATCH | {errno.EINTR}:
                raise
            pairs = ((key, self.get(key)) for key in self._keys())
            found = {key: value for key, value in pairs if value is not None}
            yield memoryview(b"".join(found)), memoryview(b"".join(found.values()))

    def count(self) -> int:
        """Return the number of entries; of an array max_entries."""
        if self.type in ARRAYS:
            return self.max_entries
        try:
            return sum(count for count, _, _ in self._batches())
        except KernelError as error:
            if error.errno not in NO_BATCH | {errno.EINTR}:
                raise
            return sum(1 for _ in self._keys())

    def estimate(self, most: int = 32768) -> int:
        """Return the number of entries; of a hash with more than ``most`` that of a part, extrapolated.

        Keys spread evenly over the buckets, so the error is about 1/sqrt(most): under 1 %. It costs the
        same however large the map is.

        Source: bpf_map_lookup_batch of a hash returns the next bucket; there are max_entries rounded up to
        a power of two (kernel/bpf/hashtab.c).
        """
        if self.type in HASHES:
            keys, values = ffi.new("char[]", most * self.key_size), ffi.new("char[]", most * self._item_size)
            count, bucket = ffi.new("__u32 *", most), ffi.new("__u32 *")
            result = lib.bpf_map_lookup_batch(self.fd, ffi.NULL, bucket, keys, values, count, ffi.NULL)
            if result == -errno.ENOENT:  # that was all
                return int(count[0])
            if result == 0:
                buckets = 1 << (self.max_entries - 1).bit_length()
                return min(self.max_entries, round(int(count[0]) * buckets / int(bucket[0])))
        return self.count()

    def update_batch(self, items: Mapping[bytes, bytes], flags: int = 0) -> None:
        """Write many entries in a few system calls.

        Raises:
            MapFullError: there is no room for all; those before are written.
        """
        if not items:
            return
        keys, values = b"".join(items), b"".join(items.values())
        if len(keys) != len(items) * self.key_size or len(values) != len(items) * self._item_size:
            raise ValueError(
                f"map {self.name}: keys have {self.key_size} bytes, values {self._item_size}; got others"
            )
        key_data, value_data = ffi.from_buffer(keys), ffi.from_buffer(values)
        count = ffi.new("__u32 *")
        chunk = self._chunk()
        for start in range(0, len(items), chunk):
            count[0] = min(chunk, len(items) - start)
            result = lib.glue_map_update_batch(
                self.fd, key_data + start * self.key_size, value_data + start * self._item_size, count, flags
            )
            if -result in NO_BATCH:
                for key, value in items.items():
                    self.update(key, value, flags)
                return
            if result < 0:
                raise self._update_error(result)

    def delete_batch(self, keys: Iterable[bytes]) -> int:
        """Remove many entries; return how many existed."""
        wanted = list(keys)
        deleted = start = 0
        count = ffi.new("__u32 *")
        data = b"".join(wanted)
        if len(data) != len(wanted) * self.key_size:
            raise ValueError(f"map {self.name}: a key has {self.key_size} bytes; got others")
        key_data = ffi.from_buffer(data)
        while start < len(wanted):
            count[0] = len(wanted) - start
            result = lib.bpf_map_delete_batch(self.fd, key_data + start * self.key_size, count, ffi.NULL)
            if -result in NO_BATCH:
                return deleted + sum(self.delete(key) for key in wanted[start:])
            if result not in {0, -errno.ENOENT}:
                raise kernel_error(result, f"remove from map {self.name}")
            deleted += count[0]
            start += count[0] + (1 if result else 0)  # past the key that did not exist
        return deleted

    def mmap(self) -> memoryview:
        """Return the memory of an array made with BPF_F_MMAPABLE: writable, one per Map.

        Entry n lies at ``n * stride``, not ``n * value_size``. ``close()`` ends it.
        """
        if self._view is None:
            if not self.flags & lib.BPF_F_MMAPABLE:
                raise KernelError(f"map {self.name} into memory: it lacks BPF_F_MMAPABLE", errno.EPERM)
            size = self.max_entries * self.stride
            pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            try:
                self._mmap = mmap.mmap(self.fd, pages)
            except OSError as error:
                raise kernel_error(-(error.errno or errno.EIO), f"map {self.name} into memory") from error
            self._view = memoryview(self._mmap)[:size]
        return self._view

    def close(self) -> None:
        """Close the descriptor and the memory mapping; the map itself lives on while it is pinned."""
        if self._view is not None and self._mmap is not None:
            try:
                self._view.release()
                self._mmap.close()
            except BufferError:
                pass  # someone still holds a slice; the mapping goes with it
            self._view = self._mmap = None
        super().close()

    # ---- inner ----

    def _key(self, key: bytes) -> bytes:
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: a key has {self.key_size} bytes, not {len(key)}")
        return key

    def _chunk(self) -> int:
        return max(1, min(self.max_entries, BATCH_BYTES // (self.key_size + self._item_size)))

    def _batches(self, size: int | None = None) -> Iterator[tuple[int, memoryview, memoryview]]:
        """Yield (count, keys, values); the buffers are reused for the next batch."""
        chunk = min(size or self.max_entries, self._chunk())
        # A hash map's cursor is a __u32, that of all others a key.
        cursors = [ffi.new("char[]", max(self.key_size, 4)) for _ in range(2)]
        count = ffi.new("__u32 *")
        at = ffi.NULL
        keys = values = None
        while True:
            if keys is None:
                keys = ffi.new("char[]", chunk * self.key_size)
                values = ffi.new("char[]", chunk * self._item_size)
            count[0] = chunk
            result = lib.bpf_map_lookup_batch(self.fd, at, cursors[0], keys, values, count, ffi.NULL)
            if result == -errno.ENOSPC:  # one hash bucket holds more than the whole batch
                chunk, keys = chunk * 2, None
                continue
            if result not in {0, -errno.ENOENT}:
                raise kernel_error(result, f"read map {self.name}")
            number = count[0]
            if number:
                yield (
                    number,
                    memoryview(ffi.buffer(keys, number * self.key_size)),
                    memoryview(ffi.buffer(values, number * self._item_size)),
                )
            if result:  # ENOENT: that was the last
                return
            at = cursors[0]
            cursors.reverse()

    def _keys(self) -> Iterator[bytes]:
        key, following = ffi.NULL, ffi.new("char[]", self.key_size)
        while (result := lib.bpf_map_get_next_key(self.fd, key, following)) == 0:
            found = bytes(ffi.buffer(following))
            yield found
            key = found
        if result != -errno.ENOENT:
            raise kernel_error(result, f"read map {self.name}")

    def _update_error(self, result: int) -> KernelError | MapFullError:
        setting = f"raise ebpfproxy.mapSizes.{self.name} in the configuration"
        if -result == errno.E2BIG and self.type in ARRAYS:
            return MapFullError(
                f"update map {self.name}: index beyond its {self.max_entries} entries; {setting}"
            )
        if -result in {errno.E2BIG, errno.ENOSPC}:
            return MapFullError(
                f"update map {self.name}: all {self.max_entries} entries are in use; {setting}"
            )
        if -result == errno.ENOMEM:
            return MapFullError(
                f"update map {self.name} (at most {self.max_entries} entries): the kernel has no memory left "
                f"for it; give this cgroup or machine more, or lower ebpfproxy.mapSizes.{self.name}"
            )
        return kernel_error(result, f"update map {self.name}")
