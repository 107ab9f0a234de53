"""What was made of each Service, kept for as long as the Service and its context stay the same. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ebpfproxy.model.services import Protocol, Service, ServiceName

C = TypeVar("C")
P = TypeVar("P")


class Memo(Generic[C, P]):
    """Renders Services; one that is the identical object as before costs nothing.

    Args:
        render: makes a part of a Service and the context.
    """

    def __init__(self, render: Callable[[Service, C], P]) -> None:
        self._render = render
        self._context: C | None = None
        self._parts: dict[tuple[ServiceName, Protocol], tuple[Service, P]] = {}

    def parts(self, services: Iterable[Service], context: C) -> list[tuple[Service, P]]:
        """Return each Service with its part, and forget all others."""
        known = self._parts if context == self._context else {}
        self._context, self._parts = context, {}
        for service in services:
            key = (service.name, service.protocol)
            found = known.get(key)
            if found is None or found[0] is not service:
                found = (service, self._render(service, context))
            self._parts[key] = found
        return list(self._parts.values())
