"""Classic BPF socket filters that let only some sources in. Pure, but for ``attach``.

A filter is what a process has to *drop*: a listening socket whose filter refuses a SYN answers nothing, as if
the packet had been lost. Accepted sockets keep the filter that their listener had. UDP sockets take one from
everybody; TCP sockets did, until Linux asked for CAP_NET_ADMIN (seen in 6.18.44).

Source: Linux Documentation/networking/filter.rst; include/uapi/linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
#: BPF_MAXINSNS.
INSTRUCTIONS_MAX = 4096

_LOAD, _AND, _JUMP_EQUAL, _JUMP, _RETURN = 0x20, 0x54, 0x15, 0x05, 0x06  # ld [k]; and; jeq; ja; ret
_NET_OFF = 0x1_0000_0000 - 0x100000  # SKF_NET_OFF: the network header, wherever the packet's data starts
_SOURCE = {4: 12, 6: 8}  # offset of the source address in an IP header
_KEEP, _DROP = 0xFFFFFFFF, 0

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def program(family: int, walls: Sequence[Iterable[str]]) -> list[Instruction] | None:
    """Return the filter that admits a source which is in one prefix of every wall.

    Args:
        family: 4 | 6; prefixes of the other are passed over.
        walls: each a set of prefixes; an empty wall admits nobody.

    Returns:
        The instructions; None if the kernel takes no filter of that length.
    """
    code: list[Instruction] = []
    for wall in walls:
        part = _wall(family, wall)
        code += part
    code.append((_RETURN, 0, 0, _KEEP))
    return code if len(code) <= INSTRUCTIONS_MAX else None


def _wall(family: int, prefixes: Iterable[str]) -> list[Instruction]:
    """Return instructions that fall through for sources in a prefix and drop all others."""
    networks = [network for network in map(ipaddress.ip_network, prefixes) if network.version == family]
    tests = [_test(family, network) for network in ipaddress.collapse_addresses(networks)]  # type: ignore[type-var]
    code: list[Instruction] = []
    left = sum(len(test) + 1 for test in tests) + 1  # each test, its jump out of the wall, the drop
    for test in tests:
        left -= len(test) + 1
        code += [*test, (_JUMP, 0, 0, left)]
    return [*code, (_RETURN, 0, 0, _DROP)]


def _test(family: int, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> list[Instruction]:
    """Return instructions that fall through to the next one if the source is in ``network``, else skip it."""
    size = 4 if family == 4 else 16
    words = struct.unpack(f"!{size // 4}I", network.network_address.packed)
    masks = struct.unpack(f"!{size // 4}I", network.netmask.packed)
    steps: list[list[Instruction]] = []
    for index, (word, mask) in enumerate(zip(words, masks, strict=True)):
        if mask:
            load = (_LOAD, 0, 0, _NET_OFF + _SOURCE[family] + 4 * index)
            narrow = [(_AND, 0, 0, mask)] if mask != 0xFFFFFFFF else []
            steps.append([load, *narrow, (_JUMP_EQUAL, 0, 0, word)])
    left = sum(map(len, steps))
    code: list[Instruction] = []
    for step in steps:
        left -= len(step)
        *before, (jump, _, _, word) = step
        code += [*before, (jump, 0, left + 1, word)]
    return code


def attach(sock: socket.socket, code: Sequence[Instruction] | None) -> None:
    """Put a filter on ``sock`` in place of the one it has; None: none."""
    if code is None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        return
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(code), ctypes.addressof(buffer))
    )
