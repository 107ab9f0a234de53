"""Object files: what they define, and loading them."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Any

from ebpfproxy.errors import LoadError
from ebpfproxy.libbpf._ffi import ffi, lib
from ebpfproxy.libbpf.descriptor import Closeable
from ebpfproxy.libbpf.errors import check, kernel_error
from ebpfproxy.libbpf.maps import Map, MapDefinition
from ebpfproxy.libbpf.probes import has_xdp_frags
from ebpfproxy.libbpf.programs import XDP_HAS_FRAGS, Program, ProgramDefinition

if TYPE_CHECKING:
    from pathlib import Path

STAMP: str = ffi.string(lib.STAMP).decode()
"""Package version + checksum of the abi.h that this binding was built with."""

# The verifier's last words, its statistics left out, are what says why.
LOG_LINES = 20


def log_tail(messages: str) -> str:
    """Return the lines of libbpf's and the verifier's messages that say what went wrong."""
    lines = [line for line in messages.splitlines() if line and not line.startswith("processed ")]
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


class Object(Closeable):
    """An object file, opened and perhaps loaded.

    Attributes:
        path: the file.
        maps: the maps it defines, by name; its constants are not among them.
        programs: the programs it defines, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lib.glue_clear_messages()
        if not path.is_file():
            raise LoadError(f"open BPF object {path}: no such file; run `make build`")
        self._object = lib.bpf_object__open(os.fsencode(path))
        if not self._object:
            reason = self._messages().strip() or os.strerror(ffi.errno)
            raise LoadError(f"open BPF object {path}: {reason}; run `make build`")
        self._maps = {
            ffi.string(lib.bpf_map__name(each)).decode(): each
            for each in self._each(lib.bpf_object__next_map)
            if not lib.bpf_map__is_internal(each)
        }
        self._programs = {
            ffi.string(lib.bpf_program__name(each)).decode(): each
            for each in self._each(lib.bpf_object__next_program)
        }
        self.maps = {
            name: MapDefinition(
                name,
                lib.bpf_map__type(each),
                lib.bpf_map__key_size(each),
                lib.bpf_map__value_size(each),
                lib.bpf_map__max_entries(each),
                lib.bpf_map__map_flags(each),
            )
            for name, each in self._maps.items()
        }
        self.programs = {
            name: ProgramDefinition(
                name,
                ffi.string(lib.bpf_program__section_name(each)).decode(),
                lib.bpf_program__type(each),
                lib.bpf_program__expected_attach_type(each),
            )
            for name, each in self._programs.items()
        }

    def constant(self, name: str, c_type: str) -> Any:
        """Return a pointer to a constant's initial value, to read or, before ``load``, to write.

        Args:
            name: a global `const volatile` variable of the program.
            c_type: its type, as ``struct config``.
        """
        size = ffi.new("__u32 *")
        value = lib.glue_variable(self._object, name.encode(), size)
        if not value or size[0] != ffi.sizeof(c_type):
            raise LoadError(f"BPF object {self.path} has no constant {c_type} {name}; run `make build`")
        return ffi.cast(f"{c_type} *", value)

    def set_max_entries(self, name: str, max_entries: int) -> None:
        """Give a map another size, before ``load``."""
        check(
            lib.bpf_map__set_max_entries(self._maps[name], max_entries),
            f"set the size of map {name} to {max_entries}",
        )

    def reuse(self, name: str, existing: Map) -> None:
        """Make the programs use a map that exists, before ``load``."""
        check(lib.bpf_map__reuse_fd(self._maps[name], existing.fd), f"reuse map {name}")

    def load(self, *, programs: bool = True) -> None:
        """Put maps and programs (or maps only) into the kernel.

        Raises:
            LoadError: a program was refused; the message ends with the verifier's reason.
            KernelError: a map can't be made.
        """
        for each in self._programs.values():
            check(lib.bpf_program__set_autoload(each, programs), f"choose the programs of {self.path}")
            # Not by the section's name: what libbpf takes from there can't be taken back for older kernels.
            if lib.bpf_program__type(each) == lib.BPF_PROG_TYPE_XDP and has_xdp_frags():
                flags = lib.bpf_program__flags(each) | XDP_HAS_FRAGS
                check(lib.bpf_program__set_flags(each, flags), f"choose flags of {self.path}")
        lib.glue_clear_messages()
        result = lib.bpf_object__load(self._object)
        if result == 0:
            return
        messages = self._messages()
        refused = re.search(r"prog '(\w+)': BPF program load failed", messages)
        if refused:
            raise LoadError(
                f"load program {refused[1]} of {self.path.name}: the kernel refused it: "
                f"{os.strerror(-result)}\n{log_tail(messages)}"
            )
        failed = re.search(r"map '(\w+)': failed to create", messages)
        what = f"create map {failed[1]} of {self.path.name}" if failed else f"load {self.path.name}"
        if result == -errno.E2BIG or (failed and result in {-errno.ENOMEM, -errno.EINVAL}):
            what += f" (ebpfproxy.mapSizes.{failed[1]} asks for too much?)" if failed else ""
        raise kernel_error(result, what)

    def map(self, name: str) -> Map:
        """Return a map after ``load``; the caller closes it."""
        return Map.from_fd(os.dup(check(lib.bpf_map__fd(self._maps[name]), f"find map {name}")))

    def program(self, name: str) -> Program:
        """Return a program after ``load``; the caller closes it."""
        fd = check(lib.bpf_program__fd(self._programs[name]), f"find program {name}")
        return Program(os.dup(fd), self.programs[name])

    def layout(self, struct: str) -> tuple[int, dict[str, int]] | None:
        """Return a struct's size and its members' offsets in bytes, None if the BTF lacks it."""
        size = lib.glue_struct_size(self._object, struct.encode())
        if size < 0:
            return None
        members: dict[str, int] = {}
        name = ffi.new("const char **")
        while (offset := lib.glue_struct_member(self._object, struct.encode(), len(members), name)) >= 0:
            members[ffi.string(name[0]).decode()] = offset
        return size, members

    def close(self) -> None:
        """Free the object; maps and programs that were taken out of it stay."""
        if self._object:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL

    def _each(self, following: Any) -> list[Any]:
        found = []
        each = ffi.NULL
        while each := following(self._object, each):
            found.append(each)
        return found

    @staticmethod
    def _messages() -> str:
        return str(ffi.string(lib.glue_messages()).decode(errors="replace"))
