"""The names of chains, as kube-proxy makes them: a takeover meets the same ones.

Source: kube-proxy, pkg/proxy/iptables: SHA-256 of the Service port's name and protocol, and of the endpoint
for its own chain, in base32, the first 16 characters: a chain's name may have 28.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from ebpfproxy.model import addresses

if TYPE_CHECKING:
    from ebpfproxy.model.services import Backend, Service

SERVICES = "KUBE-SERVICES"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
MARK_MASQ = "KUBE-MARK-MASQ"
POSTROUTING = "KUBE-POSTROUTING"
FORWARD = "KUBE-FORWARD"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
MARK_OUTSIDE = "KUBE-MARK-OUTSIDE"  # ours: more than one prefix of pods
CANARY = "KUBE-PROXY-CANARY"
FIREWALL = "KUBE-FIREWALL"  # kubelet makes the same
KUBELET_CANARY = "KUBE-KUBELET-CANARY"
NODE_PORT = "KUBE-NODE-PORT"  # this one and the next five: of mode ipvs
LOAD_BALANCER = "KUBE-LOAD-BALANCER"
SOURCE_RANGES = "KUBE-SOURCE-RANGES-FIREWALL"
IPVS_FILTER = "KUBE-IPVS-FILTER"
IPVS_OUT_FILTER = "KUBE-IPVS-OUT-FILTER"
NO_LOCAL = "KUBE-NO-LOCAL"  # ours, in mode ipvs
MARK_DROP = "KUBE-MARK-DROP"  # kubelet's before 1.28

#: Chains that kube-proxy makes in its modes iptables and ipvs, and so do we, beside those of Services.
OF_PROXY = frozenset(
    (
        *(SERVICES, EXTERNAL_SERVICES, NODE_PORTS, MARK_MASQ, POSTROUTING, FORWARD, PROXY_FIREWALL),
        *(
            MARK_OUTSIDE,
            CANARY,
            NODE_PORT,
            LOAD_BALANCER,
            SOURCE_RANGES,
            IPVS_FILTER,
            IPVS_OUT_FILTER,
            NO_LOCAL,
        ),
    )
)
#: Chains that kubelet makes, which kube-proxy only uses.
OF_KUBELET = frozenset((FIREWALL, MARK_DROP, KUBELET_CANARY, "KUBE-IPTABLES-HINT"))

_OF_SERVICE = re.compile(r"KUBE-(SVC|SVL|SEP|EXT|FW|XLB)-[A-Z2-7]{16}")  # XLB: kube-proxy before 1.24


def is_of_service(name: str) -> bool:
    """Return whether a chain belongs to some Service."""
    return _OF_SERVICE.fullmatch(name) is not None


def is_of_proxy(name: str) -> bool:
    """Return whether a chain is kube-proxy's, or ours."""
    return name in OF_PROXY or is_of_service(name)


def digest(text: str) -> str:
    """Return the 16 characters that stand for ``text``."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode()  # 5 bits a character


@lru_cache(maxsize=1 << 14)
def _service_digest(name: str, protocol: str) -> str:
    return digest(name + protocol)


def of_service(kind: str, service: Service) -> str:
    """Return the name of a Service's chain ``kind``: SVC, SVL, EXT or FW."""
    return f"KUBE-{kind}-{_service_digest(str(service.name), service.protocol.lower())}"


def endpoint(backend: Backend) -> str:
    """Return a backend as "10.0.0.1:80" or "[fd00::1]:80"."""
    return addresses.endpoint(backend.address, backend.port)


def of_backend(service: Service, backend: Backend) -> str:
    """Return the name of a backend's chain."""
    return _of_backend(str(service.name), service.protocol.lower(), endpoint(backend))


@lru_cache(maxsize=1 << 14)
def _of_backend(name: str, protocol: str, endpoint: str) -> str:
    return f"KUBE-SEP-{digest(f'{name}{protocol}{endpoint}')}"
