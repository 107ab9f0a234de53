"""kube-proxy's command line: every flag is taken, refused with the way out, or named as without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ebpfproxy import config
from ebpfproxy.cli import kube_proxy_flags, parser
from ebpfproxy.cli.run import options
from ebpfproxy.errors import ConfigError

if TYPE_CHECKING:
    from ebpfproxy.config import Config

# Kubernetes' reference page of kube-proxy, 1.35 (Linux), and flags that earlier releases removed.
PUBLISHED = """
    bind-address bind-address-hard-fail cleanup cluster-cidr config config-sync-period
    conntrack-max-per-core conntrack-min conntrack-tcp-be-liberal conntrack-tcp-timeout-close-wait
    conntrack-tcp-timeout-established conntrack-udp-timeout conntrack-udp-timeout-stream
    detect-local-mode feature-gates healthz-bind-address healthz-port hostname-override init-only
    iptables-localhost-nodeports iptables-masquerade-bit iptables-min-sync-period iptables-sync-period
    ipvs-exclude-cidrs ipvs-min-sync-period ipvs-scheduler ipvs-strict-arp ipvs-sync-period
    ipvs-tcp-timeout ipvs-tcpfin-timeout ipvs-udp-timeout kube-api-burst kube-api-content-type
    kube-api-qps log-flush-frequency log-json-info-buffer-size log-json-split-stream
    log-text-info-buffer-size log-text-split-stream logging-format masquerade-all metrics-bind-address
    metrics-port nodeport-addresses oom-score-adj pod-bridge-interface pod-interface-name-prefix
    profiling proxy-mode proxy-port-range show-hidden-metrics-for-version udp-timeout v vmodule
    write-config-to
"""


def flags_of_run() -> set[str]:
    run = next(
        action.choices["run"]
        for action in parser.build()._actions
        if isinstance(action.choices, dict) and "run" in action.choices
    )
    return {name.lstrip("-") for action in run._actions for name in action.option_strings}


def loaded(line: str) -> Config:
    """Return the configuration that a command line without a file gives."""
    given = options(parser.build().parse_args(["run", "--manifests", "/m", *line.split()]))
    return given.apply(config.load(None, given.fields))


def test_every_published_flag_is_known() -> None:
    assert not set(PUBLISHED.split()) - flags_of_run()


def test_every_flag_sets_a_field_that_exists() -> None:
    """A wrong path would be an unknown field."""
    values = {kube_proxy_flags.boolean: True, kube_proxy_flags.switches: {"A": True}, int: 14, float: 5.0}
    texts = {"DURATION": "30s", "MODE": "ClusterCIDR", "NAME": "rr", "IP": "::1", "text|json": "json"}
    for flag in kube_proxy_flags.FLAGS:
        value: Any = values.get(flag.type, texts.get(flag.kind, ""))
        if flag.type is kube_proxy_flags.strings:
            value = ["10.0.0.0/8"]
        config.load(None, {flag.field: "auto" if flag.field == "mode" else value})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--cluster-cidr 10.244.0.0/16,fd00::/48", {"cluster_cidrs": ("10.244.0.0/16", "fd00::/48")}),
        ("--nodeport-addresses=192.0.2.0/24,10.0.0.0/8",
         {"node_port_addresses": ("192.0.2.0/24", "10.0.0.0/8")}),
        ("--nodeport-addresses primary", {"node_port_addresses": ("primary",)}),
        ("--hostname-override Node-A", {"hostname_override": "Node-A"}),
        ("--masquerade-all", {"masquerade_all": True}),
        ("--masquerade-all=false", {"masquerade_all": False}),
        ("--proxy-mode nftables --masquerade-all", {"masquerade_all": True}),
        ("--bind-address-hard-fail=true", {"must_bind": True}),
        ("--iptables-sync-period 1m --iptables-min-sync-period 2s", {"max_sync_s": 60.0, "min_sync_s": 2.0}),
        ("--conntrack-udp-timeout 45s --conntrack-udp-timeout-stream 3m",
         {"udp_s": 45.0, "udp_stream_s": 180.0}),
        ("--conntrack-tcp-timeout-established 24h", {"tcp_established_s": 86400.0}),
        ("--detect-local-mode BridgeInterface --pod-bridge-interface br0", {"local_devices": ("br0",)}),
        ("--logging-format json -v 5", {"log_format": "json", "log_debug": True}),
        ("--v=2", {"log_debug": False}),
        ("--healthz-port 1000 --metrics-port 1001",
         {"healthz_bind": ("", 1000), "metrics_bind": ("127.0.0.1", 1001)}),
        ("--healthz-port 0 --metrics-port 0", {"healthz_bind": None, "metrics_bind": None}),
        ("--oom-score-adj=-998", {"oom_score_adj": -998}),
    ],
)  # fmt: skip
def test_flags_that_count(line: str, expected: dict[str, Any]) -> None:
    found = loaded(line)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("--feature-gates A=true,TopologyAwareHints=true --feature-gates B=false",
         ("featureGates.A", "featureGates.B")),
        ("--profiling --kube-api-qps 50", ("clientConnection.qps", "enableProfiling")),
        ("--vmodule a=5 --log-text-split-stream", ("logging.vmodule", "logging.options")),
        ("--config-sync-period 1h", ("configSyncPeriod",)),
    ],
)  # fmt: skip
def test_flags_without_effect_are_named_by_their_field(line: str, unused: tuple[str, ...]) -> None:
    assert set(unused) <= set(loaded(line).unused)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--cleanup", "ebpfproxy cleanup --kube-proxy"),
        ("--cleanup=true", "ebpfproxy cleanup --kube-proxy"),
        ("--init-only", "docs/deployment.md"),
        ("--write-config-to /x", "docs/configuration.md"),
        ("--masquerade-all=maybe", "neither true nor false"),
        ("--feature-gates A", "NAME=true or NAME=false"),
    ],
)
def test_what_is_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        loaded(line)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_value_is_named_by_its_field() -> None:
    with pytest.raises(ConfigError, match=r"conntrack\.udpTimeout"):
        loaded("--conntrack-udp-timeout 30")
