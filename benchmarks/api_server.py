"""Plays an API server with Services by the thousand: prepared lists, and a change when it is told.

Objects are as large as real ones, with all that a server writes into them. ``POST /change`` sends one changed
EndpointSlice to the watch and answers with the time of that (monotonic, nanoseconds).
"""

from __future__ import annotations

import argparse
import gzip
import json
import queue
import ssl
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from benchmarks import state

PAGE = 500
PORT = 8080
UID = "6d8a4f3c-0c5e-4f39-9d86-{:012d}"
STAMP = "2026-11-28T10:00:00Z"


def metadata(kind: str, name: str, number: int, labels: dict[str, str]) -> dict[str, Any]:
    """Return what a server writes into every object's metadata."""
    return {
        "name": name,
        "namespace": "default",
        "uid": UID.format(number),
        "resourceVersion": str(1000 + number),
        "creationTimestamp": STAMP,
        "labels": labels,
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": STAMP},
        "managedFields": [
            {
                "manager": "kube-controller-manager",
                "operation": "Update",
                "apiVersion": kind,
                "time": STAMP,
                "fieldsType": "FieldsV1",
                "fieldsV1": {
                    "f:metadata": {"f:labels": {".": {}, **{f"f:{label}": {} for label in labels}}},
                    "f:spec": {"f:ports": {".": {}}, "f:selector": {}, "f:sessionAffinity": {}},
                },
            }
        ],
    }


def service(number: int) -> dict[str, Any]:
    """Return a Service."""
    name, vip = f"service-{number}", state.vip(number)
    return {
        "metadata": metadata("v1", name, number, {"app": name, "tier": "backend"}),
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": PORT}],
            "selector": {"app": name},
            "clusterIP": vip,
            "clusterIPs": [vip],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, addresses: list[str]) -> dict[str, Any]:
    """Return its EndpointSlice."""
    name = f"service-{number}"
    labels = {
        "app": name,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": name,
    }
    return {
        "metadata": {
            **metadata("discovery.k8s.io/v1", f"{name}-abcde", number, labels),
            "generateName": f"{name}-",
            "generation": 3,
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": name,
                    "uid": UID.format(number),
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "targetRef": {
                    "kind": "Pod",
                    "namespace": "default",
                    "name": f"{name}-5d9c7b8f6d-{index:05d}",
                    "uid": UID.format(number * 100 + index),
                },
                "nodeName": f"node-{(number + index) % 500}",
                "zone": f"zone-{index % 3}",
            }
            for index, address in enumerate(addresses)
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT}],
    }


def pages(kind: str, items: list[dict[str, Any]]) -> list[bytes]:
    """Return the answers of a list, compressed, each with the number of the next one."""
    made: list[bytes] = []
    for start in range(0, len(items), PAGE):
        rest = str(len(made) + 1) if start + PAGE < len(items) else ""
        body = {
            "kind": kind,
            "metadata": {"resourceVersion": "100000", "continue": rest},
            "items": items[start : start + PAGE],
        }
        made.append(gzip.compress(json.dumps(body, separators=(",", ":")).encode(), 1))
    return made


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    lists: ClassVar[dict[str, list[bytes]]] = {}
    backends: ClassVar[int] = 0
    changes: ClassVar[queue.SimpleQueue[bytes]] = queue.SimpleQueue()
    sent: ClassVar[queue.SimpleQueue[int]] = queue.SimpleQueue()
    changed: ClassVar[dict[int, bool]] = {}

    def do_GET(self) -> None:
        """Answer a list, or a watch for ever."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        kind = url.path.rpartition("/")[2]
        if "watch" not in query:
            number = int(query.get("continue", ["0"])[0])
            self._send(self.lists[kind][number], [("Content-Encoding", "gzip")])
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            if kind != "endpointslices":
                time.sleep(3600)
            line = self.changes.get()
            stamp = time.monotonic_ns()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            self.sent.put(stamp)

    def do_POST(self) -> None:
        """Change the slice ``/change/NUMBER``: it loses an endpoint, or gets it back."""
        number = int(self.path.rpartition("/")[2])
        addresses = state.endpoints(number, self.backends)
        self.changed[number] = not self.changed.get(number)
        body = endpoint_slice(number, addresses[: -1 if self.changed[number] else None])
        event = {"type": "MODIFIED", "object": body}
        self.changes.put(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self._send(str(self.sent.get()).encode(), [])

    def _send(self, body: bytes, headers: list[tuple[str, str]]) -> None:
        self.send_response(200)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve, and say so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--backends", type=int, required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    numbers = range(1, options.services + 1)
    Handler.backends = options.backends
    slices = [endpoint_slice(each, state.endpoints(each, options.backends)) for each in numbers]
    Handler.lists = {
        "services": pages("ServiceList", [service(each) for each in numbers]),
        "endpointslices": pages("EndpointSliceList", slices),
        "nodes": pages("NodeList", [{"metadata": {"name": "node-1", "resourceVersion": "1"}}]),
    }
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.certificate, options.key)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
