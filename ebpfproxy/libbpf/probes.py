"""What this kernel can do, asked by trying."""

from __future__ import annotations

import errno
import os

from ebpfproxy.libbpf._ffi import ffi, lib
from ebpfproxy.libbpf.programs import TCX_INGRESS, XDP_HAS_FRAGS

# No device has this number: a kernel that knows tcx links answers ENODEV, others EINVAL.
NO_DEVICE = 0x7FFFFFFF
# bpf_get_prandom_u32: every type of program may call it.
HARMLESS_HELPER = 7
# Some programs can't be loaded, even to be asked, without saying where they will be attached.
ATTACH_TYPES = {
    lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR: lib.BPF_CGROUP_INET4_CONNECT,
    lib.BPF_PROG_TYPE_CGROUP_SOCK: lib.BPF_CGROUP_INET_SOCK_RELEASE,
}


def libbpf_version() -> str:
    """Return libbpf's version, as it says it."""
    return str(ffi.string(lib.libbpf_version_string()).decode())


def has_program_type(program_type: int) -> bool:
    """Return whether programs of this lib.BPF_PROG_TYPE_* can be loaded (False without privileges)."""
    return bool(lib.libbpf_probe_bpf_prog_type(program_type, ffi.NULL) == 1)


def has_map_type(map_type: int) -> bool:
    """Return whether maps of this lib.BPF_MAP_TYPE_* can be made (False without privileges)."""
    return bool(lib.libbpf_probe_bpf_map_type(map_type, ffi.NULL) == 1)


def has_helper(program_type: int, helper: int) -> bool:
    """Return whether programs of a type may call a helper (False without privileges).

    Args:
        program_type: lib.BPF_PROG_TYPE_*.
        helper: its number in enum bpf_func_id (bpf_set_retval, for one, is 187).
    """
    attach_type = ATTACH_TYPES.get(program_type, 0)
    return bool(lib.glue_probe_helper(program_type, attach_type, helper) == 1)


def has_attach_type(program_type: int, attach_type: int) -> bool:
    """Return whether programs of a type can be loaded for this hook (False without privileges).

    Args:
        program_type: lib.BPF_PROG_TYPE_*.
        attach_type: lib.BPF_CGROUP_*.
    """
    return bool(lib.glue_probe_helper(program_type, attach_type, HARMLESS_HELPER) == 1)


def has_batch_operations() -> bool:
    """Return whether many entries of a hash map can be written in one call (Linux 5.6)."""
    table = lib.glue_map_create(lib.BPF_MAP_TYPE_HASH, b"probe", 4, 4, 1, 0)
    if table < 0:
        return False
    try:
        count = ffi.new("__u32 *", 1)
        return bool(lib.glue_map_update_batch(table, bytes(4), bytes(4), count, 0) == 0)
    finally:
        os.close(table)


def has_xdp_frags() -> bool:
    """Return whether XDP programs can be loaded that take frames of several buffers (Linux 5.18)."""
    program = lib.glue_load_trivial(lib.BPF_PROG_TYPE_XDP, XDP_HAS_FRAGS, 0)
    if program < 0:
        return False
    os.close(program)
    return True


def has_tcx() -> bool:
    """Return whether tc programs can be attached by links (Linux 6.6)."""
    program = lib.glue_load_trivial(lib.BPF_PROG_TYPE_SCHED_CLS, 0, 0)
    if program < 0:
        return False
    try:
        link = lib.glue_link_create(program, NO_DEVICE, TCX_INGRESS, 0)
    finally:
        os.close(program)
    return bool(link == -errno.ENODEV)


def has_mmapable_arrays() -> bool:
    """Return whether arrays can be mapped into memory (Linux 5.5)."""
    array = lib.glue_map_create(lib.BPF_MAP_TYPE_ARRAY, b"probe", 4, 8, 1, lib.BPF_F_MMAPABLE)
    if array < 0:
        return False
    os.close(array)
    return True
