"""The configuration file: kube-proxy's own KubeProxyConfiguration v1alpha1, and our key ``ebpfproxy`` in it.

A file is read in two steps: ``_File`` is the whole upstream schema with its defaults, so that a wrong name or
type is an error; ``Config`` is what the agent uses. What is set but not used is named in ``Config.unused``.

Source: k8s.io/kube-proxy/config/v1alpha1 and k8s.io/component-base/logs/api/v1, as of Kubernetes 1.35; fields
that older releases had (udpIdleTimeout, resourceContainer) are known too.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ebpfproxy.errors import ConfigError
from ebpfproxy.feature_gates import without_effect
from ebpfproxy.model import annotation
from ebpfproxy.model.services import MAGLEV_SIZE, MAGLEV_SIZES, Forwarding, OutlierEjection, Scheduler

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

#: Two more backends: with a tenth of all dead, one opening in a thousand is not served.
SYN_RETRIES = 2
HEALTHZ_PORT, METRICS_PORT = 10256, 10249

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")


class Duration(float):
    """A metav1.Duration, in seconds."""


def parse_duration(text: str) -> Duration:
    """Return what Go's time.ParseDuration reads in ``text`` ("300ms", "1h2m3s", "0").

    Raises:
        ValueError: it is no such text.
    """
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if digits == "0":
        return Duration(0)
    seconds, end = 0.0, 0
    for part in _DURATION_PART.finditer(digits):
        if part.start() != end:
            break
        seconds += float(part[1]) * _UNIT_S[part[2]]
        end = part.end()
    if not digits or end != len(digits):
        raise ValueError(f"{text!r} is not a duration such as 30s, 500ms or 1h30m")
    return Duration(sign * seconds)


class _Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of the parts of the file."""


class _ClientConnection(_Schema, frozen=True):
    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5
    burst: int = 10


class _Logging(_Schema, frozen=True):
    format: str = "text"
    flush_frequency: Any = "5s"  # a duration, or nanoseconds
    verbosity: int = 0
    vmodule: list[Any] = []
    options: dict[str, Any] = {}
    sanitization: bool = False


class _Iptables(_Schema, frozen=True):
    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    snat_node_internal_ip: bool = msgspec.field(default=False, name="snatNodeInternalIP")
    sync_period: Duration = Duration(30)
    min_sync_period: Duration = Duration(0)


class _Ipvs(_Schema, frozen=True):
    sync_period: Duration = Duration(30)
    min_sync_period: Duration = Duration(0)
    scheduler: str = ""
    exclude_cidrs: list[str] = msgspec.field(default_factory=list, name="excludeCIDRs")
    strict_arp: bool = msgspec.field(default=False, name="strictARP")
    tcp_timeout: Duration = Duration(0)
    tcp_fin_timeout: Duration = Duration(0)
    udp_timeout: Duration = Duration(0)


class _Nftables(_Schema, frozen=True):
    masquerade_bit: int = 14
    masquerade_all: bool = False
    sync_period: Duration = Duration(30)
    min_sync_period: Duration = Duration(0)


class _Conntrack(_Schema, frozen=True):
    max_per_core: int | None = (
        None  # upstream: 32,768; here the kernel's limit is left alone until it is asked for
    )
    min: int | None = None  # upstream: 131,072
    tcp_established_timeout: Duration = Duration(0)
    tcp_close_wait_timeout: Duration = Duration(0)
    tcp_be_liberal: bool = False
    udp_timeout: Duration = Duration(0)
    udp_stream_timeout: Duration = Duration(0)


class _Winkernel(_Schema, frozen=True):
    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class _DetectLocal(_Schema, frozen=True):
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class _Userspace(_Schema, frozen=True):
    listen_addresses: list[str] = []


class _Extras(_Schema, frozen=True):
    """Key ``ebpfproxy``: what kube-proxy's file has no word for."""

    loader: str = ""
    device_attachment: str = ""
    xdp_mode: str = ""
    xdp_devices: list[str] = []
    snat_ports: str = ""
    syn_retries: int = SYN_RETRIES
    outlier_ejection: str = "off"
    devices: list[str] = []
    map_sizes: dict[str, int] = {}
    service_cluster_ip_range: str = msgspec.field(default="", name="serviceClusterIPRange")
    service_node_port_range: str = ""
    load_balancer_pools: list[str] = []
    udp_idle: Duration = Duration(0)
    iptables_variant: str = ""
    maglev_table_size: int = MAGLEV_SIZE
    userspace: _Userspace = _Userspace()
    forwarding: str = ""


class _File(_Schema, frozen=True):
    api_version: str = API_VERSION
    kind: str = KIND
    feature_gates: dict[str, bool] = {}
    client_connection: _ClientConnection = _ClientConnection()
    logging: _Logging = _Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"  # noqa: S104  # upstream's default
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: _Iptables = _Iptables()
    ipvs: _Ipvs = _Ipvs()
    nftables: _Nftables = _Nftables()
    winkernel: _Winkernel = _Winkernel()
    detect_local_mode: str = ""
    detect_local: _DetectLocal = _DetectLocal()
    cluster_cidr: str = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: list[str] = []
    oom_score_adj: int | None = None  # upstream: -999; here a service manager's setting is left alone
    conntrack: _Conntrack = _Conntrack()
    config_sync_period: Duration = Duration(15 * 60)
    port_range: str = ""
    windows_run_as_service: bool = False
    udp_idle_timeout: Duration = Duration(0)
    resource_container: str = "/kube-proxy"
    ebpfproxy: _Extras = _Extras()


class Config(msgspec.Struct, frozen=True):
    """What the agent uses of a configuration file; the defaults are those of an empty file."""

    mode: str = "auto"  # auto, or one of MODES
    loader: str = "auto"  # auto | libbpf | bcc
    device_attachment: str = "auto"  # auto | tcx | clsact
    xdp_mode: str = "auto"  # auto | native | generic | off
    xdp_devices: tuple[str, ...] = ()  # names or patterns; () = the dataplane's default
    syn_retries: int = SYN_RETRIES  # of Services without affinity and annotation
    outlier_ejection: OutlierEjection | None = None  # of Services without annotation
    snat_ports: tuple[int, int] | None = None  # both inclusive; None = the dataplane's default
    hostname_override: str = ""
    kubeconfig: Path | None = None
    devices: tuple[str, ...] = ()  # names or patterns; () = the dataplane's default
    cluster_cidrs: tuple[str, ...] = ()  # canonical, at most one of each family
    node_port_addresses: tuple[str, ...] = ()  # canonical CIDRs and "primary"; () = all
    detect_local_mode: str = ""  # "" | ClusterCIDR | NodeCIDR | BridgeInterface | InterfaceNamePrefix
    local_devices: tuple[str, ...] = ()  # patterns: what comes through these is this node's pods'
    bind_address: str = ""  # this node's primary address, canonical; "" = found
    oom_score_adj: int | None = None  # None: as it is
    scheduler: Scheduler = Scheduler.RANDOM
    is_scheduler_named: bool = False  # else the mode's usual one counts
    maglev_size: int = MAGLEV_SIZE
    forwarding: Forwarding = Forwarding.SNAT
    masquerade_all: bool = False
    masquerade_bit: int = 14  # of the packet mark; for dataplanes that are made of netfilter rules
    min_sync_s: float = 0.0
    max_sync_s: float = 30.0
    iptables_variant: str = "auto"  # auto | nft | legacy
    localhost_node_ports: bool = True  # of modes iptables and nftables
    ipvs_scheduler: str = ""  # lblc | lblcr | fo | ovf: known to IPVS alone, for Services that name none
    ipvs_exclude_cidrs: tuple[str, ...] = ()  # canonical: virtual servers there are somebody else's
    ipvs_strict_arp: bool = False
    ipvs_tcp_s: float = 0.0  # 0 = as the kernel has it; so are the next two
    ipvs_tcp_fin_s: float = 0.0
    ipvs_udp_s: float = 0.0
    tcp_be_liberal: bool = False  # the kernel's connection tracking checks no TCP windows
    conntrack_max: int = 0  # connections that the kernel's connection tracking remembers; 0 = as it is
    udp_idle_s: float = 0.0  # 0 = the dataplane's default; so are the next four
    udp_s: float = 0.0
    udp_stream_s: float = 0.0
    tcp_established_s: float = 0.0
    tcp_close_wait_s: float = 0.0
    service_cluster_ip_ranges: tuple[str, ...] = ("10.96.0.0/16",)
    service_node_port_range: tuple[int, int] = (30000, 32767)  # both inclusive
    load_balancer_pools: tuple[str, ...] = ()  # prefixes, or first-last; checked where they are used
    map_sizes: dict[str, int] = {}
    listen_addresses: tuple[str, ...] = ()  # of mode userspace, canonical; () = rules lead VIPs to it
    log_format: str = "text"  # text | json
    log_debug: bool = False
    healthz_bind: tuple[str, int] | None = ("", HEALTHZ_PORT)  # host "" = all, of both families; None = off
    metrics_bind: tuple[str, int] | None = ("127.0.0.1", METRICS_PORT)
    must_bind: bool = False  # end when one of these two can't be bound
    unused: tuple[
        str, ...
    ] = ()  # fields that are set and have no effect, with the reason where it is not plain


# What the agent reads. Everything else that is set to something of its own is named in Config.unused.
_USED = frozenset(
    (
        "apiVersion",
        "kind",
        "hostnameOverride",
        "clientConnection.kubeconfig",
        "mode",
        "iptables.masqueradeAll",
        "nftables.masqueradeAll",
        "iptables.localhostNodePorts",
        "iptables.syncPeriod",
        "iptables.minSyncPeriod",
        "ipvs.scheduler",
        "ipvs.excludeCIDRs",
        "ipvs.strictARP",
        "ipvs.tcpTimeout",
        "ipvs.tcpFinTimeout",
        "ipvs.udpTimeout",
        "ipvs.syncPeriod",  # these are read when the mode is theirs, as in kube-proxy
        "ipvs.minSyncPeriod",
        "nftables.syncPeriod",
        "nftables.minSyncPeriod",
        "clusterCIDR",
        "nodePortAddresses",
        "bindAddress",
        "bindAddressHardFail",
        "healthzBindAddress",
        "metricsBindAddress",
        "detectLocalMode",
        "detectLocal.bridgeInterface",  # each of these two with its mode
        "detectLocal.interfaceNamePrefix",
        "featureGates",  # those that do nothing are named one by one
        "oomScoreAdj",
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout",
        "conntrack.udpTimeout",
        "conntrack.udpStreamTimeout",
        "conntrack.maxPerCore",  # these two in modes made of netfilter
        "conntrack.min",
        "conntrack.tcpBeLiberal",  # mode bpf never checks a window
        "logging.format",
        "logging.flushFrequency",  # nothing is buffered here
        "logging.verbosity",
    )
)

#: kube-proxy's modes and ours; ebpfproxy.dataplane.modes says which of them this version has.
MODES = ("bpf", "nftables", "ipvs", "iptables", "userspace")
_UPSTREAM_SCHEDULERS = frozenset(("lblc", "lblcr", "fo", "ovf"))
_EVERY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104
_LOCAL_MODES = frozenset(("", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"))
# klog's convention: 4 is debug level.
_DEBUG_VERBOSITY = 4


def load(path: Path | str | None, flags: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration in the file ``path``.

    Args:
        path: None: there is no file, its fields have their defaults.
        flags: path of a field, as "ipvs.scheduler" -> its value, over what the file says.

    Raises:
        ConfigError: it can't be read, is not YAML, or a field is unknown or wrong; the message names it.
    """
    if path is None:
        return parse(overlay({"apiVersion": API_VERSION, "kind": KIND}, flags or {}))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"read configuration {path}: {error.strerror}") from error
    from ebpfproxy import documents

    try:
        found = documents.read(str(path), data)
    except documents.DocumentError as error:
        raise ConfigError(f"configuration {error}") from error
    try:
        if len(found) != 1:
            raise ConfigError(f"expected one document, got {len(found)}")
        return parse(overlay(found[0], flags or {}))
    except ConfigError as error:
        raise ConfigError(f"configuration {path}: {error}") from error


def in_mode(settings: Config, mode: str) -> Config:
    """Return ``settings`` with another mode."""
    return msgspec.structs.replace(settings, mode=mode)


def overlay(raw: object, flags: Mapping[str, Any]) -> object:
    """Return ``raw`` with fields set by their paths; mappings, as feature gates, are merged."""
    if not isinstance(raw, Mapping):
        return raw  # parse says what is wrong with it
    result = dict(raw)
    for path, value in flags.items():
        head, _, rest = path.partition(".")
        if rest:
            result[head] = overlay(result.get(head) or {}, {rest: value})
        else:
            before = result.get(head)
            is_merged = isinstance(value, Mapping) and isinstance(before, Mapping)
            result[head] = {**before, **value} if is_merged else value  # type: ignore[dict-item]
    return result


def parse(raw: object) -> Config:
    """Return the configuration in ``raw``, a file's one YAML document as plain objects.

    Raises:
        ConfigError: a field is unknown or wrong; the message names its path.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected a mapping with kind: {KIND}")
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if raw.get(field) != expected:
            raise ConfigError(f"{field}: expected {expected}, got {raw.get(field)!r}")
    try:
        file = msgspec.convert(_without_nulls(raw), _File, dec_hook=_decode_duration)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`").replace(" - at `$`", "")) from error
    return _config(file)


def _without_nulls(value: object) -> object:
    """Return ``value`` without keys whose value is null: to Kubernetes' decoder they are not set."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _decode_duration(kind: type, value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"expected a duration such as 30s, got {value!r}")
    return parse_duration(value)


def _config(file: _File) -> Config:
    """Return what the agent uses of ``file``."""
    unused = [*_unused_fields(file, _File())]
    scheduler, scheduler_note = _scheduler(file.ipvs.scheduler)
    section_name, section = _sync_section(file)
    masquerade = file.nftables if file.mode == "nftables" else file.iptables  # ipvs has none of its own
    unused += [scheduler_note] if scheduler_note else []
    unused += without_effect(file.feature_gates)
    local_devices, detect_notes = _local_devices(file)
    unused += detect_notes
    if file.oom_score_adj is not None and not -1000 <= file.oom_score_adj <= 1000:
        raise ConfigError(f"oomScoreAdj: {file.oom_score_adj} is not between -1000 and 1000")
    if file.logging.format not in ("", "text", "json"):
        raise ConfigError(f"logging.format: {file.logging.format!r} is neither text nor json")
    extras = file.ebpfproxy
    if extras.device_attachment not in ("", "auto", "tcx", "clsact"):
        raise ConfigError(
            f"ebpfproxy.deviceAttachment: {extras.device_attachment!r} is none of auto, tcx, clsact"
        )
    if not 0 <= extras.syn_retries <= annotation.MAX_SYN_RETRIES:
        raise ConfigError(
            f"ebpfproxy.synRetries: {extras.syn_retries} is not 0 to {annotation.MAX_SYN_RETRIES}"
        )
    try:
        annotation.parse_outlier_ejection(extras.outlier_ejection)
    except ValueError as error:
        raise ConfigError(f"ebpfproxy.outlierEjection: {error}") from error
    if extras.xdp_mode not in ("", "auto", "native", "generic", "off"):
        raise ConfigError(f"ebpfproxy.xdpMode: {extras.xdp_mode!r} is none of auto, native, generic, off")
    if extras.loader not in ("", "auto", "libbpf", "bcc"):
        raise ConfigError(f"ebpfproxy.loader: {extras.loader!r} is none of auto, libbpf, bcc")
    if extras.iptables_variant not in ("", "auto", "nft", "legacy"):
        raise ConfigError(
            f"ebpfproxy.iptablesVariant: {extras.iptables_variant!r} is none of auto, nft, legacy"
        )
    for name, size in extras.map_sizes.items():
        if not 0 < size < 2**32:
            raise ConfigError(f"ebpfproxy.mapSizes.{name}: {size} is not a number of entries (1 to 2^32 - 1)")
    if extras.forwarding not in ("", *Forwarding):
        raise ConfigError(f"ebpfproxy.forwarding: {extras.forwarding!r} is none of {', '.join(Forwarding)}")
    if extras.maglev_table_size not in MAGLEV_SIZES:
        sizes = ", ".join(map(str, MAGLEV_SIZES))
        raise ConfigError(f"ebpfproxy.maglevTableSize: {extras.maglev_table_size} is none of {sizes}")
    defaults = Config()
    max_sync_s = section.sync_period or defaults.max_sync_s
    _check_periods(section_name, section.min_sync_period, max_sync_s)
    return Config(
        mode=_mode(file.mode),
        loader=extras.loader or defaults.loader,
        device_attachment=extras.device_attachment or defaults.device_attachment,
        xdp_mode=extras.xdp_mode or defaults.xdp_mode,
        xdp_devices=tuple(extras.xdp_devices),
        syn_retries=extras.syn_retries,
        outlier_ejection=annotation.parse_outlier_ejection(extras.outlier_ejection),
        snat_ports=_port_range("snatPorts", extras.snat_ports) if extras.snat_ports else None,
        hostname_override=file.hostname_override.strip().lower(),
        kubeconfig=Path(file.client_connection.kubeconfig) if file.client_connection.kubeconfig else None,
        devices=tuple(extras.devices),
        cluster_cidrs=parse_cidr_pair("clusterCIDR", file.cluster_cidr),
        node_port_addresses=_node_port_addresses(file.node_port_addresses),
        detect_local_mode=file.detect_local_mode,
        local_devices=local_devices,
        bind_address=_bind_address(file.bind_address),
        oom_score_adj=file.oom_score_adj,
        scheduler=scheduler,
        is_scheduler_named=bool(file.ipvs.scheduler),
        maglev_size=extras.maglev_table_size,
        forwarding=Forwarding(extras.forwarding or defaults.forwarding),
        masquerade_all=masquerade.masquerade_all,
        masquerade_bit=masquerade.masquerade_bit,
        min_sync_s=section.min_sync_period,
        max_sync_s=max_sync_s,
        iptables_variant=extras.iptables_variant or defaults.iptables_variant,
        ipvs_scheduler=file.ipvs.scheduler if file.ipvs.scheduler in _UPSTREAM_SCHEDULERS else "",
        ipvs_exclude_cidrs=tuple(
            str(_cidr(f"ipvs.excludeCIDRs[{n}]", text)) for n, text in enumerate(file.ipvs.exclude_cidrs)
        ),
        ipvs_strict_arp=file.ipvs.strict_arp,
        ipvs_tcp_s=_timeout("ipvs.tcpTimeout", file.ipvs.tcp_timeout),
        ipvs_tcp_fin_s=_timeout("ipvs.tcpFinTimeout", file.ipvs.tcp_fin_timeout),
        ipvs_udp_s=_timeout("ipvs.udpTimeout", file.ipvs.udp_timeout),
        localhost_node_ports=file.iptables.localhost_node_ports,
        tcp_be_liberal=file.conntrack.tcp_be_liberal,
        conntrack_max=_conntrack_max(file.conntrack, os.cpu_count() or 1),
        udp_idle_s=_timeout("ebpfproxy.udpIdle", extras.udp_idle),
        udp_s=_timeout("conntrack.udpTimeout", file.conntrack.udp_timeout),
        udp_stream_s=_timeout("conntrack.udpStreamTimeout", file.conntrack.udp_stream_timeout),
        tcp_established_s=_timeout("conntrack.tcpEstablishedTimeout", file.conntrack.tcp_established_timeout),
        tcp_close_wait_s=_timeout("conntrack.tcpCloseWaitTimeout", file.conntrack.tcp_close_wait_timeout),
        service_cluster_ip_ranges=(
            parse_cidr_pair("ebpfproxy.serviceClusterIPRange", extras.service_cluster_ip_range)
            or defaults.service_cluster_ip_ranges
        ),
        service_node_port_range=(
            _port_range("serviceNodePortRange", extras.service_node_port_range)
            if extras.service_node_port_range
            else defaults.service_node_port_range
        ),
        load_balancer_pools=tuple(extras.load_balancer_pools),
        map_sizes=dict(extras.map_sizes),
        listen_addresses=parse_listen(
            "ebpfproxy.userspace.listenAddresses", extras.userspace.listen_addresses
        ),
        log_format=file.logging.format or "text",
        log_debug=file.logging.verbosity >= _DEBUG_VERBOSITY,
        healthz_bind=parse_bind(
            "healthzBindAddress", file.healthz_bind_address or _EVERY_ADDRESS[0], HEALTHZ_PORT
        ),
        metrics_bind=parse_bind(
            "metricsBindAddress",
            file.metrics_bind_address or ("::1" if ":" in file.bind_address else "127.0.0.1"),
            METRICS_PORT,
        ),
        must_bind=file.bind_address_hard_fail,
        unused=tuple(unused),
    )


def _local_devices(file: _File) -> tuple[tuple[str, ...], list[str]]:
    """Return patterns of the devices that detectLocalMode names, and what is set beside it in vain.

    Raises:
        ConfigError: there is no such mode, or it lacks what it needs.
    """
    mode, detect = file.detect_local_mode, file.detect_local
    if mode not in _LOCAL_MODES:
        raise ConfigError(f"detectLocalMode: {mode!r} is none of {_names(_LOCAL_MODES)}")
    named = {
        "BridgeInterface": ("detectLocal.bridgeInterface", detect.bridge_interface, ""),
        "InterfaceNamePrefix": ("detectLocal.interfaceNamePrefix", detect.interface_name_prefix, "*"),
    }
    devices: tuple[str, ...] = ()
    notes = []
    for its_mode, (field, name, suffix) in named.items():
        if mode == its_mode and not name:
            raise ConfigError(f"{field}: detectLocalMode {mode} needs it")
        if mode == its_mode:
            devices = (name + suffix,)
        elif name:
            notes.append(f"{field} (detectLocalMode is not {its_mode})")
    return devices, notes


def _bind_address(text: str) -> str:
    """Return the canonical address in ``bindAddress``, "" for all of them.

    Raises:
        ConfigError: it is none.
    """
    if text in _EVERY_ADDRESS:
        return ""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ConfigError(f"bindAddress: {text!r} is not an IP address") from error


def _unused_fields(part: _Schema, default: _Schema, prefix: str = "") -> Iterator[str]:
    """Yield the path of each field that is set, not to its default or Go's zero value, and not in _USED."""
    for field in msgspec.structs.fields(part):
        path = prefix + field.encode_name
        value, usual = getattr(part, field.name), getattr(default, field.name)
        if path in _USED or path == "ebpfproxy" or not value or value == usual:
            continue
        if isinstance(value, _Schema):
            yield from _unused_fields(value, usual, path + ".")
        elif path != "logging.options" or not _is_unset(value):
            yield path


def _is_unset(value: object) -> bool:
    """Return whether ``value`` holds nothing but zeros, as kubeadm writes logging.options."""
    if isinstance(value, Mapping):
        return all(_is_unset(item) for item in value.values())
    return not value or value == "0"


def _mode(name: str) -> str:
    if name not in ("", "auto", *MODES):
        raise ConfigError(f"mode: {name!r} is none of auto, {', '.join(MODES)}")
    return name or "auto"


def _scheduler(name: str) -> tuple[Scheduler, str]:
    """Return the scheduler for ``ipvs.scheduler``, and a note when it is not the one asked for."""
    if name == "mh":  # IPVS' name of Maglev hashing
        return Scheduler.MAGLEV, ""
    if name in _UPSTREAM_SCHEDULERS:
        return (
            Config().scheduler,
            f"ipvs.scheduler: {name} (in modes other than ipvs {Config().scheduler} is used)",
        )
    try:
        return Scheduler(name or Config().scheduler), ""
    except ValueError:
        known = _names({*Scheduler, "mh", *_UPSTREAM_SCHEDULERS})
        raise ConfigError(f"ipvs.scheduler: {name!r} is none of {known}") from None


def _sync_section(file: _File) -> tuple[str, _Iptables | _Ipvs | _Nftables]:
    """Return the section whose syncPeriod and minSyncPeriod count: the mode's own, else iptables'.

    kube-proxy's default minimum of 1 s is there because of what iptables costs. An update of maps costs what
    changed, so a minimum counts only when the file names it.
    """
    if file.mode == "ipvs":
        return "ipvs", file.ipvs
    if file.mode == "nftables":
        return "nftables", file.nftables
    return "iptables", file.iptables


def _check_periods(section: str, min_s: float, max_s: float) -> None:
    if min_s < 0:
        raise ConfigError(f"{section}.minSyncPeriod: must be at least 0")
    if max_s <= 0:
        raise ConfigError(f"{section}.syncPeriod: must be greater than 0")
    if min_s > max_s:
        raise ConfigError(f"{section}.minSyncPeriod: must not be longer than syncPeriod")


def _conntrack_max(section: _Conntrack, cores: int) -> int:
    """Return the limit that ``maxPerCore`` and ``min`` make together, 0 for none.

    Source: kube-proxy's getConntrackMax; each has kube-proxy's default once the other is set.
    """
    if section.max_per_core is None and section.min is None:
        return 0
    per_core = 32 * 1024 if section.max_per_core is None else section.max_per_core
    least = 128 * 1024 if section.min is None else section.min
    for field, value in (("maxPerCore", per_core), ("min", least)):
        if value < 0:
            raise ConfigError(f"conntrack.{field}: must be at least 0")
    return max(per_core * cores, least) if per_core else 0


def _timeout(field: str, value: float) -> float:
    if value < 0:
        raise ConfigError(f"{field}: must be at least 0")
    return float(value)


def parse_cidr_pair(field: str, text: str) -> tuple[str, ...]:
    """Return the canonical CIDRs in ``text``, "a" or "a,b" with one of each family; () for "".

    Raises:
        ConfigError: it is something else; the message names ``field``.
    """
    if not text:
        return ()
    networks = [_cidr(field, part.strip()) for part in text.split(",")]
    if len(networks) > 2 or len({network.version for network in networks}) != len(networks):
        raise ConfigError(f"{field}: {text!r} is not one CIDR or a pair of one IPv4 and one IPv6 CIDR")
    return tuple(str(network) for network in networks)


def _cidr(field: str, text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        if "/" not in text:
            raise ValueError("no prefix length")
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"{field}: {text!r} is not a CIDR such as 10.244.0.0/16 or fd00::/48: {error}"
        ) from error


def parse_bind(field: str, text: str, default_port: int) -> tuple[str, int] | None:
    """Return the address and port in "10.0.0.1:10256", "[::1]:10256" or, with the default port, "::1".

    Returns:
        The address "" for 0.0.0.0 and ``::``: all of both families, as Go's net.Listen takes them. None for
        "": do not listen.

    Raises:
        ConfigError: it is something else; the message names ``field``.
    """
    if not text:
        return None
    match = re.fullmatch(r"\[([^]]*)](?::([0-9]+))?|([^:]*):([0-9]+)|(.*)", text)
    assert match
    host, port = match[1] or match[3] or match[5] or "", int(match[2] or match[4] or default_port)
    try:
        address = str(ipaddress.ip_address(host))
        if not 0 < port <= 65535:
            raise ValueError(f"{port} is no port")
    except ValueError as error:
        raise ConfigError(
            f"{field}: {text!r} is not an address and port such as 127.0.0.1:{default_port} or "
            f"[::1]:{default_port}: {error}"
        ) from error
    return "" if address in _EVERY_ADDRESS else address, port


def parse_listen(field: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return addresses to listen on in canonical form, each once.

    Raises:
        ConfigError: one is no address of its own; the message names ``field``.
    """
    found = []
    for value in values:
        try:
            address = ipaddress.ip_address(value)
            if address.is_unspecified or address.is_multicast:
                raise ValueError("name each address")
        except ValueError as error:
            raise ConfigError(
                f"{field}: {value!r} is not an address of this machine such as 192.0.2.1: {error}"
            ) from error
        found.append(str(address))
    return tuple(dict.fromkeys(found))


def _node_port_addresses(values: list[str]) -> tuple[str, ...]:
    """Return ``nodePortAddresses`` as canonical CIDRs and "primary"; the other keywords are spelt out."""
    keywords = {
        "all": ("0.0.0.0/0", "::/0"),
        "localhost": ("127.0.0.0/8", "::1/128"),
        "primary": ("primary",),
    }
    result: list[str] = []
    for index, value in enumerate(values):
        result += keywords.get(value) or (str(_cidr(f"nodePortAddresses[{index}]", value)),)
    return tuple(dict.fromkeys(result))


def _port_range(field: str, text: str) -> tuple[int, int]:
    """Return the ends of "30000-32767" (as kube-apiserver's --service-node-port-range), both inclusive."""
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", text)
    if not match or not 0 < int(match[1]) <= int(match[2]) <= 65535:
        raise ConfigError(f"ebpfproxy.{field}: {text!r} is not a range such as 30000-32767")
    return int(match[1]), int(match[2])


def _names(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(str(name) for name in names if name))
