"""Mode ``userspace``: whether this machine can run it, what it is made from, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.modes import Made, Site

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ebpfproxy.config import Config
    from ebpfproxy.metrics import Reading


def usable() -> str | None:
    """Return why this machine can't run it without addresses to listen on, None if it can."""
    from ebpfproxy.dataplane.userspace import features

    return features.usable()


def make(settings: Config, site: Site, stack: ExitStack) -> Made:
    """Make the dataplane, and hold the lock of our rules in this network namespace."""
    from ebpfproxy.dataplane.userspace.dataplane import UserspaceDataplane, UserspaceOptions
    from ebpfproxy.dataplane.userspace.protocol import Settings
    from ebpfproxy.host import NetworkLock

    if not settings.listen_addresses:
        stack.callback(NetworkLock("userspace").close)
    usual = Settings()
    options = UserspaceOptions(
        state_dir=site.state_dir,
        listen=settings.listen_addresses,
        timeouts=Settings(
            tcp_idle_s=settings.tcp_established_s or usual.tcp_idle_s,
            tcp_half_closed_s=settings.tcp_close_wait_s or usual.tcp_half_closed_s,
            udp_s=settings.udp_s or usual.udp_s,
            udp_stream_s=settings.udp_stream_s or usual.udp_stream_s,
        ),
        log_format=settings.log_format,
    )
    return Made(UserspaceDataplane(options), site._replace(cgroup=None, bpffs=None))


def reading(site: Site) -> Reading:
    """Return what the proxy counts, since it began; nothing while none runs."""
    from ebpfproxy.dataplane.userspace import client
    from ebpfproxy.metrics import Reading

    counts = client.counts(site.state_dir)
    if counts is None:
        return Reading()
    return Reading(
        verdicts={
            "proxied": counts.connections + counts.flows,
            "retried": counts.retries,
            "unanswered": counts.failures,
            "short-of-descriptors": counts.limits,
        }
    )


def cleanup(site: Site) -> list[str]:
    """Remove the rules, and end the proxy."""
    from ebpfproxy.dataplane.userspace.cleanup import cleanup as remove

    return remove(site.state_dir)
