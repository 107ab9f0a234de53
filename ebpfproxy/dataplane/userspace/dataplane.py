"""Keeps the proxy process, and the rules that lead to it, in step with the desired state."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import conntrack
from ebpfproxy.conntrack import Endpoint
from ebpfproxy.dataplane.userspace import client, features, rules
from ebpfproxy.dataplane.userspace.protocol import Listener, ServicePort, Settings, Update
from ebpfproxy.dataplane.userspace.render import render
from ebpfproxy.diff import diff
from ebpfproxy.errors import DataplaneError, EbpfproxyError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ebpfproxy.dataplane.userspace.render import Redirects
    from ebpfproxy.model.services import DesiredState

log = logging.getLogger(__name__)

#: How often it is looked whether the rules are still there.
CANARY_S = 3.0


class UserspaceOptions(msgspec.Struct, frozen=True):
    """How the mode works.

    Attributes:
        state_dir: holds the proxy's socket.
        listen: addresses to serve on without rules; () = rules lead VIPs to the proxy.
        timeouts: ``inside`` is filled in from the state.
        log_format: text | json, of the proxy.
    """

    state_dir: Path
    listen: tuple[str, ...] = ()
    timeouts: Settings = Settings()
    log_format: str = "text"


class UserspaceDataplane:
    """Serves by a proxy process; see ``proxy``."""

    def __init__(self, options: UserspaceOptions) -> None:
        self._options = options
        self._rules: rules.Rules | None = None
        self._proxy: client.Proxy | None = None
        self._settings: Settings | None = None
        self._services: dict[str, ServicePort] = {}
        self._listeners: dict[str, Listener] = {}
        self._ports: dict[str, int] = {}
        self._flows: conntrack.View | None = None
        self._looked_s = time.monotonic()
        self.problems: list[str] = []

    def start(self) -> None:
        """Find how VIPs can lead here, and find or start the proxy.

        Raises:
            UnsupportedError: rules are not possible, and there is no address to listen on.
            DataplaneError: the proxy can't be started.
        """
        if not self._options.listen:
            self._rules, reason = rules.find()
            if self._rules is None:
                raise UnsupportedError(features.no_rules(reason))
            log.info("%s leads VIPs to the proxy", self._rules.tool)
        self._running()

    def close(self) -> None:
        """Let go of the proxy; it goes on, and the rules stay."""
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work.

        Ports are opened first, then the rules lead to them, then ports that nothing leads to are closed.

        Raises:
            DataplaneError: only a part is done; call again.
        """
        try:
            self._sync(state)
        except DataplaneError:
            self.close()  # ask it at the next try what it has
            raise

    def tick(self) -> None:
        """Look whether the proxy lives and the rules are there.

        Raises:
            DataplaneError: not so; a sync mends it.
        """
        if self._proxy is not None and not self._proxy.is_alive():
            self.close()
            raise DataplaneError(
                "the userspace proxy ended, and its connections with it; it is started again"
            )
        now = time.monotonic()
        if self._rules is not None and now - self._looked_s >= CANARY_S:
            self._looked_s = now
            if not self._rules.is_there():
                self._rules = type(self._rules)()  # write the whole
                raise DataplaneError(
                    f"somebody removed the rules that lead VIPs to the proxy ({self._rules.tool}); "
                    "they are written again"
                )

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return features.unsupported(state, is_listening=bool(self._options.listen))

    # -- inside ----------------------------------------------------------------------------------

    def _running(self) -> client.Proxy:
        """Return the proxy; a new one, or one that was there before us, tells what it has."""
        if self._proxy is None:
            self._proxy = client.Proxy(self._options.state_dir, self._options.log_format)
            hello = self._proxy.hello
            self._settings = hello.settings
            self._services, self._listeners = dict(hello.services), dict(hello.listeners)
            self._ports = dict(hello.ports)
        return self._proxy

    def _sync(self, state: DesiredState) -> None:
        proxy = self._running()
        want = render(state, self._options.timeouts, self._options.listen)
        services, listeners = diff(self._services, want.services), diff(self._listeners, want.listeners)
        settings = want.settings if want.settings != self._settings else None
        problems = list(want.problems)
        if settings or services.upsert or listeners.upsert:
            done = proxy.update(Update(settings, services.upsert, listeners.upsert))
            self._settings = want.settings
            self._services |= services.upsert
            self._listeners |= {key: value for key, value in listeners.upsert.items() if key in done.ports}
            self._ports |= done.ports
            problems += done.problems.values()
        if self._rules is not None:
            self._rules.apply(want.redirects, self._ports)
            problems += self._end_flows(want.redirects, state.addresses.local)
        if services.delete or listeners.delete:
            proxy.update(Update(gone_services=services.delete, gone_listeners=listeners.delete))
            for name in services.delete:
                del self._services[name]
            for key in listeners.delete:
                del self._listeners[key]
                self._ports.pop(key, None)
        self.problems = problems

    def _end_flows(self, redirects: Redirects, local: frozenset[str]) -> list[str]:
        """End UDP flows that conntrack still leads where they went before; return what went wrong."""
        now = _flows(redirects, self._ports)
        before, self._flows = self._flows, now
        if before is None or before == now:
            return []
        try:
            for family in (4, 6):
                found = conntrack.flows(family, conntrack.UDP)
                conntrack.delete(conntrack.stale(found, before, now, local), family, "stale UDP flows")
        except EbpfproxyError as error:
            self._flows = before
            return [f"UDP clients may go on to where they went before: {error}"]
        return []


def _flows(redirects: Redirects, ports: Mapping[str, int]) -> conntrack.View:
    """Return which listener serves each UDP door."""
    found: conntrack.View = {}
    for door, listener in redirects.to.items():
        if door.protocol == "UDP" and listener in ports:
            key = Endpoint(door.address, door.port)
            served_by = Endpoint(redirects.target[door.family], ports[listener])
            found[key] = found.get(key, frozenset()) | {served_by}
    return found
