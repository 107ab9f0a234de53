"""A tun device with tc_ingress and tc_egress attached, one UDP packet in, one out. Runs in a namespace.

Usage: tun_child.py INGRESS-PIN EGRESS-PIN ROUTE... < packets. Each packet is a line of hexadecimal digits;
what leaves the device is printed likewise.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack

from ebpfproxy import netlink
from ebpfproxy.libbpf import TCX_EGRESS, TCX_INGRESS, Link, Program
from ebpfproxy.libbpf.probes import has_tcx

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 1, 0x1000
DEVICE = "tun0"
TIMEOUT_S = 5


def is_answer(sent: bytes, got: bytes) -> bool:
    """Tell our datagrams and rejections from the kernel's hints that both ends are behind one device."""
    if sent[0] >> 4 == 4:
        return got[9] == socket.IPPROTO_UDP or got[12:16] == sent[16:20]
    return got[6] == socket.IPPROTO_UDP or got[8:24] == sent[24:40]


def main() -> None:
    ingress, egress, *routes = sys.argv[1:]
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    commands = ["echo 1 > /proc/sys/net/ipv4/ip_forward", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"]
    commands += [f"ip link set {DEVICE} up", *(f"ip route add {route} dev {DEVICE}" for route in routes)]
    subprocess.run(["sh", "-e", "-c", "\n".join(commands)], check=True)
    index = socket.if_nametoindex(DEVICE)
    with ExitStack() as attached:
        for path, attach_type, parent in (
            (ingress, TCX_INGRESS, netlink.INGRESS),
            (egress, TCX_EGRESS, netlink.EGRESS),
        ):
            program = attached.enter_context(Program.open(path))
            if has_tcx():
                attached.enter_context(Link.attach_tcx(program, index, attach_type))
            else:  # goes with the device
                netlink.set_filter(index, parent, program.fd, "tun_child")
        for line in sys.stdin:
            packet = bytes.fromhex(line)
            os.write(tun, packet)
            while True:
                readable, _, _ = select.select([tun], [], [], TIMEOUT_S)
                if not readable:
                    sys.exit("nothing came back")
                answer = os.read(tun, 65536)
                if is_answer(packet, answer):
                    print(answer.hex(), flush=True)
                    break


if __name__ == "__main__":
    main()
