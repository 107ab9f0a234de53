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
    type: Callable[[str], Any] = str
    metavar: str = "TEXT"


FLAGS = (
    Flag("bind-address", "bindAddress", metavar="IP"),
    Flag("bind-address-hard-fail", "bindAddressHardFail", boolean),
    Flag("cluster-cidr", "clusterCIDR", metavar="CIDR"),
    Flag("config-sync-period", "configSyncPeriod", metavar="DURATION"),
    Flag("conntrack-max-per-core", "conntrack.maxPerCore", int, "N"),
    Flag("conntrack-min", "conntrack.min", int, "N"),
    Flag("conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal", boolean),
    Flag("conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout", metavar="DURATION"),
    Flag("conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout", metavar="DURATION"),
    Flag("conntrack-udp-timeout", "conntrack.udpTimeout", metavar="DURATION"),
    Flag("conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout", metavar="DURATION"),
    Flag("detect-local-mode", "detectLocalMode", metavar="MODE"),
    Flag("feature-gates", "featureGates", switches, "A=BOOL,..."),
    Flag("iptables-localhost-nodeports", "iptables.localhostNodePorts", boolean),
    Flag("iptables-masquerade-bit", "iptables.masqueradeBit", int, "N"),
    Flag("iptables-min-sync-period", "iptables.minSyncPeriod", metavar="DURATION"),
    Flag("iptables-sync-period", "iptables.syncPeriod", metavar="DURATION"),
    Flag("ipvs-exclude-cidrs", "ipvs.excludeCIDRs", strings, "CIDR,..."),
    Flag("ipvs-min-sync-period", "ipvs.minSyncPeriod", metavar="DURATION"),
    Flag("ipvs-scheduler", "ipvs.scheduler", metavar="NAME"),
    Flag("ipvs-strict-arp", "ipvs.strictARP", boolean),
    Flag("ipvs-sync-period", "ipvs.syncPeriod", metavar="DURATION"),
    Flag("ipvs-tcp-timeout", "ipvs.tcpTimeout", metavar="DURATION"),
    Flag("ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout", metavar="DURATION"),
    Flag("ipvs-udp-timeout", "ipvs.udpTimeout", metavar="DURATION"),
    Flag("kube-api-burst", "clientConnection.burst", int, "N"),
    Flag("kube-api-content-type", "clientConnection.contentType"),
    Flag("kube-api-qps", "clientConnection.qps", float, "N"),
    Flag("log-flush-frequency", "logging.flushFrequency", metavar="DURATION"),
    Flag("log-json-info-buffer-size", "logging.options.json.infoBufferSize"),
    Flag("log-json-split-stream", "logging.options.json.splitStream", boolean),
    Flag("log-text-info-buffer-size", "logging.options.text.infoBufferSize"),
    Flag("log-text-split-stream", "logging.options.text.splitStream", boolean),
    Flag("logging-format", "logging.format", metavar="text|json"),
    Flag("masquerade-all", "iptables.masqueradeAll", boolean),
    Flag("nodeport-addresses", "nodePortAddresses", strings, "CIDR,..."),
    Flag("oom-score-adj", "oomScoreAdj", int, "N"),
    Flag("pod-bridge-interface", "detectLocal.bridgeInterface", metavar="DEVICE"),
    Flag("pod-interface-name-prefix", "detectLocal.interfaceNamePrefix", metavar="PREFIX"),
    Flag("profiling", "enableProfiling", boolean),
    Flag("proxy-mode", "mode", metavar="MODE"),
    Flag("proxy-port-range", "portRange", metavar="A-B"),
    Flag("show-hidden-metrics-for-version", "showHiddenMetricsForVersion", metavar="X.Y"),
    Flag("udp-timeout", "udpIdleTimeout", metavar="DURATION"),
    Flag("v", "logging.verbosity", int, "N"),
    Flag("vmodule", "logging.vmodule", strings, "FILE=N,..."),
)

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
            metavar="BOOL" if flag.type is boolean else flag.metavar,
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
