"""The grammar of the command line; nothing is imported here that a reading command does not need."""

from __future__ import annotations

import argparse
import ipaddress
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ebpfproxy
from ebpfproxy.cli import kube_proxy_flags
from ebpfproxy.dataplane import modes
from ebpfproxy.model import addresses

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Command: TypeAlias = Callable[[argparse.Namespace], int]

# What shtab calls FILE and DIRECTORY: functions of the shells that complete paths.
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_DIRECTORY = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}

# Of `connections`.
_STATES = ("new", "established", "closing", "closed", "connected", "unconnected")
_KINDS = ("forwarded", "dsr", "dsr-in", "socket")

STATE_DIR = Path("/var/lib/ebpfproxy")

_EPILOG = """\
Commands that are nouns read, verbs change. In mode bpf reading works from the pinned maps: no agent need run.
In other modes `explain` asks the running agent, and nouns say which command shows the same.

exit status:
  0    done; what was asked for is there
  1    the operation failed, or the check or validation found something wrong
  2    wrong usage, or a wrong configuration file
  3    not there: nothing is programmed, no agent runs, no such Service or VIP (an empty list is 0);
       of `run --once`: some objects were refused, all others are programmed
  130  interrupted (Ctrl-C)
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the name of a command and its help on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, 110) - 2)
        self._action_max_length = 17  # argparse forgets the indent of commands


class VipPort(NamedTuple):
    """What ``explain`` explains."""

    vip: str
    port: int
    protocol: str


def vip_port(text: str) -> VipPort:
    """Parse ``VIP:PORT[/PROTO]``; an IPv6 VIP stands in brackets.

    Raises:
        ArgumentTypeError: it is no such text; the message says what is wrong.
    """
    endpoint, _, protocol = text.partition("/")
    host, colon, port = endpoint.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected VIP:PORT[/PROTO], as 10.96.0.10:80/tcp")
    if host.startswith("[") != (":" in host) or host.startswith("[") != host.endswith("]"):
        raise argparse.ArgumentTypeError(f"{text!r}: write an IPv6 VIP in brackets, as [fd00::10]:80")
    protocol = (protocol or "tcp").upper()
    if protocol not in ("TCP", "UDP", "SCTP"):
        raise argparse.ArgumentTypeError(f"{text!r}: protocol {protocol} is none of tcp, udp, sctp")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r}: port {port!r} is none of 1 to 65535")
    return VipPort(ip_address(host.strip("[]")), int(port), protocol)


def end(text: str) -> str:
    """Return ADDRESS or ADDRESS:PORT (IPv6 then in brackets) in canonical form.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text.count(":") != 1 and not text.startswith("["):
        return ip_address(text)
    if text.endswith("]"):
        return ip_address(text[1:-1])
    made = vip_port(text)
    return addresses.endpoint(made.vip, made.port)


def ip_address(text: str) -> str:
    """Return an IP address in canonical form, an IPv4-mapped one (``::ffff:10.0.0.1``) as IPv4.

    Raises:
        ArgumentTypeError: it is none, or has a zone.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise argparse.ArgumentTypeError(f"{text!r}: no Service has an address with a zone")
        address = address.ipv4_mapped or address
    return str(address)


def map_size(text: str) -> tuple[str, int]:
    """Parse ``NAME=N``.

    Raises:
        ArgumentTypeError: it is no such text.
    """
    name, equals, number = text.partition("=")
    if not (name and equals and number.isascii() and number.isdecimal() and 0 < int(number) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=ENTRIES, as conntrack=1000000")
    return name, int(number)


def names(text: str) -> tuple[str, ...]:
    """Parse ``a,b``.

    Raises:
        ArgumentTypeError: one is empty.
    """
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names with commas in between, as eth0,eth1")
    return parts


def _path(parser: argparse.ArgumentParser, *flags: str, kind: dict[str, str], **options: object) -> None:
    """Add an argument that is a path; shells complete it."""
    action = parser.add_argument(*flags, type=Path, **options)  # type: ignore[arg-type]
    action.complete = kind  # type: ignore[attr-defined]  # read by shtab


def _lazily(module: str, function: str = "run") -> Command:
    """Return a command that imports its module when it runs."""

    def run(arguments: argparse.Namespace) -> int:
        from importlib import import_module

        result: int = getattr(import_module(f"ebpfproxy.cli.{module}"), function)(arguments)
        return result

    return run


class _Commands:
    """Adds commands that share their looks."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(
            title="commands", metavar="COMMAND", dest="command", required=True
        )

    def add(
        self, name: str, command: Command, help_text: str, description: str = ""
    ) -> argparse.ArgumentParser:
        parser = self._commands.add_parser(
            name,
            help=help_text,
            description=description or help_text[0].upper() + help_text[1:] + ".",
            allow_abbrev=False,
        )
        parser.set_defaults(run=command)
        return parser


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("-o", "--output"),
        choices=("table", "wide", "json", "yaml"),
        default="table",
        help="format of the answer (default: table)",
    )


def _bpffs(parser: argparse.ArgumentParser) -> None:
    _path(
        parser,
        "--bpffs",
        kind=_DIRECTORY,
        metavar="DIR",
        help="BPF file system, or a directory in one, that holds the pins (default: where one is mounted)",
    )


def _state_dir(parser: argparse.ArgumentParser) -> None:
    _path(
        parser,
        "--state-dir",
        kind=_DIRECTORY,
        metavar="DIR",
        default=STATE_DIR,
        help=f"directory of the agent's own state (default: {STATE_DIR})",
    )


def _filters(parser: argparse.ArgumentParser, *, protocol: bool = True) -> None:
    parser.add_argument(
        "service", nargs="?", metavar="SERVICE", help="only this Service: NAME, NAME:PORT or NAMESPACE/NAME"
    )
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", help="only Services of this namespace")
    if protocol:
        parser.add_argument(
            "--protocol", type=str.upper, choices=("TCP", "UDP", "SCTP"), help="only this protocol"
        )


def build() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="ebpfproxy",
        description="Kubernetes-style Services on this node, load-balanced by the kernel.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ebpfproxy {ebpfproxy.__version__}")
    commands = _Commands(parser)
    _verbs(commands)
    _nouns(commands)
    return parser


def _verbs(commands: _Commands) -> None:
    run = commands.add(
        "run",
        _lazily("run"),
        "run the agent",
        "Run the agent: make the kernel serve the Services in a directory of manifests, or those of "
        "an API server, and follow their changes. SIGTERM ends the agent and leaves the Services working; "
        "SIGHUP reads everything again.",
    )
    _path(
        run,
        "--manifests",
        kind=_DIRECTORY,
        metavar="DIR",
        help="Services come from this directory of .yaml, .yml and .json files",
    )
    _path(
        run,
        "--kubeconfig",
        kind=_FILE,
        metavar="FILE",
        help="Services come from the API server of this file's current context (default: in a pod, from that "
        "of its service account)",
    )
    run.add_argument("--master", metavar="URL", help="the API server, whatever the kubeconfig file says")
    run.add_argument(
        "--kube-api-server",
        type=names,
        metavar="URL,URL",
        help="where the API server can be reached without a Service's VIP; the next when one does not answer",
    )
    _path(run, "--config", kind=_FILE, metavar="FILE", help="KubeProxyConfiguration (kube-proxy's own file)")
    run.add_argument(
        *("--node-name", "--hostname-override"),
        metavar="NAME",
        help="name of this Node (default: the host's name)",
    )
    run.add_argument(
        "--mode",
        choices=(modes.AUTO, *modes.names()),
        help="dataplane (default: auto, the first of them that this machine can run)",
    )
    run.add_argument(
        "--loader",
        choices=("auto", "libbpf", "bcc"),
        help="how BPF programs get into the kernel (default: auto)",
    )
    _path(
        run,
        "--cgroup",
        kind=_DIRECTORY,
        metavar="PATH",
        help="cgroup whose processes can use Services (default: the root of cgroup v2)",
    )
    run.add_argument(
        "--devices",
        type=names,
        metavar="A,B",
        help="network devices, or patterns, whose packets are load-balanced (default: all that can be)",
    )
    run.add_argument(
        "--xdp-mode",
        default="",
        choices=("auto", "native", "generic", "off"),
        metavar="MODE",
        help="mode bpf: XDP on the uplinks: auto (native where the driver can, else none), native, generic, "
        "off; what XDP does not do tc does",
    )
    run.add_argument(
        "--xdp-devices",
        type=names,
        metavar="A,B",
        help="devices, or patterns, that get XDP (default: hardware, and where the default routes lead)",
    )
    run.add_argument(
        "--listen",
        type=names,
        metavar="IP,IP",
        help="mode userspace: serve Services' ports on these addresses; needs no privileges, and rules lead "
        "nothing else there",
    )
    run.add_argument(
        "--forwarding",
        choices=("snat", "dsr", "hybrid"),
        help="how traffic from outside gets to backends on other nodes: from this node's address, or "
        "encapsulated, with the replies straight to the client; hybrid: TCP so (default: snat)",
    )
    _state_dir(run)
    _bpffs(run)
    run.add_argument(
        "--healthz-bind-address",
        metavar="IP:PORT",
        help='where /healthz and /livez are (default: 0.0.0.0:10256); "" = nowhere',
    )
    run.add_argument(
        "--metrics-bind-address",
        metavar="IP:PORT",
        help='where /metrics and /proxyMode are (default: 127.0.0.1:10249); "" = nowhere',
    )
    run.add_argument(
        "--once",
        action="store_true",
        help="end after the first sync; with status 1 when it fails, or the Services can't be read within "
        "60 s (the API server is away, say): then nothing is changed",
    )
    run.add_argument("--log-format", choices=("text", "json"), help="format of the log (default: text)")
    run.add_argument(
        "--map-size",
        type=map_size,
        action="append",
        default=[],
        metavar="NAME=ENTRIES",
        help="limit of a BPF map; may be repeated (`ebpfproxy maps` lists them)",
    )
    run.usage = "%(prog)s FLAG..."  # they are too many to be listed at every mistake
    kube_proxy_flags.add(run)

    validate = commands.add(
        "validate",
        _lazily("validate"),
        "say what is wrong with manifests",
        "Say what is wrong with manifests, each object alone and all together; touches nothing.",
    )
    _path(validate, "paths", kind=_FILE, nargs="+", metavar="FILE|DIR", help="manifests")
    _path(
        validate,
        "--config",
        kind=_FILE,
        metavar="FILE",
        help="KubeProxyConfiguration to check too",
    )
    _output(validate)

    cleanup = commands.add(
        "cleanup",
        _lazily("cleanup"),
        "remove everything that ebpfproxy ever made",
        "Remove everything that ebpfproxy ever made on this machine: links, filters, pinned maps and the "
        "state directory. Services stop working. Needs no agent, touches nothing of others, may be repeated.",
    )
    cleanup.add_argument(
        "--kube-proxy",
        action="store_true",
        help="remove what kube-proxy left instead: KUBE-* chains, IPVS, its nftables tables; the agent may "
        "run meanwhile (docs/takeover.md)",
    )
    cleanup.add_argument(
        "--now",
        action="store_true",
        help="with --kube-proxy: also end the connections that go through kube-proxy's IPVS",
    )
    _bpffs(cleanup)
    _state_dir(cleanup)

    drain = commands.add(
        "drain",
        _lazily("drain"),
        "take no new connections, wait for the old ones",
        "Take no new connections any more and wait until those that go through ebpfproxy have ended: the way "
        "back to kube-proxy, which serves already. The agent must have ended; `ebpfproxy cleanup` is next. "
        "Exit status 1: some are left.",
    )
    _path(drain, "--config", kind=_FILE, metavar="FILE", help="KubeProxyConfiguration of the agent")
    _path(drain, "--cgroup", kind=_DIRECTORY, metavar="PATH", help="as the agent's (default: what it said)")
    drain.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="wait no longer (default: as long as it takes)"
    )
    drain.add_argument(
        "--stay", action="store_true", help="go on when nothing is left, as a DaemonSet needs it"
    )
    _bpffs(drain)
    _state_dir(drain)

    completion = commands.add(
        "completion",
        _lazily("completion"),
        "print a script that completes commands in a shell",
        "Print a completion script: ebpfproxy completion bash >/etc/bash_completion.d/ebpfproxy",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="which shell")


def _nouns(commands: _Commands) -> None:
    check = commands.add("check", _lazily("check"), "what this machine can run, and why not the rest")
    check.add_argument(
        "--capabilities",
        action="store_true",
        help="what each mode does, feature by feature, and why not; asks nothing of this machine",
    )
    _output(check)
    _state_dir(check)

    services = commands.add(
        "services", _lazily("nouns", "services"), "VIPs and ports, and how many backends they have"
    )
    backends = commands.add("backends", _lazily("nouns", "backends"), "backends, with state and connections")
    connections = commands.add("connections", _lazily("nouns", "connections"), "what is translated now")
    affinity = commands.add(
        "affinity", _lazily("nouns", "affinity"), "which client is bound to which backend"
    )
    stats = commands.add(
        "stats",
        _lazily("nouns", "stats"),
        "connections, packets and bytes of Services, backends and verdicts",
        "Show what was counted since a Service was made: connections, and packets and bytes of IP packets in "
        "both directions. Local sockets are connected to their backend once and count as connections only: "
        "nothing looks at their packets.",
    )
    for noun in (services, backends, connections, affinity, stats):
        _filters(noun, protocol=noun is not affinity)
        _output(noun)
        _bpffs(noun)
        _state_dir(noun)

    for name, what in (
        ("client", "of this client: ADDRESS or ADDRESS:PORT"),
        ("vip", "to this VIP: ADDRESS or ADDRESS:PORT"),
        ("backend", "to this backend: ADDRESS or ADDRESS:PORT"),
    ):
        connections.add_argument(f"--{name}", type=end, metavar="ADDRESS[:PORT]", help=f"only {what}")
    connections.add_argument("--state", choices=_STATES, help="only in this state")
    connections.add_argument("--kind", choices=_KINDS, help="only of this kind")

    of = stats.add_mutually_exclusive_group()
    of.add_argument(
        *("--backends",), dest="of", action="store_const", const="backends", help="of each backend"
    )
    of.add_argument(
        *("--verdicts",),
        dest="of",
        action="store_const",
        const="verdicts",
        help="what the programs decided on this node, in packets (or calls) and bytes",
    )

    explain = commands.add(
        "explain",
        _lazily("explain"),
        "what happens to a connection to a VIP, and why",
        "Say which frontend a connection matches, which backends are candidates and why others are not: in "
        "mode bpf from the live maps, in other modes from what the running agent wants.",
    )
    explain.add_argument(
        "target",
        type=vip_port,
        metavar="VIP:PORT[/PROTO]",
        help="IPv6 in brackets; PROTO: tcp (default), udp, sctp",
    )
    explain.add_argument(
        "--from",
        dest="source",
        type=ip_address,
        metavar="IP",
        help="client (default: one on this node, and one outside)",
    )
    _output(explain)
    _bpffs(explain)
    _state_dir(explain)

    maps = commands.add("maps", _lazily("nouns", "maps"), "fill and limit of each BPF map")
    _output(maps)
    _bpffs(maps)
    _state_dir(maps)

    status = commands.add(
        "status", _lazily("status"), "the agent, its last sync, and what the kernel counted"
    )
    _output(status)
    _bpffs(status)
    _state_dir(status)

    env = commands.add(
        "env",
        _lazily("env"),
        "environment variables of a namespace's Services",
        "Print the environment variables by which containers of a namespace find its Services: NAME=VALUE.",
    )
    env.add_argument("namespace", metavar="NAMESPACE", help="whose Services")
    _path(env, "--manifests", kind=_DIRECTORY, metavar="DIR", help="manifests (default: those of the agent)")
    _path(env, "--config", kind=_FILE, metavar="FILE", help="KubeProxyConfiguration with the agent's ranges")
    _output(env)
    _state_dir(env)

    commands.add("version", _lazily("version"), "print the version")
