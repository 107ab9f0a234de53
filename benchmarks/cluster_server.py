"""A stand-in for the API server of a large cluster: its lists, and watches that say what rolling updates do.

Run by ``python -m benchmarks cluster``. It knows nothing but what an agent asks for. Objects are as a real
server sends them in JSON, managedFields and all, because their bytes are what is measured.
``GET /roll?rate=N&seconds=S`` makes Deployments roll: N writes of EndpointSlices a second.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import itertools
import json
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

SENT = "ebpfproxy.io/sent-ns"  # annotation: when it was sent, CLOCK_MONOTONIC
ROLLING_AT_ONCE = 50  # Deployments
_VIPS = ipaddress.IPv4Address("10.96.0.1")
_PODS = ipaddress.IPv4Address("10.128.0.0")
_ZONES = ("zone-a", "zone-b", "zone-c")
Document = dict[str, Any]


def _managed(manager: str, fields: str) -> list[Document]:
    """Return managedFields as the server adds them to every object."""
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": "v1",
            "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": {f"f:{name}": {} for name in fields.split()},
        }
    ]


class Cluster:
    """The objects.

    Args:
        nodes: how many there are; Pods are spread over them.
        services: how many there are.
        endpoints: of each.
    """

    def __init__(self, nodes: int, services: int, endpoints: int) -> None:
        self._addresses = (str(_PODS + number) for number in itertools.count())
        self._nodes = itertools.cycle(range(nodes))
        self._versions = itertools.count(1000)
        self.services = [self._service(number) for number in range(services)]
        self.slices = [self._slice(number, endpoints) for number in range(services)]
        self.node = {
            "metadata": {"name": "node-0", "resourceVersion": "999"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }

    def _meta(self, name: str, labels: dict[str, str], manager: str, fields: str) -> Document:
        return {
            "name": name,
            "namespace": "default",
            "uid": str(uuid.uuid4()),
            "resourceVersion": str(next(self._versions)),
            "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
            "managedFields": _managed(manager, fields),
        }

    def _service(self, number: int) -> Document:
        vip = str(_VIPS + number)
        return {
            "metadata": self._meta(
                f"app-{number}", {"app": f"app-{number}"}, "kubectl", "metadata spec labels ports selector"
            ),
            "spec": {
                "type": "ClusterIP",
                "clusterIP": vip,
                "clusterIPs": [vip],
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "internalTrafficPolicy": "Cluster",
                "sessionAffinity": "None",
                "selector": {"app": f"app-{number}"},
                "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            },
            "status": {"loadBalancer": {}},
        }

    def endpoint(self, number: int) -> Document:
        """Return a new Pod's endpoint."""
        node = next(self._nodes)
        return {
            "addresses": [next(self._addresses)],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {
                "kind": "Pod",
                "namespace": "default",
                "name": f"app-{number}-{uuid.uuid4().hex[:10]}-{uuid.uuid4().hex[:5]}",
                "uid": str(uuid.uuid4()),
            },
            "nodeName": f"node-{node}",
            "zone": _ZONES[node % len(_ZONES)],
        }

    def _slice(self, number: int, endpoints: int) -> Document:
        labels = {
            "app": f"app-{number}",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": f"app-{number}",
        }
        fields = "addressType endpoints metadata ports labels ownerReferences"
        return {
            "metadata": self._meta(f"app-{number}-{number:05x}", labels, "kube-controller-manager", fields),
            "addressType": "IPv4",
            "endpoints": [self.endpoint(number) for _ in range(endpoints)],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        }

    def roll(self, number: int) -> Iterator[Document]:
        """Yield the EndpointSlice of a Service at each step of its Deployment's rolling update, for ever.

        For each Pod: its successor is there, is ready, the old one terminates, is gone.
        """
        found = self.slices[number]
        while True:
            for index in range(len(found["endpoints"])):
                new = self.endpoint(number)
                new["conditions"] |= {"ready": False, "serving": False}
                found["endpoints"].append(new)
                yield self._written(found)
                new["conditions"] |= {"ready": True, "serving": True}
                yield self._written(found)
                old = found["endpoints"][index]
                old["conditions"] |= {"ready": False, "terminating": True}
                yield self._written(found)
                found["endpoints"][index] = found["endpoints"].pop()
                yield self._written(found)

    def _written(self, found: Document) -> Document:
        meta = found["metadata"]
        meta["resourceVersion"] = str(next(self._versions))
        meta["annotations"] = {SENT: str(time.monotonic_ns())}
        return found


class Server:
    """Speaks as much HTTP as the agent's client needs."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.watchers: list[asyncio.StreamWriter] = []  # of EndpointSlices
        self.sent = {"events": 0, "bytes": 0}
        self._rolls = itertools.cycle(
            [cluster.roll(number) for number in range(1, min(ROLLING_AT_ONCE, len(cluster.slices)))]
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a client until it goes."""
        try:
            while line := await reader.readline():
                target = urlsplit(line.split(b" ")[1].decode())
                while (await reader.readline()).strip():
                    pass
                query = {name: values[-1] for name, values in parse_qs(target.query).items()}
                if query.get("watch"):
                    await self._watch(target.path, writer)
                    return
                writer.write(await self._answer(target.path, query))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, query: dict[str, str]) -> bytes:
        if path == "/roll":
            return _response(await self._roll(float(query["rate"]), float(query["seconds"])))
        kinds = {
            "/api/v1/services": self.cluster.services,
            "/apis/discovery.k8s.io/v1/endpointslices": self.cluster.slices,
            "/api/v1/nodes": [self.cluster.node],
        }
        if path not in kinds:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        first, limit = int(query.get("continue", 0)), int(query.get("limit", 10**9))
        items = kinds[path][first : first + limit]
        rest = str(first + limit) if first + limit < len(kinds[path]) else ""
        return _response({"metadata": {"resourceVersion": "1000000", "continue": rest}, "items": items})

    async def _watch(self, path: str, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head)
        if path.endswith("endpointslices"):
            self.watchers.append(writer)
        await writer.wait_closed()

    async def _roll(self, rate: float, seconds: float) -> Document:
        before, start = dict(self.sent), time.monotonic()
        for count in range(round(rate * seconds)):
            late = start + count / rate - time.monotonic()
            if late > 0:
                await asyncio.sleep(late)
            event = {"type": "MODIFIED", "object": next(next(self._rolls))}
            line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
            for writer in self.watchers:
                writer.write(b"%x\r\n%s\r\n" % (len(line), line))
                await writer.drain()
            self.sent["events"] += 1
            self.sent["bytes"] += len(line)
        return {
            "seconds": time.monotonic() - start,
            **{name: self.sent[name] - before[name] for name in self.sent},
        }


def _response(body: Document) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def main() -> None:
    """Serve on loopback until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--endpoints", type=int, required=True)
    options = parser.parse_args()
    server = Server(Cluster(options.nodes, options.services, options.endpoints))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", options.port)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
