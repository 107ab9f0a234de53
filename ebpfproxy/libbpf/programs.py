"""Loaded programs and the links that attach them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple, Self

from ebpfproxy.errors import UnsupportedError
from ebpfproxy.libbpf._ffi import ffi, lib
from ebpfproxy.libbpf.descriptor import Descriptor
from ebpfproxy.libbpf.errors import check, kernel_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    Path = str | os.PathLike[str]

# enum bpf_attach_type of Linux 6.6; older headers lack them.
TCX_INGRESS = 46
TCX_EGRESS = 47

# XDP_FLAGS_*, linux/if_link.h: for any device, in the kernel's own code; or in the driver.
XDP_GENERIC, XDP_NATIVE = 1 << 1, 1 << 2

# BPF_F_XDP_HAS_FRAGS, linux/bpf.h of Linux 5.18: the program takes frames of several buffers.
XDP_HAS_FRAGS = 1 << 5

# BPF_PROG_TEST_RUN copies out at most this much more than it got: a program may add headers.
GROWTH_BYTES = 256


class RunResult(NamedTuple):
    """What a program did with a packet."""

    retval: int
    data: bytes  # the packet afterwards
    duration_ns: int  # average of one run


class LinkInfo(NamedTuple):
    """What a link attaches, and where."""

    id: int
    program_id: int
    attach_type: int
    ifindex: int  # 0: not the link of a device, or its device is gone
    cgroup_id: int  # 0: not a cgroup link, or its cgroup is gone


class ProgramDefinition(NamedTuple):
    """What a program is, in an object file or in the kernel."""

    name: str
    section: str
    type: int  # lib.BPF_PROG_TYPE_*
    attach_type: int  # what it expects to be attached as; 0 if its type does not care


class Program(Descriptor):
    """A program in the kernel.

    Attributes:
        id: the kernel's number for it.
        tag: checksum of its instructions, as bpftool shows it.
        definition: its name, type and expected attach type.
    """

    kind = "program"

    def __init__(self, fd: int, definition: ProgramDefinition | None = None) -> None:
        super().__init__(fd)
        info = ffi.new("struct bpf_prog_info *")
        size = ffi.new("__u32 *", ffi.sizeof("struct bpf_prog_info"))
        result = lib.bpf_obj_get_info_by_fd(fd, info, size)
        if result < 0:
            self.close()
            raise kernel_error(result, "read program information")
        self.id: int = info.id
        self.tag = bytes(info.tag).hex()
        self.type: int = info.type
        self.definition = definition or ProgramDefinition(ffi.string(info.name).decode(), "", info.type, 0)
        self.name = self.definition.name
        self.attach_type = self.definition.attach_type

    @classmethod
    def open(cls, path: Path, definition: ProgramDefinition | None = None) -> Self:
        """Return the program pinned at ``path``."""
        fd = check(lib.bpf_obj_get(os.fsencode(path)), f"open pinned program {os.fspath(path)}")
        return cls(fd, definition)

    def run(self, data: bytes, *, ifindex: int = 0, repeat: int = 1, ctx: bytes | None = None) -> RunResult:
        """Run the program on a packet in the kernel (BPF_PROG_TEST_RUN).

        Args:
            data: the frame from its Ethernet header on.
            ifindex: the device that the program sees, in this network namespace; 0 = loopback.
            repeat: run so often on the same packet, for timing.
            ctx: the whole context (struct __sk_buff, say), instead of ``ifindex``.
        """
        call = _Run(data, len(data), self._context(len(data), ifindex) if ctx is None else ctx)
        call.run.repeat = repeat
        check(lib.glue_run(self.fd, call.run), f"run program {self.name} on {len(data)} bytes")
        return RunResult(
            call.run.retval, bytes(ffi.buffer(call.out, call.run.data_out_size)), call.run.duration_ns
        )

    def time_each(self, frames: Sequence[bytes], *, ifindex: int = 0) -> list[tuple[int, int]]:
        """Run the program once on each frame, one straight after the other; return results and nanoseconds.

        Args:
            frames: all of the same size.
            ifindex: as for ``run``.
        """
        size, count = len(frames[0]), len(frames)
        call = _Run(b"".join(frames), size, self._context(size, ifindex))
        results, took_ns = ffi.new("__u32[]", count), ffi.new("__u32[]", count)
        what = f"run program {self.name} on {count} frames of {size} bytes"
        check(lib.glue_run_each(self.fd, call.run, count, results, took_ns), what)
        return list(zip(results, took_ns, strict=True))

    def _context(self, size: int, ifindex: int) -> bytes:
        """Return the context of a frame that comes from a device; empty: the kernel's choice."""
        if not ifindex:
            return b""
        if self.type == lib.BPF_PROG_TYPE_XDP:
            frame = ffi.new("struct xdp_md *")
            frame.ingress_ifindex, frame.data_end = ifindex, size
            return bytes(ffi.buffer(frame))
        skb = ffi.new("struct __sk_buff *")
        skb.ifindex = ifindex
        return bytes(ffi.buffer(skb))


class _Run:
    """What the kernel is given for runs on frames of ``size`` bytes that stand in ``data``."""

    def __init__(self, data: bytes, size: int, ctx: bytes) -> None:
        self.out = ffi.new("char[]", size + GROWTH_BYTES)
        self._keep = ffi.from_buffer(data), ffi.from_buffer(ctx)
        self.run = ffi.new("struct glue_run *")
        self.run.data_in, self.run.data_in_size = self._keep[0], size
        self.run.data_out, self.run.data_out_size = self.out, len(self.out)
        if ctx:
            self.run.ctx_in, self.run.ctx_in_size = self._keep[1], len(ctx)
        self.run.repeat = 1


class Link(Descriptor):
    """An attachment that lives as long as its descriptor or its pin; its program can be swapped."""

    kind = "link"

    @classmethod
    def attach_cgroup(cls, program: Program, cgroup: Path, attach_type: int | None = None) -> Self:
        """Attach to a cgroup2 directory, beside programs of others.

        Args:
            program: a cgroup program.
            cgroup: path of the cgroup.
            attach_type: lib.BPF_CGROUP_*; default: what the program was loaded for.
        """
        wanted = program.attach_type if attach_type is None else attach_type
        what = f"attach program {program.name} to cgroup {os.fspath(cgroup)}"
        try:
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise kernel_error(-(error.errno or errno.EIO), what) from error
        try:
            result = lib.glue_link_create(program.fd, directory, wanted, 0)
        finally:
            os.close(directory)
        if result == -errno.EBADF:
            raise UnsupportedError(f"{what}: that is no cgroup2 directory; name one with --cgroup")
        return cls(check(result, what))

    @classmethod
    def attach_tcx(cls, program: Program, ifindex: int, attach_type: int) -> Self:
        """Attach to a device (kernel 6.6 on).

        Args:
            program: a tc program.
            ifindex: the device.
            attach_type: TCX_INGRESS or TCX_EGRESS.

        Raises:
            UnsupportedError: the kernel has no tcx links.
        """
        what = f"attach program {program.name} to device {ifindex}"
        result = lib.glue_link_create(program.fd, ifindex, attach_type, 0)
        if result == -errno.EINVAL:
            raise UnsupportedError(f"{what}: this kernel has no tcx links (they came with Linux 6.6)")
        return cls(check(result, what))

    @classmethod
    def attach_xdp(cls, program: Program, ifindex: int, flags: int) -> Self:
        """Attach to a device, before the kernel's own code.

        Args:
            program: an XDP program.
            ifindex: the device.
            flags: XDP_NATIVE or XDP_GENERIC.

        Raises:
            UnsupportedError: the driver can't, or another XDP program is there.
        """
        how = "native" if flags & XDP_NATIVE else "generic"
        what = f"attach program {program.name} to device {ifindex}, XDP {how}"
        result = lib.glue_link_create(program.fd, ifindex, lib.BPF_XDP, flags)
        if result in {-errno.EBUSY, -errno.EEXIST}:
            raise UnsupportedError(
                f"{what}: another XDP program is there; see `ip link show`, or --xdp-mode off"
            )
        if result in {-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ERANGE, -errno.ENOMEM, -errno.ENOSPC}:
            raise UnsupportedError(f"{what}: the driver refuses it: {os.strerror(-result)}")
        return cls(check(result, what))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return the link pinned at ``path``."""
        return cls(check(lib.bpf_obj_get(os.fsencode(path)), f"open pinned link {os.fspath(path)}"))

    def update(self, program: Program) -> None:
        """Swap the program; no packet passes in between without one."""
        check(
            lib.bpf_link_update(self.fd, program.fd, ffi.NULL),
            f"swap the program of a link for {program.name}",
        )

    def detach(self) -> None:
        """Detach now, although the link is still pinned or open."""
        check(lib.bpf_link_detach(self.fd), "detach a link")

    def info(self) -> LinkInfo:
        """Return what is attached where."""
        info = ffi.new("struct glue_link_info *")
        check(lib.glue_link_info(self.fd, info), "read link information")
        return LinkInfo(info.id, info.prog_id, info.attach_type, info.ifindex, info.cgroup_id)
