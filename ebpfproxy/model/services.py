"""The desired state: what a node must serve, as frozen values. No Kubernetes types, no bytes."""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec


class Protocol(enum.StrEnum):
    """A transport protocol that a Service can use."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class FrontendKind(enum.StrEnum):
    """Why clients use an address."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class Policy(enum.StrEnum):
    """A traffic policy."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class Scheduler(enum.StrEnum):
    """How a backend is picked; names as IPVS has them, and maglev."""

    RANDOM = "random"
    RR = "rr"
    WRR = "wrr"
    SH = "sh"
    DH = "dh"
    MAGLEV = "maglev"
    LC = "lc"
    WLC = "wlc"
    SED = "sed"
    NQ = "nq"


#: Slots that a maglev table may have: the largest primes below powers of two (a permutation of the slots
#: needs a prime). For shares within 1 % the paper wants 100 times the number of backends.
MAGLEV_SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
#: Good for 163 backends. Not made to measure for each Service: a table of another size is another table, and
#: one endpoint more would move every connection.
MAGLEV_SIZE = 16381


class Forwarding(enum.StrEnum):
    """How a packet from outside gets to a backend on another node, where every node may be asked."""

    SNAT = "snat"  # from this node's address; the replies come back to it
    DSR = "dsr"  # encapsulated, as it is; the replies go straight to the client
    HYBRID = "hybrid"  # TCP as dsr, the others as snat


class Readiness(enum.StrEnum):
    """What an endpoint's conditions amount to."""

    READY = "ready"
    TERMINATING = "terminating"  # terminating and still serving
    NOT_READY = "not-ready"


class Empty(enum.StrEnum):
    """What happens to a new connection when a pool is empty."""

    REJECT = "reject"
    DROP = "drop"


class ServiceName(NamedTuple):
    """Names one port of one Service in one IP family; unique in a desired state."""

    namespace: str
    name: str
    port: str  # "" for the only, unnamed port
    family: int  # 4 | 6

    def __str__(self) -> str:
        """Return ``namespace/name:port`` as kube-proxy writes it (no colon for an unnamed port)."""
        suffix = f":{self.port}" if self.port else ""
        return f"{self.namespace}/{self.name}{suffix}"


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """A VIP and port; protocol and family are the Service's."""

    kind: FrontendKind
    address: str  # canonical text; "" for a NodePort: every NodePort address of this node
    port: int


class Backend(msgspec.Struct, frozen=True, gc=False):
    """One endpoint of one Service port, usable or not; distinct by address and port."""

    address: str  # canonical text
    port: int
    readiness: Readiness = Readiness.READY
    is_local: bool = False  # on this node
    is_hinted_elsewhere: bool = False  # left out of policy Cluster by its topology hint
    weight: int = 1  # 0 drains: no new connections
    node: str = ""
    zone: str = ""


class Pool(msgspec.Struct, frozen=True):
    """The backends that new connections may go to."""

    backends: tuple[Backend, ...]  # sorted by (address, port); weight 0 already left out
    on_empty: Empty = Empty.REJECT


class OutlierEjection(msgspec.Struct, frozen=True):
    """When a backend is passed over because it fails."""

    failures: int  # openings in a row that were refused or not answered
    seconds: int  # for so long
    max_percent: int  # of the backends, at most


class Service(msgspec.Struct, frozen=True):
    """One port of a Kubernetes Service in one IP family: everything a dataplane must know of it."""

    name: ServiceName
    protocol: Protocol
    frontends: tuple[Frontend, ...]
    backends: tuple[Backend, ...]  # all known, sorted by (address, port)
    cluster: Pool  # policy Cluster, topology hints applied
    local: Pool  # policy Local: on this node only
    internal_policy: Policy = Policy.CLUSTER
    external_policy: Policy = Policy.CLUSTER
    scheduler: Scheduler = Scheduler.RANDOM
    affinity_s: int = 0  # ClientIP timeout; 0 = none
    source_ranges: tuple[str, ...] = ()  # canonical CIDRs of this family
    has_source_ranges: bool = False  # True with no range of this family: nobody may enter
    health_check_node_port: int = 0
    type: str = "ClusterIP"  # as in the object, for people
    maglev_size: int = MAGLEV_SIZE  # slots of a table of scheduler maglev
    is_dsr: bool = (
        False  # outside traffic under policy Cluster: Forwarding.DSR; backends differ by address then
    )
    syn_retries: int = 0  # so many more backends are asked when one does not answer an opening
    outliers: OutlierEjection | None = None

    def policy(self, kind: FrontendKind, *, is_external: bool) -> Policy:
        """Return the traffic policy for a frontend of ``kind``, by where the traffic comes from.

        Source: SERVICES.md section 4; kube-proxy short-circuits traffic from the node and its pods to
        an external VIP to policy Cluster.
        """
        if kind is FrontendKind.CLUSTER_IP:
            return self.internal_policy
        return self.external_policy if is_external else Policy.CLUSTER

    def pool(self, kind: FrontendKind, *, is_external: bool) -> Pool:
        """Return the backends for a frontend of ``kind``, by where the traffic comes from."""
        is_local = self.policy(kind, is_external=is_external) is Policy.LOCAL
        return self.local if is_local else self.cluster


class NodeSource(NamedTuple):
    """The address of this node that packets out of a device get as their source."""

    device: int  # index; 0: every device without an address of its own
    family: int  # 4 | 6
    address: str


class NodePortAddresses(msgspec.Struct, frozen=True):
    """The node's own addresses, as the dataplane must know them."""

    serving: frozenset[str] = frozenset()  # NodePorts answer here; loopback: for local clients only
    local: frozenset[str] = frozenset()  # every address of this node, serving or not
    sources: frozenset[NodeSource] = frozenset()  # at most one of each device and family


class DesiredState(msgspec.Struct, frozen=True):
    """All that a dataplane makes true."""

    services: tuple[Service, ...]
    addresses: NodePortAddresses = NodePortAddresses()
    local_sources: frozenset[str] = frozenset()  # CIDRs whose traffic counts as this node's pods'
    own_sources: frozenset[str] = frozenset()  # CIDRs of pods that are on this node for sure
    # Whose traffic to a cluster IP gets this node's address as source, besides what needs it anyway:
    masquerades_all: bool = False  # everybody's
    masquerades_outside: bool = False  # that of sources outside local_sources
