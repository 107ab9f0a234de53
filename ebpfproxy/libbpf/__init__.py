"""The one home of libbpf: maps, programs, links and objects of the kernel, and abi.h.

``lib`` holds libbpf's functions and every enum value of abi.h; ``ffi`` makes and reads its structs:
``ffi.new("struct service *")``, ``bytes(ffi.buffer(...))``.
"""

from __future__ import annotations

from ebpfproxy.libbpf._ffi import ffi, lib
from ebpfproxy.libbpf.errors import check, kernel_error
from ebpfproxy.libbpf.maps import Map, MapDefinition
from ebpfproxy.libbpf.objects import STAMP, Object
from ebpfproxy.libbpf.programs import (
    TCX_EGRESS,
    TCX_INGRESS,
    XDP_GENERIC,
    XDP_NATIVE,
    Link,
    LinkInfo,
    Program,
    ProgramDefinition,
    RunResult,
)

__all__ = [
    "STAMP",
    "TCX_EGRESS",
    "TCX_INGRESS",
    "XDP_GENERIC",
    "XDP_NATIVE",
    "Link",
    "LinkInfo",
    "Map",
    "MapDefinition",
    "Object",
    "Program",
    "ProgramDefinition",
    "RunResult",
    "check",
    "ffi",
    "kernel_error",
    "lib",
]

lib.glue_init()
