"""What is decided from this host's devices and addresses."""

from __future__ import annotations

import pytest

from ebpfproxy.netlink import Address, Device, node_port_addresses, select_devices


def address(text: str, *, device: int = 2, is_global: bool = True, is_secondary: bool = False) -> Address:
    return Address(text, 6 if ":" in text else 4, device, is_global, is_secondary)


HOST = [
    address("127.0.0.1", device=1, is_global=False),
    address("192.0.2.10"),
    address("192.0.2.11", is_secondary=True),
    address("10.0.0.1", device=3),
    address("::1", device=1, is_global=False),
    address("2001:db8::10"),
    address("fe80::1", is_global=False),
]


@pytest.mark.parametrize(
    ("selectors", "primary", "serving"),
    [
        ([], [], "127.0.0.1 192.0.2.10 192.0.2.11 10.0.0.1 ::1 2001:db8::10"),
        (["10.0.0.0/8"], [], "10.0.0.1"),
        (["192.0.2.0/24", "2001:db8::/32"], [], "192.0.2.10 192.0.2.11 2001:db8::10"),
        (["0.0.0.0/0", "::/0"], [], "127.0.0.1 192.0.2.10 192.0.2.11 10.0.0.1 ::1 2001:db8::10"),
        (["198.51.100.0/24"], [], ""),
        (["primary"], ["10.0.0.1", "203.0.113.1"], "10.0.0.1"),
        (["primary"], [], "192.0.2.10 2001:db8::10"),
    ],
)
def test_node_port_addresses(selectors: list[str], primary: list[str], serving: str) -> None:
    found = node_port_addresses(HOST, selectors, primary)
    assert found.serving == frozenset(serving.split())
    assert found.local == {each.address for each in HOST}


DEVICES = [
    Device(1, "lo", "", "", is_loopback=True, is_up=True),
    Device(2, "eth0", "", "", is_loopback=False, is_up=True),
    Device(3, "br0", "bridge", "", is_loopback=False, is_up=True),
    Device(4, "veth0", "veth", "bridge", is_loopback=False, is_up=True),
    Device(5, "eth1", "", "bond", is_loopback=False, is_up=True),
    Device(6, "eth2", "", "vrf", is_loopback=False, is_up=True),
    Device(7, "eth0.100", "vlan", "", is_loopback=False, is_up=False),
]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], "eth0 br0 eth2 eth0.100"),
        (["veth*"], "veth0"),
        (["eth0", "lo"], "lo eth0"),
        (["nothing*"], ""),
    ],
)
def test_devices(patterns: list[str], names: str) -> None:
    assert [device.name for device in select_devices(DEVICES, patterns)] == names.split()
