"""Number ranges to allocate from: who has which value, and which one is next."""

from __future__ import annotations

import ipaddress
import zlib
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ebpfproxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

V = TypeVar("V", str, int)

MAX_DYNAMIC = 1 << 16  # values of one range that are given out; an IPv6 range is far larger than any need


class Range(NamedTuple):
    """Numbers ``first`` to ``last``; the first ``band`` of them are given out last.

    So values that people ask for by hand, low ones by custom, are rarely taken.
    """

    text: str
    first: int
    last: int
    band: int = 0

    def size(self) -> int:
        """Return how many numbers can be given out."""
        return min(self.last - self.first + 1, MAX_DYNAMIC)

    def numbers(self, seed: str) -> Iterator[int]:
        """Yield every number, upper band first, from a place that depends on ``seed`` only.

        So a value is not reused at once, and a lost ledger gives nearly the same values again.
        """
        start = zlib.crc32(seed.encode())
        for low, count in ((self.first + self.band, self.size() - self.band), (self.first, self.band)):
            for i in range(count):
                yield low + (start + i) % count


class Space(Generic[V]):
    """Which values have which owner.

    Args:
        render: turns a number of a range into a value.
        parse: the other way round.
    """

    def __init__(self, render: Callable[[int], V], parse: Callable[[V], int]) -> None:
        self._render: Callable[[int], V] = render
        self._parse: Callable[[V], int] = parse
        self.owners: dict[V, Hashable] = {}
        self._counts: dict[Range, int] = {}

    def take(self, value: V, owner: Hashable, within: Range | None) -> bool:
        """Give a value, which lies ``within`` a range or in none, to an owner; False if another has it."""
        if value in self.owners:
            return self.owners[value] == owner
        self.owners[value] = owner
        if within is not None:
            self._counts[within] = self._counts.get(within, 0) + 1
        return True

    def holds(self, within: Range, value: V) -> bool:
        """Say whether a value lies in a range."""
        return within.first <= self._parse(value) <= within.last

    def release(self, value: V, owner: Hashable, within: Range | None) -> None:
        """Take a value back from an owner."""
        if self.owners.get(value) == owner:
            del self.owners[value]
            if within is not None:
                self._counts[within] -= 1

    def pick(self, within: Range, owner: Hashable, seed: str) -> V | None:
        """Give a free value to an owner; None if the range is full."""
        if self._counts.get(within, 0) >= within.size():
            return None
        for number in within.numbers(seed):
            value = self._render(number)
            if value not in self.owners and self.take(value, owner, within):
                return value
        return None


def cluster_ip_range(text: str) -> Range:
    """Return the addresses of a prefix that Services can have.

    Not the network address, and with IPv4 not the broadcast address.

    Raises:
        ConfigError: it is no prefix.

    Source: Kubernetes "Service ClusterIP allocation": the band is min(max(16, size / 16), 256).
    """
    return _prefix(text, "cluster IP range", band=True)


def _prefix(text: str, what: str, *, band: bool) -> Range:
    try:
        network = ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: {error}") from None
    size = network.num_addresses
    first = int(network.network_address) + (size > 2)
    last = int(network.broadcast_address) - (size > 2 and network.version == 4)
    offset = min(max(16, size // 16), 256) if band and size > 16 else 0
    return Range(text, first, last, min(offset, last - first + 1))


def node_port_range(first: int, last: int) -> Range:
    """Return a range of node ports.

    Source: Kubernetes "Choosing your own port": the band is min(max(16, size / 32), 128).
    """
    size = last - first + 1
    return Range(f"{first}-{last}", first, last, min(max(16, size // 32), 128) if size > 16 else 0)


def pool_range(text: str) -> Range:
    """Return a pool of addresses: a prefix, or ``first-last``.

    Raises:
        ConfigError: it is neither.
    """
    low, dash, high = text.partition("-")
    if not dash:
        return _prefix(text, "load-balancer pool", band=False)
    try:
        first, last = ipaddress.ip_address(low.strip()), ipaddress.ip_address(high.strip())
    except ValueError as error:
        raise ConfigError(f"load-balancer pool {text!r}: {error}") from None
    if first.version != last.version or int(first) > int(last):
        raise ConfigError(f"load-balancer pool {text!r}: the first address must not lie behind the last")
    return Range(text, int(first), int(last))
