"""Our annotations on Services: their names, what they may say, and what it means."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ebpfproxy.model import addresses
from ebpfproxy.model.services import MAGLEV_SIZES, Forwarding, OutlierEjection, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEDULER = "ebpfproxy.io/scheduler"
WEIGHTS = "ebpfproxy.io/weights"
FORWARDING = "ebpfproxy.io/forwarding"
MAGLEV_SIZE = "ebpfproxy.io/maglev-table-size"
SYN_RETRIES = "ebpfproxy.io/syn-retries"
OUTLIER_EJECTION = "ebpfproxy.io/outlier-ejection"

MAX_WEIGHT = 65535  # as IPVS has it
#: A client sends its SYN six times again (net.ipv4.tcp_syn_retries): there is no use in more.
MAX_SYN_RETRIES = 6
MAX_FAILURES, MAX_EJECTED_S = 1000, 86400


def parse_weights(text: str) -> dict[str, int]:
    """Return the weight of each address in ``10.0.0.1=3,10.0.0.2=0``, addresses in canonical form.

    Raises:
        ValueError: says what is wrong.
    """
    weights: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        address, _, weight = (part.strip() for part in pair.partition("="))
        if addresses.pack(address) is None:
            raise ValueError(f"{address!r} is not an IP address")
        if not re.fullmatch(r"[0-9]{1,5}", weight) or int(weight) > MAX_WEIGHT:
            raise ValueError(f"the weight of {address} must be between 0 and {MAX_WEIGHT}, inclusive")
        if (address := addresses.canonical(address)) in weights:
            raise ValueError(f"{address} has two weights")
        weights[address] = int(weight)
    return weights


def parse_syn_retries(text: str) -> int:
    """Return a number of retries.

    Raises:
        ValueError: says what is wrong.
    """
    if not re.fullmatch(r"[0-9]{1,2}", text) or int(text) > MAX_SYN_RETRIES:
        raise ValueError(f"must be between 0 and {MAX_SYN_RETRIES}, inclusive")
    return int(text)


def parse_outlier_ejection(text: str) -> OutlierEjection | None:
    """Return what ``failures=5,seconds=30,max-percent=50`` says; all three have defaults. None for ``off``.

    Raises:
        ValueError: says what is wrong.
    """
    if text == "off":
        return None
    limits = {"failures": (5, MAX_FAILURES), "seconds": (30, MAX_EJECTED_S), "max-percent": (50, 100)}
    found = {name: default for name, (default, _) in limits.items()}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in limits:
            raise ValueError(f"{name!r} is none of {', '.join(limits)}, off")
        most = limits[name][1]
        if not re.fullmatch(r"[0-9]{1,5}", value) or not 1 <= int(value) <= most:
            raise ValueError(f"{name} must be between 1 and {most}, inclusive")
        found[name] = int(value)
    return OutlierEjection(found["failures"], found["seconds"], found["max-percent"])


#: Annotations that say one of a few words.
CHOICES: Mapping[str, tuple[str, ...]] = {
    SCHEDULER: tuple(Scheduler),
    FORWARDING: tuple(Forwarding),
    MAGLEV_SIZE: tuple(map(str, MAGLEV_SIZES)),
}
#: All others, with what reads them.
PARSED: Mapping[str, Callable[[str], object]] = {
    WEIGHTS: parse_weights,
    SYN_RETRIES: parse_syn_retries,
    OUTLIER_EJECTION: parse_outlier_ejection,
}
