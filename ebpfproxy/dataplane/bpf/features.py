"""What this machine has of what the BPF dataplane needs, one by one, asked by trying; changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import host, sockdiag
from ebpfproxy.dataplane.bpf.attach import CGROUP_PROGRAMS, INITIAL_NETNS, NO_NETNS, netns_cookie
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.libbpf import Map, MapDefinition, lib, probes

if TYPE_CHECKING:
    from collections.abc import Callable

#: enum bpf_func_id, uapi/linux/bpf.h.
BPF_FUNC_GET_NETNS_COOKIE = 122
BPF_FUNC_KTIME_GET_COARSE_NS = 160
BPF_FUNC_SET_RETVAL = 187

_SOCK_ADDR, _SOCK = lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, lib.BPF_PROG_TYPE_CGROUP_SOCK
_HOOKS = {
    "sock_connect4": (_SOCK_ADDR, lib.BPF_CGROUP_INET4_CONNECT),
    "sock_connect6": (_SOCK_ADDR, lib.BPF_CGROUP_INET6_CONNECT),
    "sock_sendmsg4": (_SOCK_ADDR, lib.BPF_CGROUP_UDP4_SENDMSG),
    "sock_sendmsg6": (_SOCK_ADDR, lib.BPF_CGROUP_UDP6_SENDMSG),
    "sock_recvmsg4": (_SOCK_ADDR, lib.BPF_CGROUP_UDP4_RECVMSG),
    "sock_recvmsg6": (_SOCK_ADDR, lib.BPF_CGROUP_UDP6_RECVMSG),
    "sock_peername4": (_SOCK_ADDR, lib.BPF_CGROUP_INET4_GETPEERNAME),
    "sock_peername6": (_SOCK_ADDR, lib.BPF_CGROUP_INET6_GETPEERNAME),
    "sock_postbind4": (_SOCK, lib.BPF_CGROUP_INET4_POST_BIND),
    "sock_postbind6": (_SOCK, lib.BPF_CGROUP_INET6_POST_BIND),
    "sock_release": (_SOCK, lib.BPF_CGROUP_INET_SOCK_RELEASE),
}


class Feature(msgspec.Struct, frozen=True):
    """One thing that this machine has or lacks."""

    name: str
    ok: bool
    required: bool  # without it the BPF dataplane does not run
    since: str  # the Linux version that brought it; "" = a matter of set-up
    needed_for: str
    detail: str  # where it was found, or what happens without it


def _feature(name: str, ok: bool, since: str, needed_for: str, without: str = "", found: str = "") -> Feature:
    """Return a feature; one without ``without`` is required."""
    missing = without or "the BPF dataplane can't run"
    return Feature(name, ok, not without, since, needed_for, found if ok else missing)


def program_features() -> int:
    """Return what this kernel has that programs use where they can: bits of ``enum feature``."""
    helpers = {
        lib.FEATURE_SET_RETVAL: BPF_FUNC_SET_RETVAL,
        lib.FEATURE_COARSE_CLOCK: BPF_FUNC_KTIME_GET_COARSE_NS,
    }
    return sum(bit for bit, helper in helpers.items() if probes.has_helper(_SOCK_ADDR, helper))


def privileges() -> str | None:
    """Return why this process may not use BPF, None if it may."""
    try:
        Map.create(MapDefinition("probe", lib.BPF_MAP_TYPE_ARRAY, 4, 4, 1, 0)).close()
    except EbpfproxyError as error:
        return str(error)
    return None


def probe() -> list[Feature]:
    """Return every feature that matters, required ones first."""
    problem = privileges()
    not_closing = sockdiag.why_not()
    features = [
        _feature("bpf() system call", problem is None, "", "everything", found="allowed")
        if problem is None
        else Feature("bpf() system call", False, True, "", "everything", problem),
        _place("bpf file system", "keeping maps and programs while the agent restarts", _bpffs),
        _place("cgroup v2", "local clients", lambda: str(host.find_cgroup2())),
        *_map_types(),
        _feature(
            "memory-mapped arrays",
            probes.has_mmapable_arrays(),
            "5.5",
            "maps slots, backends and their counters",
        ),
        _feature(
            "tc programs", probes.has_program_type(lib.BPF_PROG_TYPE_SCHED_CLS), "4.1", "traffic that enters"
        ),
        *_hooks(),
        _feature(
            "bpf_get_netns_cookie",
            probes.has_helper(_SOCK_ADDR, BPF_FUNC_GET_NETNS_COOKIE),
            "5.7",
            "NodePorts on loopback, affinity of unbound sockets",
        ),
        _feature(
            "bpf_set_retval",
            probes.has_helper(_SOCK_ADDR, BPF_FUNC_SET_RETVAL),
            "5.18",
            "ECONNREFUSED from connect() to a Service without backends",
            "connect() fails with EPERM instead",
        ),
        _feature(
            "bpf_ktime_get_coarse_ns",
            probes.has_helper(_SOCK_ADDR, BPF_FUNC_KTIME_GET_COARSE_NS),
            "5.11",
            "the time at the price of a memory access",
            "each packet asks for the exact time, which takes longer",
        ),
        _feature(
            "tcx links",
            probes.has_tcx(),
            "6.6",
            "attaching to devices so that it lasts and others can't replace it",
            "clsact filters are used",
        ),
        _feature(
            "batch operations",
            probes.has_batch_operations(),
            "5.6",
            "many entries in one system call",
            "entries are written one by one: large changes take longer",
        ),
        _feature(
            "SO_NETNS_COOKIE",
            netns_cookie() not in (INITIAL_NETNS, NO_NETNS),
            "5.14",
            "NodePorts on loopback, if the agent is not in the machine's own network namespace",
            "NodePorts do not answer on 127.0.0.1 and ::1"
            if netns_cookie() == NO_NETNS
            else "the agent is in the machine's own: NodePorts do answer there",
        ),
        _feature(
            "SOCK_DESTROY",
            not_closing is None,
            "4.9",
            "ending connected UDP sockets whose backend is gone",
            f"they go on sending to nobody: {not_closing}",
        ),
        _feature(
            "kernel BTF",
            Path("/sys/kernel/btf/vmlinux").exists(),
            "5.2",
            "types in the output of bpftool",
            "bpftool shows bytes",
        ),
    ]
    return sorted(features, key=lambda feature: not feature.required)


def usable() -> str | None:
    """Return why the BPF dataplane can't run on this machine, None if it can."""
    problem = privileges()
    if problem is not None:
        return problem
    for feature in probe():
        if feature.required and not feature.ok:
            since = f" (Linux {feature.since})" if feature.since else ""
            return f"{feature.name}{since} is missing: {feature.detail}"
    return None


def _bpffs() -> str:
    found = host.find_bpffs()
    return str(found) if found else f"not mounted; `ebpfproxy run` mounts it at {host.BPFFS}"


def _place(name: str, needed_for: str, find: Callable[[], str]) -> Feature:
    """Return a feature that is a mount; ``find`` raises when it is missing."""
    try:
        return Feature(name, True, True, "", needed_for, find())
    except EbpfproxyError as error:
        return Feature(name, False, True, "", needed_for, str(error))


def _map_types() -> list[Feature]:
    wanted = (
        ("hash maps", lib.BPF_MAP_TYPE_HASH, "3.19", "maps services, vips, service_names"),
        ("LRU hash maps", lib.BPF_MAP_TYPE_LRU_HASH, "4.10", "maps conntrack, sockets, affinity"),
        ("LPM tries", lib.BPF_MAP_TYPE_LPM_TRIE, "4.11", "maps source_ranges, local_sources"),
        ("per-CPU arrays", lib.BPF_MAP_TYPE_PERCPU_ARRAY, "4.6", "map verdicts"),
    )
    return [_feature(name, probes.has_map_type(kind), since, use) for name, kind, since, use in wanted]


def _hooks() -> list[Feature]:
    features = []
    for program, (kind, attach_type) in _HOOKS.items():
        purpose, since = CGROUP_PROGRAMS[program]
        ok = probes.has_attach_type(kind, attach_type)
        features.append(_feature(f"cgroup hook of {program}", ok, since, purpose))
    return features
