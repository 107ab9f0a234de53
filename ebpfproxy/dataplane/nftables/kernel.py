"""The nft tool: runs transactions, and reads back what an earlier run programmed.

A transaction makes nft ask for the *names* of chains and sets, some 2 us each; what is in them is never
listed by an update.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any

from ebpfproxy.dataplane.nftables.render import BASE_CHAINS, MAPS, SETS, TABLE, Object, header
from ebpfproxy.errors import DataplaneError, KernelError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TIMEOUT_S = 120.0
# uapi/linux/netfilter/nfnetlink.h and nf_tables.h
_NETLINK_NETFILTER = 12
_GETGEN = 10 << 8 | 16
_REQUEST = 1
_ERROR = 2
_GEN_ID = 1

#: Uses each kind of expression that we need, in both families; nothing of it is kept.
_PROBE = """\
add table {ip} ebpfproxy-probe
add map {ip} ebpfproxy-probe m {{ type {addr} . inet_proto . inet_service : verdict; }}
add set {ip} ebpfproxy-probe s {{ type {addr}; size 9; flags dynamic,timeout; timeout 9s; }}
add set {ip} ebpfproxy-probe r {{ type {addr}; flags interval; }}
add chain {ip} ebpfproxy-probe a
add chain {ip} ebpfproxy-probe b {{ type nat hook prerouting priority -110; }}
add chain {ip} ebpfproxy-probe c {{ type nat hook postrouting priority 90; }}
add chain {ip} ebpfproxy-probe d {{ type nat hook output priority -110; }}
add rule {ip} ebpfproxy-probe a update @s {{ {ip} saddr }}
add rule {ip} ebpfproxy-probe a jhash {ip} saddr mod 3 seed 0x5eed < 1 meta l4proto tcp dnat {ip} to {backend}
add rule {ip} ebpfproxy-probe a numgen random mod 3 < 1 numgen inc mod 2 < 1 reject with tcp reset
add rule {ip} ebpfproxy-probe b {ip} daddr . meta l4proto . th dport vmap @m
add rule {ip} ebpfproxy-probe b meta mark set meta mark | 0x4000 goto a
add rule {ip} ebpfproxy-probe c fib saddr type != local {ip} daddr @r ct original {ip} daddr != @r return
add rule {ip} ebpfproxy-probe c masquerade fully-random
add rule {ip} ebpfproxy-probe d goto a
"""


def families() -> tuple[int, ...]:
    """Return the IP families that this kernel has."""
    return (4, 6) if os.path.exists("/proc/net/if_inet6") else (4,)  # noqa: PTH110 - a file of the kernel's


def why_not() -> str | None:
    """Return in one sentence why transactions like ours don't work here, None if they do; changes nothing."""
    words = {
        4: {"ip": "ip", "addr": "ipv4_addr", "backend": "192.0.2.1:80"},
        6: {"ip": "ip6", "addr": "ipv6_addr", "backend": "[2001:db8::1]:80"},
    }
    text = "".join(_PROBE.format(**words[family]) for family in families())
    try:
        run(text, check_only=True)
    except DataplaneError as error:
        return str(error)
    return None


def is_missing() -> bool:
    """Return whether there is no nft."""
    return shutil.which("nft") is None


def run(commands: str, *, check_only: bool = False) -> None:
    """Run a transaction: all of it or nothing.

    Raises:
        UnsupportedError: there is no nft.
        DataplaneError: the kernel or nft refused it; nothing was changed.
    """
    _nft(["-c", "-f", "-"] if check_only else ["-f", "-"], commands)


def _nft(arguments: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=text.encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise UnsupportedError("run nft: there is none; install the package nftables") from None
    except subprocess.TimeoutExpired:
        raise DataplaneError(f"run nft: not done after {_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise DataplaneError(f"run nft: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DataplaneError(f"run nft: {'; '.join(line.strip() for line in lines[:2]) or 'failed'}")
    return done.stdout.decode()


def generation() -> int:
    """Return a number that changes with every transaction of anybody in this network namespace.

    Raises:
        KernelError: the kernel does not say.
    """
    request = struct.pack("=IHHIIBBH", 20, _GETGEN, _REQUEST, 1, 0, 0, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
            connection.settimeout(10)
            connection.send(request)
            answer = connection.recv(4096)
    except OSError as error:
        raise KernelError(f"ask for nftables' generation: {error.strerror}", error.errno or 0) from error
    (kind,) = struct.unpack_from("=H", answer, 4)
    at = 20
    while kind != _ERROR and at + 8 <= len(answer):
        size, attribute = struct.unpack_from("=HH", answer, at)
        if attribute & 0x3FFF == _GEN_ID:
            return int(struct.unpack_from(">I", answer, at + 4)[0])
        at += (size + 3) & ~3
    raise KernelError("ask for nftables' generation: refused", 0)


def has_tables(wanted: Iterable[int], name: str = TABLE) -> bool:
    """Return whether tables of a name, ours, are there in all of these families."""
    return all(_has_table(family, name) for family in wanted)


def _has_table(family: int, name: str) -> bool:
    listed = _list("tables", header(family))
    return any(each["table"]["name"] == name for each in listed if "table" in each)


def read(wanted: Iterable[int]) -> dict[Object, str] | None:
    """Return what is programmed; None: nothing, or the part that is always there is not as we made it.

    Chains and sets have the value "": what is in them is in their name.
    """
    found: dict[Object, str] = {}
    for family in wanted:
        ip = header(family)
        if not _has_table(family, TABLE):
            return None
        chains = {name for name, _ in _named("chain", _list("chains", ip))}
        sets = {name for name, _ in _named("set", _list("-t", "sets", ip))}
        maps = {name for name, _ in _named("map", _list("-t", "maps", ip))}
        base = BASE_CHAINS if family == 4 else BASE_CHAINS - {"guard"}
        if not base <= chains or not SETS.keys() <= sets or not MAPS.keys() <= maps:
            return None
        if not any("rule" in each for each in _list("chain", ip, TABLE, "prerouting")):
            return None  # somebody flushed the chains and left them there
        found.update(dict.fromkeys((Object(family, "chain", name) for name in chains - base), ""))
        found.update(dict.fromkeys((Object(family, "set", name) for name in sets - SETS.keys()), ""))
        for kind, names in (("map", MAPS), ("set", SETS)):
            for name in names:
                for _, body in _named(kind, _list(kind, ip, TABLE, name)):
                    for key, value in _elements(body):
                        found[Object(family, "element", name, key)] = value
    return found


def _list(*what: str) -> list[Any]:
    """Return what nft lists: a list of objects with one key each, which says their kind."""
    options = [each for each in what if each.startswith("-")]
    words = [each for each in what if not each.startswith("-")]
    listed: list[Any] = json.loads(_nft(["-j", *options, "list", *words]))["nftables"]
    return listed


def _named(kind: str, listed: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of each of our objects of one kind."""
    for each in listed:
        body = each.get(kind)
        if body is not None and body["table"] == TABLE:
            yield body["name"], body


def _elements(body: Any) -> Iterator[tuple[str, str]]:
    """Yield keys and values of a set's or map's elements as we write them."""
    for each in body.get("elem", ()):
        if isinstance(each, list):
            yield _key(each[0]), _verdict(each[1])
        else:
            yield _key(each), ""


def _key(value: Any) -> str:
    if isinstance(value, dict):
        if "concat" in value:
            return " . ".join(map(_key, value["concat"]))
        if "prefix" in value:
            return f"{value['prefix']['addr']}/{value['prefix']['len']}"
        if "range" in value:
            return "-".join(map(_key, value["range"]))
        if "elem" in value:
            return _key(value["elem"]["val"])
    return str(value)


def _verdict(value: Any) -> str:
    ((kind, detail),) = value.items()
    return f"{kind} {detail['target']}" if detail else str(kind)
