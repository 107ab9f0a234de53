"""The dataplanes that the tests of this directory run with, and what one of them can't do.

A new mode joins the tests by its name in MODES.
"""

from __future__ import annotations

import pytest

from ebpfproxy.dataplane import capabilities
from ebpfproxy.errors import UnsupportedError
from ebpfproxy.netlink.ipvs import Ipvs


def has_ipvs() -> bool:
    """Return whether this kernel has IPVS; ``make test-vm`` runs what needs it under one that does."""
    try:
        Ipvs().close()
    except UnsupportedError:
        return False
    return True


MODES = ("bpf", "nftables", "iptables", "userspace", *(["ipvs"] if has_ipvs() else []))


def expect_limits(request: pytest.FixtureRequest, mode: str, *features: str) -> None:
    """Make the test one that must fail if ``mode`` does not do one of ``features``; the reason is shown."""
    for name in features:
        reason = capabilities.limit(mode, name)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=f"{mode}: {reason}", strict=True))


def skip_limits(mode: str, *features: str) -> None:
    """Skip what would only take long to fail in ``mode``."""
    for name in features:
        reason = capabilities.limit(mode, name)
        if reason is not None:
            pytest.skip(f"{mode}: {reason}")
