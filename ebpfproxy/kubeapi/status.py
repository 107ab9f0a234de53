"""Refusals in an API server's own words."""

from __future__ import annotations

import msgspec

from ebpfproxy.errors import ApiError


class Details(msgspec.Struct, frozen=True, rename="camel"):
    """More about it."""

    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """What an API server says when it does not do a thing: Status v1."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: Details | None = None

    def error(self, what: str) -> ApiError:
        """Return it as an exception."""
        wait_s = self.details.retry_after_seconds if self.details else 0
        return ApiError(f"{what}: {self.message or self.reason}", self.code, self.reason, wait_s)
