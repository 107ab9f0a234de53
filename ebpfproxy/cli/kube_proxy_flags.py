"""kube-proxy's own flags of ``ebpfproxy run``: each sets the field of the configuration file it stands for.

So a flag means what the field means, and one without effect here is named like a field without effect.

Source: kube-proxy's command line reference, as of Kubernetes 1.35, and flags that older releases had.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


def boolean(text: str) -> bool:
    """Return what Go's strconv.ParseBool reads in ``text``.

    Raises:
        ArgumentTypeError: it reads nothing.
    """
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def strings(text: str) -> list[str]:
    """Return the parts of ``a,b``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def switches(text: str) -> dict[str, bool]:
    """Return feature gates from ``A=true,B=false``.

    Raises:
        ArgumentTypeError: one has no value.
    """
    found = {}
    for part in strings(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r}: expected NAME=true or NAME=false")
        found[name.strip()] = boolean(value.strip())
    return found


class Flag(NamedTuple):
    """One flag."""

    name: str
    field: str  # path in KubeProxyConfiguration
    kind: str  # what its value is

    @property
    def type(self) -> Callable[[str], Any]:
        """What makes a value of the text."""
        return _TYPES.get(self.kind, str)


_TYPES: dict[str, Callable[[str], Any]] = {
    "A=BOOL,...": switches,
    "BOOL": boolean,
    "CIDR,...": strings,
    "FILE=N,...": strings,
    "N": int,
    "NUMBER": float,
}

_TABLE = """
bind-address                       bindAddress                          IP
bind-address-hard-fail             bindAddressHardFail                  BOOL
cluster-cidr                       clusterCIDR                          CIDR
config-sync-period                 configSyncPeriod                     DURATION
conntrack-max-per-core             conntrack.maxPerCore                 N
conntrack-min                      conntrack.min                        N
conntrack-tcp-be-liberal           conntrack.tcpBeLiberal               BOOL
conntrack-tcp-timeout-close-wait   conntrack.tcpCloseWaitTimeout        DURATION
conntrack-tcp-timeout-established  conntrack.tcpEstablishedTimeout      DURATION
conntrack-udp-timeout              conntrack.udpTimeout                 DURATION
conntrack-udp-timeout-stream       conntrack.udpStreamTimeout           DURATION
detect-local-mode                  detectLocalMode                      MODE
feature-gates                      featureGates                         A=BOOL,...
iptables-localhost-nodeports       iptables.localhostNodePorts          BOOL
iptables-masquerade-bit            iptables.masqueradeBit               N
iptables-min-sync-period           iptables.minSyncPeriod               DURATION
iptables-sync-period               iptables.syncPeriod                  DURATION
ipvs-exclude-cidrs                 ipvs.excludeCIDRs                    CIDR,...
ipvs-min-sync-period               ipvs.minSyncPeriod                   DURATION
ipvs-scheduler                     ipvs.scheduler                       NAME
ipvs-strict-arp                    ipvs.strictARP                       BOOL
ipvs-sync-period                   ipvs.syncPeriod                      DURATION
ipvs-tcp-timeout                   ipvs.tcpTimeout                      DURATION
ipvs-tcpfin-timeout                ipvs.tcpFinTimeout                   DURATION
ipvs-udp-timeout                   ipvs.udpTimeout                      DURATION
kube-api-burst                     clientConnection.burst               N
kube-api-content-type              clientConnection.contentType         TEXT
kube-api-qps                       clientConnection.qps                 NUMBER
log-flush-frequency                logging.flushFrequency               DURATION
log-json-info-buffer-size          logging.options.json.infoBufferSize  TEXT
log-json-split-stream              logging.options.json.splitStream     BOOL
log-text-info-buffer-size          logging.options.text.infoBufferSize  TEXT
log-text-split-stream              logging.options.text.splitStream     BOOL
logging-format                     logging.format                       text|json
masquerade-all                     iptables.masqueradeAll               BOOL
nodeport-addresses                 nodePortAddresses                    CIDR,...
oom-score-adj                      oomScoreAdj                          N
pod-bridge-interface               detectLocal.bridgeInterface          DEVICE
pod-interface-name-prefix          detectLocal.interfaceNamePrefix      PREFIX
profiling                          enableProfiling                      BOOL
proxy-mode                         mode                                 MODE
proxy-port-range                   portRange                            A-B
show-hidden-metrics-for-version    showHiddenMetricsForVersion          X.Y
udp-timeout                        udpIdleTimeout                       DURATION
v                                  logging.verbosity                    N
vmodule                            logging.vmodule                      FILE=N,...
"""
FLAGS = tuple(Flag(*line.split()) for line in _TABLE.strip().splitlines())

# kube-proxy's flags that ask for another job than running, and what does that here.
OTHER_JOBS = {
    "cleanup": "ebpfproxy cleanup removes what is ours, ebpfproxy cleanup --kube-proxy what kube-proxy left",
    "init-only": "start the agent with the capabilities that docs/deployment.md names",
    "write-config-to": "docs/configuration.md lists every field and its default",
}


class _SetField(argparse.Action):
    """Notes the value under the path of its field; what is a mapping is added to."""

    def __init__(self, *arguments: Any, field: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.field = field

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = namespace.fields.get(self.field)
        value = {**before, **values} if isinstance(before, dict) else values
        namespace.fields = {**namespace.fields, self.field: value}
        if self.field == "iptables.masqueradeAll":  # one flag for a field that two modes have
            namespace.fields["nftables.masqueradeAll"] = value


class _OldPort(argparse.Action):
    """``--healthz-port`` and ``--metrics-port``: the port alone, 0 = off (removed from kube-proxy since)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, f"{self.const}:{values}" if values else "")


class _OtherJob(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: {OTHER_JOBS[str(self.const)]}")


def add(parser: argparse.ArgumentParser) -> None:
    """Add kube-proxy's flags to ``parser``; their values are in ``arguments.fields`` by field."""
    parser.set_defaults(fields={})
    group = parser.add_argument_group(
        "kube-proxy's flags", "each sets a field of the configuration file, over what the file says"
    )
    for flag in FLAGS:
        names = ["-v", "--v"] if flag.name == "v" else [f"--{flag.name}"]
        group.add_argument(
            *names,
            action=_SetField,
            field=flag.field,
            dest=argparse.SUPPRESS,
            type=flag.type,
            nargs="?" if flag.type is boolean else None,
            const=True if flag.type is boolean else None,
            metavar=flag.kind,
            help=f"field {flag.field}",
        )
    for name, host, dest in (
        ("healthz-port", "0.0.0.0", "healthz_bind_address"),  # noqa: S104 - as kube-proxy does
        ("metrics-port", "127.0.0.1", "metrics_bind_address"),
    ):
        group.add_argument(
            f"--{name}",
            action=_OldPort,
            const=host,
            dest=dest,
            type=int,
            metavar="N",
            help=f"old form of --{dest.replace('_', '-')}; 0 = nowhere",
        )
    for name, instead in OTHER_JOBS.items():
        group.add_argument(
            f"--{name}",
            action=_OtherJob,
            const=name,
            dest=argparse.SUPPRESS,
            nargs="?",
            metavar="",
            help=f"not a flag here: {instead}",
        )
