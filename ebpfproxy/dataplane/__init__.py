"""Dataplanes: each makes the kernel serve a desired state. Every one is ``render -> diff -> apply``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState


class Dataplane(Protocol):
    """Makes the kernel serve a desired state."""

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change.

        Raises:
            DataplaneError: nothing or only a part was programmed; call again.
        """

    def tick(self) -> None:
        """Do periodic work (expiry, clean-up); called about once a second from the same thread."""

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
