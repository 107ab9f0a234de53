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
    """Make the dataplane; the state directory's lock, which the agent holds, is the proxy's too."""
    from ebpfproxy.dataplane.userspace.dataplane import UserspaceDataplane, UserspaceOptions
    from ebpfproxy.dataplane.userspace.protocol import Settings

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
    """Return what is counted for every mode: the proxy's own counts are in its answer to ``status``."""
    from ebpfproxy.metrics import Reading

    return Reading()


def cleanup(site: Site) -> list[str]:
    """Remove the rules, and end the proxy."""
    from ebpfproxy.dataplane.userspace.cleanup import cleanup as remove

    return remove(site.state_dir)
