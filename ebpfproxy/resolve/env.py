"""The environment variables of a container: one family for each Service that it can see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.model.objects import Service

if TYPE_CHECKING:
    from ebpfproxy.model.objects import Objects

MASTER_NAMESPACE = "default"
MASTER_SERVICES = ("kubernetes",)  # every namespace sees these, unless it has its own of that name


def environment(objects: Objects, namespace: str) -> dict[str, str]:
    """Return the variables of a namespace's Services, sorted by name.

    Headless Services and those without a cluster IP have none.

    Source: Kubernetes "Discovering services, Environment variables", Docker's legacy link variables
    (``makeLinkVariables``), and the kubelet for Service ``kubernetes``.
    """
    services: dict[str, Service] = {}
    for obj in objects.values():
        if not isinstance(obj, Service) or obj.spec.type == "ExternalName" or not obj.cluster_ips:
            continue
        name = obj.metadata.name
        if obj.metadata.namespace == namespace:
            services[name] = obj
        elif obj.metadata.namespace == MASTER_NAMESPACE and name in MASTER_SERVICES:
            services.setdefault(name, obj)
    variables: dict[str, str] = {}
    for service in services.values():
        variables |= _variables(service)
    return dict(sorted(variables.items()))


def _variables(service: Service) -> dict[str, str]:
    prefix = _upper(service.metadata.name)
    address = service.cluster_ips[0]
    host = f"[{address}]" if ":" in address else address
    first = service.spec.ports[0]
    variables = {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(first.port),
        f"{prefix}_PORT": f"{first.protocol.lower()}://{host}:{first.port}",
    }
    for port in service.spec.ports:
        if port.name:
            variables[f"{prefix}_SERVICE_PORT_{_upper(port.name)}"] = str(port.port)
        link = f"{prefix}_PORT_{port.port}_{port.protocol}"
        variables |= {
            link: f"{port.protocol.lower()}://{host}:{port.port}",
            f"{link}_PROTO": port.protocol.lower(),
            f"{link}_PORT": str(port.port),
            f"{link}_ADDR": address,
        }
    return variables


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")
