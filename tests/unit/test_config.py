"""The configuration file: kube-proxy's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpfproxy import config
from ebpfproxy.conntrack import settings_of
from ebpfproxy.errors import ConfigError
from ebpfproxy.model.services import Forwarding, Scheduler

HEAD = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}

# config.conf as kubeadm writes it into the ConfigMap kube-proxy.
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""


def parse(**fields: Any) -> config.Config:
    return config.parse(HEAD | fields)


def test_kubeadm_file_works_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text(KUBEADM)
    loaded = config.load(path)
    assert loaded.cluster_cidrs == ("10.244.0.0/16",)
    assert loaded.kubeconfig == Path("/var/lib/kube-proxy/kubeconfig.conf")
    assert loaded.unused == ()
    assert (loaded.mode, loaded.max_sync_s, loaded.scheduler) == ("auto", 30.0, Scheduler.RANDOM)


def test_a_file_with_nothing_set_is_the_default() -> None:
    assert parse() == config.Config()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [  # the examples of Go's time.ParseDuration documentation and tests
        ("0", 0),
        ("5s", 5),
        ("30s", 30),
        ("1478s", 1478),
        ("-5s", -5),
        ("+5s", 5),
        ("-0", 0),
        ("5.0s", 5),
        ("5.6s", 5.6),
        ("5.s", 5),
        (".5s", 0.5),
        ("100.00100s", 100.001),
        ("10ns", 1e-8),
        ("11us", 1.1e-5),
        ("12µs", 1.2e-5),
        ("12μs", 1.2e-5),
        ("13ms", 0.013),
        ("15m", 900),
        ("16h", 57600),
        ("3h30m", 12600),
        ("10.5s4m", 250.5),
        ("-2m3.4s", -123.4),
        ("1h2m3s4ms5us6ns", 3723.004005006),
        ("39h9m14.425s", 140954.425),
    ],
)
def test_duration(text: str, seconds: float) -> None:
    assert config.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "3 s", "s3", "1h-2m", "٣s"]
)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        config.parse_duration(text)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "bpf"}, {"mode": "bpf"}),
        ({"mode": "iptables"}, {"mode": "iptables"}),
        ({"hostnameOverride": " Node-A "}, {"hostname_override": "node-a"}),
        ({"clusterCIDR": "10.244.1.7/16,fd00:0::/48"}, {"cluster_cidrs": ("10.244.0.0/16", "fd00::/48")}),
        (
            {"nodePortAddresses": ["primary", "192.0.2.7/24"]},
            {"node_port_addresses": ("primary", "192.0.2.0/24")},
        ),
        ({"nodePortAddresses": ["localhost"]}, {"node_port_addresses": ("127.0.0.0/8", "::1/128")}),
        ({"nodePortAddresses": ["all"]}, {"node_port_addresses": ("0.0.0.0/0", "::/0")}),
        ({"detectLocalMode": "NodeCIDR"}, {"detect_local_mode": "NodeCIDR"}),
        (
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "br0"}},
            {"detect_local_mode": "BridgeInterface", "local_devices": ("br0",)},
        ),
        (
            {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "cali"}},
            {"detect_local_mode": "InterfaceNamePrefix", "local_devices": ("cali*",)},
        ),
        ({"bindAddress": "192.0.2.1"}, {"bind_address": "192.0.2.1"}),
        ({"oomScoreAdj": -997}, {"oom_score_adj": -997}),
        ({"featureGates": {"ServiceTrafficDistribution": True}}, {}),
        ({"ipvs": {"scheduler": "wrr"}}, {"scheduler": Scheduler.WRR, "is_scheduler_named": True}),
        ({"ipvs": {"scheduler": "mh"}}, {"scheduler": Scheduler.MAGLEV, "is_scheduler_named": True}),
        (
            {"iptables": {"minSyncPeriod": "500ms", "syncPeriod": "1m"}},
            {"min_sync_s": 0.5, "max_sync_s": 60},
        ),
        (
            {"conntrack": {"tcpEstablishedTimeout": "24h", "udpTimeout": "30s"}},
            {"tcp_established_s": 86400, "udp_s": 30},
        ),
        ({"logging": {"format": "json", "verbosity": 4}}, {"log_format": "json", "log_debug": True}),
        ({"ebpfproxy": {"deviceAttachment": "clsact"}}, {"device_attachment": "clsact"}),
        ({"ebpfproxy": {"loader": "bcc", "devices": ["eth*"]}}, {"loader": "bcc", "devices": ("eth*",)}),
        ({"ebpfproxy": {"mapSizes": {"slots": 1024}}}, {"map_sizes": {"slots": 1024}}),
        ({"ebpfproxy": {"maglevTableSize": 251}}, {"maglev_size": 251}),
        ({"ebpfproxy": {"forwarding": "hybrid"}}, {"forwarding": Forwarding.HYBRID}),
        (
            {"ebpfproxy": {"serviceClusterIPRange": "10.0.0.0/24,fd01::/112"}},
            {"service_cluster_ip_ranges": ("10.0.0.0/24", "fd01::/112")},
        ),
        ({"ebpfproxy": {"serviceNodePortRange": "80-90"}}, {"service_node_port_range": (80, 90)}),
        ({"ebpfproxy": {"udpIdle": "90s"}}, {"udp_idle_s": 90}),
        ({"clusterCIDR": None, "conntrack": {"min": None}}, {}),
    ],
)
def test_fields_that_count(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    loaded = parse(**fields)
    default = config.Config()
    assert loaded.unused == ()
    assert {name: getattr(loaded, name) for name in expected} == expected
    others = [name for name in loaded.__struct_fields__ if name not in expected]
    assert [getattr(loaded, name) for name in others] == [getattr(default, name) for name in others]


def test_each_mode_has_its_own_sync_periods() -> None:
    periods = {"minSyncPeriod": "2s", "syncPeriod": "40s"}
    assert parse(mode="ipvs", ipvs=periods).min_sync_s == 2
    assert parse(mode="nftables", nftables=periods).max_sync_s == 40
    assert parse(mode="iptables", ipvs=periods).min_sync_s == 0


@pytest.mark.parametrize(
    ("fields", "healthz", "metrics"),
    [  # an empty address is the default, as in kube-proxy's SetDefaults_KubeProxyConfiguration
        ({}, ("", 10256), ("127.0.0.1", 10249)),
        ({"healthzBindAddress": "", "metricsBindAddress": ""}, ("", 10256), ("127.0.0.1", 10249)),
        ({"bindAddress": "::"}, ("", 10256), ("::1", 10249)),
        (
            {"healthzBindAddress": "192.0.2.1", "metricsBindAddress": "::1"},
            ("192.0.2.1", 10256),
            ("::1", 10249),
        ),
        (
            {"healthzBindAddress": "192.0.2.1:1", "metricsBindAddress": "[::1]:2"},
            ("192.0.2.1", 1),
            ("::1", 2),
        ),
        ({"healthzBindAddress": "[::]:1", "metricsBindAddress": "0.0.0.0:2"}, ("", 1), ("", 2)),
    ],
)
def test_bind_addresses(fields: dict[str, Any], healthz: tuple[str, int], metrics: tuple[str, int]) -> None:
    loaded = parse(**fields)
    assert (loaded.healthz_bind, loaded.metrics_bind) == (healthz, metrics)


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        (
            {"ipvs": {"scheduler": "lblc"}},
            ("ipvs.scheduler: lblc (in modes other than ipvs random is used)",),
        ),
        ({"iptables": {"masqueradeBit": 15}}, ("iptables.masqueradeBit",)),
        (
            {"featureGates": {"SomeGate": True, "Other": False}},
            ("featureGates.Other", "featureGates.SomeGate"),
        ),
        (
            {"featureGates": {"TopologyAwareHints": True, "NFTablesProxyMode": False}},
            ("featureGates.NFTablesProxyMode: false (it is always on here)",),
        ),
        ({"metricsBindAddress": "0.0.0.0:10249", "bindAddress": "::"}, ()),
        ({"metricsBindAddress": "127.0.0.1:10249"}, ()),  # as it is by default
        (
            {"detectLocalMode": "ClusterCIDR", "detectLocal": {"bridgeInterface": "br0"}},
            ("detectLocal.bridgeInterface (detectLocalMode is not BridgeInterface)",),
        ),
        (
            {"configSyncPeriod": "1h", "winkernel": {"enableDSR": True}},
            ("winkernel.enableDSR", "configSyncPeriod"),
        ),
        ({"logging": {"options": {"json": {"splitStream": True}}}}, ("logging.options",)),
    ],
)
def test_fields_without_effect_are_named(fields: dict[str, Any], unused: tuple[str, ...]) -> None:
    assert parse(**fields).unused == unused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "Service"}, "kind: expected KubeProxyConfiguration"),
        ({"apiVersion": "v1"}, "apiVersion: expected kubeproxy.config.k8s.io/v1alpha1"),
        ({"clusterCidr": "10.0.0.0/8"}, "unknown field `clusterCidr`"),
        ({"ipvs": {"schedular": "rr"}}, "unknown field `schedular` - at `ipvs`"),
        ({"ebpfproxy": {"nope": 1}}, "unknown field `nope` - at `ebpfproxy`"),
        ({"iptables": {"masqueradeBit": "many"}}, "Expected `int`, got `str` - at `iptables.masqueradeBit`"),
        (
            {"conntrack": {"udpTimeout": 30}},
            "expected a duration such as 30s, got 30 - at `conntrack.udpTimeout`",
        ),
        ({"conntrack": {"udpTimeout": "30"}}, "'30' is not a duration.* at `conntrack.udpTimeout`"),
        ({"conntrack": {"udpTimeout": "-1s"}}, "conntrack.udpTimeout: must be at least 0"),
        ({"clusterCIDR": "10.244.0.0"}, "clusterCIDR: '10.244.0.0' is not a CIDR"),
        ({"clusterCIDR": "10.0.0.0/8,11.0.0.0/8"}, "clusterCIDR: .* one IPv4 and one IPv6"),
        ({"clusterCIDR": "10.0.0.0/33"}, "clusterCIDR"),
        ({"nodePortAddresses": ["127.0.0.1"]}, r"nodePortAddresses\[0\]: '127.0.0.1' is not a CIDR"),
        ({"nodePortAddresses": "127.0.0.1/8"}, "Expected `array`, got `str` - at `nodePortAddresses`"),
        (
            {"mode": "kernelspace"},
            "mode: 'kernelspace' is none of auto, bpf, nftables, ipvs, iptables, userspace",
        ),
        ({"ipvs": {"scheduler": "best"}}, "ipvs.scheduler: 'best' is none of"),
        ({"detectLocalMode": "clustercidr"}, "detectLocalMode: 'clustercidr' is none of"),
        ({"detectLocalMode": "BridgeInterface"}, "detectLocal.bridgeInterface: detectLocalMode .* needs it"),
        ({"bindAddress": "eth0"}, "bindAddress: 'eth0' is not an IP address"),
        ({"oomScoreAdj": 1001}, "oomScoreAdj: 1001"),
        ({"iptables": {"syncPeriod": "1s", "minSyncPeriod": "2s"}}, "iptables.minSyncPeriod: .*longer"),
        ({"iptables": {"syncPeriod": "-1s"}}, "iptables.syncPeriod: must be greater than 0"),
        ({"healthzBindAddress": ":10256"}, "healthzBindAddress: ':10256' is not an address and port"),
        ({"healthzBindAddress": "localhost:1"}, "healthzBindAddress: 'localhost:1' is not an address"),
        ({"metricsBindAddress": "[::1]:65536"}, "metricsBindAddress: .* 65536 is no port"),
        ({"logging": {"format": "xml"}}, "logging.format: 'xml'"),
        ({"ebpfproxy": {"loader": "ld"}}, "ebpfproxy.loader: 'ld'"),
        ({"ebpfproxy": {"deviceAttachment": "xdp"}}, "ebpfproxy.deviceAttachment: 'xdp'"),
        ({"ebpfproxy": {"mapSizes": {"slots": 0}}}, "ebpfproxy.mapSizes.slots: 0"),
        ({"ebpfproxy": {"forwarding": "DSR"}}, "ebpfproxy.forwarding: 'DSR' is none of snat, dsr, hybrid"),
        ({"ebpfproxy": {"maglevTableSize": 256}}, "ebpfproxy.maglevTableSize: 256 is none of 251, 509, "),
        ({"ebpfproxy": {"serviceNodePortRange": "9-8"}}, "ebpfproxy.serviceNodePortRange: '9-8'"),
    ],
)
def test_wrong_fields_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 2.*is not YAML: "),
        ("- a\n", "expected a mapping with kind: KubeProxyConfiguration"),
        ("", "expected one document, got 0"),
        ("a: 1\n---\nb: 2\n", "expected one document, got 2"),
    ],
)
def test_wrong_files_are_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){path}.*{message}"):
        config.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"read configuration .*No such file"):
        config.load(tmp_path / "none.yaml")


def test_flags_are_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text(KUBEADM)
    flags = {"ipvs.scheduler": "wrr", "clusterCIDR": "10.1.0.0/16", "featureGates": {"A": True}}
    loaded = config.load(path, flags)
    assert (loaded.scheduler, loaded.cluster_cidrs) == (Scheduler.WRR, ("10.1.0.0/16",))
    assert loaded.unused == ("featureGates.A",)
    without = config.load(None, flags)
    assert (without.scheduler, without.unused) == (Scheduler.WRR, ("featureGates.A",))


def test_feature_gates_of_file_and_flags_are_merged() -> None:
    laid = config.overlay({"featureGates": {"A": True, "B": True}}, {"featureGates": {"B": False}})
    assert laid == {"featureGates": {"A": True, "B": False}}


@pytest.mark.parametrize(
    ("section", "cores", "expected"),
    [  # kube-proxy's getConntrackMax
        ({}, 8, 0),
        ({"maxPerCore": None, "min": None}, 8, 0),
        ({"maxPerCore": 1000}, 4, 131072),
        ({"maxPerCore": 1000, "min": 10}, 4, 4000),
        ({"maxPerCore": 1000, "min": 5000}, 4, 5000),
        ({"maxPerCore": 0, "min": 5000}, 4, 0),
        ({"min": 5000}, 8, 262144),
    ],
)
def test_conntrack_max(
    section: dict[str, Any], cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    loaded = parse(conntrack=section)
    assert (loaded.conntrack_max, loaded.unused) == (expected, ())
    found = settings_of(loaded)
    assert found == ({"net/netfilter/nf_conntrack_max": str(expected)} if expected else {})


def test_negative_limits_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"conntrack\.min: must be at least 0"):
        parse(conntrack={"min": -1})
