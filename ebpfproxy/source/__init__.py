"""Sources: where objects come from. Each tells a stream of events; the store keeps the latest state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from ebpfproxy.store import Event, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reported(msgspec.Struct, frozen=True):
    """All that is wrong with what a source reads, as it is now; () when nothing is."""

    problems: tuple[str, ...]


SourceEvent: TypeAlias = Event | Reported | Reach


class Source(Protocol):
    """Delivers objects."""

    def batches(self) -> Iterator[tuple[SourceEvent, ...]]:
        """Yield what changed, blocking in between; ``Synced`` follows what was there at the start.

        The events of one batch belong together: what is new or changed comes first, what is gone last.
        It ends after ``close``.

        Raises:
            SourceError: nothing can be delivered.
        """

    def reread(self) -> None:
        """Read everything again, and say ``Synced`` again after it; called from any thread."""

    def close(self) -> None:
        """End ``batches``; called from any thread."""
