"""What an explanation says: the same rows and sentences, from the maps or from the desired state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.dataplane.rows import AffinityRow

#: What is said of a destination that no Service has.
NO_ADDRESS = "{vip} is no address of any Service here: its traffic is left alone"
OWN_ADDRESS = "no Service uses {destination}; {vip} is this node's own address, so the packet is left alone"


class Candidate(msgspec.Struct, frozen=True):
    """A backend that new connections may go to."""

    backend: str
    state: str
    weight: int
    share: float  # of the new connections, 0 to 1
    is_local: bool


class Excluded(msgspec.Struct, frozen=True):
    """A backend that new connections do not go to."""

    backend: str
    reason: str


class Match(msgspec.Struct, frozen=True):
    """The frontend that matches under one scope."""

    scope: str  # internal | external
    frontend: str
    kind: str
    service: str
    policy: str
    scheduler: str
    affinity_s: int
    result: str  # one sentence
    candidates: tuple[Candidate, ...]
    excluded: tuple[Excluded, ...]
    affinity: AffinityRow | None = None


class Explanation(msgspec.Struct, frozen=True):
    """What happens to a new connection, and why."""

    destination: str
    source: str  # "" = not given: every scope is shown
    answer: str  # one sentence
    matches: tuple[Match, ...]


def explained(
    destination: str, source: str | None, matches: Sequence[Match], otherwise: str = ""
) -> Explanation:
    """Return an explanation, whose answer is that of the matches; without any it is ``otherwise``."""
    results = list(dict.fromkeys(match.result for match in matches)) or [otherwise]
    if len(results) > 1:
        results = [f"{match.scope} traffic: {match.result}" for match in matches]
    return Explanation(destination, source or "", "; ".join(results), tuple(matches))


def outcome(
    name: str,
    source: str | None,
    ranges: Sequence[str] | None,
    candidates: int,
    *,
    is_within: bool,
    is_dropped: bool,
    bound_to: str = "",
) -> str:
    """Return in one sentence what happens to a new connection to a Service.

    Args:
        name: of the Service.
        source: the client's address; None: not given.
        ranges: the loadBalancerSourceRanges that guard the frontend; None: nothing does.
        candidates: how many backends it may go to.
        is_within: the source is in one of the ranges.
        is_dropped: without candidates it is dropped; else it is rejected.
        bound_to: the backend that session affinity says; "" = none.
    """
    if ranges is not None and source is None:
        shown = ", ".join(ranges) or "no range at all"
        return f"goes to a backend of {name} if the client is in {shown}, else dropped"
    if ranges is not None and not is_within:
        return f"dropped: {source} is in none of the loadBalancerSourceRanges of {name}"
    if not candidates and is_dropped:
        return f"dropped: {name} has no usable backend on this node, and its traffic policy is Local"
    if not candidates:
        return f"rejected: {name} has no usable backend"
    if bound_to:
        return f"goes to {bound_to} of {name}: session affinity"
    return f"goes to one of {candidates} backends of {name}"
