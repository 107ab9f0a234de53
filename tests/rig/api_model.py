"""What an API server's store says, in memory and without HTTP.

The rules are those of "Kubernetes API Concepts": resource versions grow with every write; a list has one, and
a watch from there misses nothing; a list in pages is that of its first page; history before a compaction is
gone (410); a watch with a selector tells an object that leaves the selection as deleted; bookmarks carry a
version alone.
"""

from __future__ import annotations

import json
import threading
from typing import Any, NamedTuple

Document = dict[str, Any]

SERVICES = "/api/v1/services"
NODES = "/api/v1/nodes"
ENDPOINTS = "/api/v1/endpoints"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
SLICES_BETA = "/apis/discovery.k8s.io/v1beta1/endpointslices"

KINDS = {
    SERVICES: ("v1", "Service"),
    NODES: ("v1", "Node"),
    ENDPOINTS: ("v1", "Endpoints"),
    SLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    SLICES_BETA: ("discovery.k8s.io/v1beta1", "EndpointSlice"),
}


class Refusal(Exception):  # noqa: N818 - an answer, not an error of the test
    """An answer that is a Status."""

    def __init__(self, code: int, reason: str, message: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.status: Document = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message or reason,
            "reason": reason,
            "code": code,
        }


class _Write(NamedTuple):
    version: int
    path: str
    before: Document | None
    after: Document | None


class ApiModel:
    """Holds objects and their history.

    Args:
        served: the paths that there are; others answer 404.

    Attributes:
        changed: notified at every write.
        page_limit: the server's own limit of a page; 0 = the client's.
    """

    def __init__(self, *served: str) -> None:
        self.served = set(served or (SERVICES, NODES, SLICES))
        self.changed = threading.Condition()
        self.page_limit = 0
        self.version = 1000
        self._oldest = 1000  # a watch from before this is too old
        self._objects: dict[str, dict[str, Document]] = {path: {} for path in KINDS}
        self._history: list[_Write] = []
        self._pages: dict[str, tuple[int, list[Document]]] = {}  # what is left of a list in pages

    # --- writing

    def put(self, path: str, document: Document) -> None:
        """Create or replace an object."""
        metadata = document["metadata"]
        key = f"{metadata.get('namespace', '')}/{metadata['name']}"
        with self.changed:
            self.version += 1
            stored = json.loads(json.dumps(document))
            stored["metadata"]["resourceVersion"] = str(self.version)
            before = self._objects[path].get(key)
            self._objects[path][key] = stored
            self._record(path, before, stored)

    def delete(self, path: str, name: str, namespace: str = "default") -> None:
        """Delete an object if it is there."""
        with self.changed:
            before = self._objects[path].pop(f"{namespace}/{name}", None)
            if before is None:
                return
            self.version += 1
            self._record(path, before, None)

    def compact(self) -> None:
        """Forget all history: who was away has to list, and lists in pages can't be continued."""
        with self.changed:
            self.version += 1  # somebody else's write
            self._oldest = self.version
            self._pages.clear()

    def restore(self, version: int) -> None:
        """Go back in time, as a store that is restored from a backup: the same objects, lower versions."""
        with self.changed:
            self.version = self._oldest = version
            self._history.clear()
            self._pages.clear()
            for objects in self._objects.values():
                for each in objects.values():
                    each["metadata"]["resourceVersion"] = str(version)

    def _record(self, path: str, before: Document | None, after: Document | None) -> None:
        self._history.append(_Write(self.version, path, before, after))
        self.changed.notify_all()

    # --- reading

    def documents(self, path: str) -> list[Document]:
        """Return every object of a kind, complete."""
        api_version, kind = KINDS[path]
        with self.changed:
            return [
                {"apiVersion": api_version, "kind": kind, **each} for each in self._objects[path].values()
            ]

    def page(self, path: str, query: dict[str, str]) -> Document:
        """Return the answer of a list, or of the next part of one.

        Raises:
            Refusal: it is a Status.
        """
        with self.changed:
            self._check_served(path)
            token = query.get("continue", "")
            if token:
                if query.get("resourceVersion"):
                    raise Refusal(
                        400, "BadRequest", "specifying resource version is not allowed when using continue"
                    )
                if token not in self._pages:
                    raise Refusal(410, "Expired", "The provided continue parameter is too old")
                version, items = self._pages.pop(token)
            else:
                version = self.version
                items = [each for each in self._objects[path].values() if is_selected(each, query)]
            limit = self.page_limit or int(query.get("limit", 0)) or len(items) or 1
            rest = items[limit:]
            metadata = {"resourceVersion": str(version)}
            if rest:
                metadata["continue"] = f"{path} {version} {len(rest)}"
                self._pages[metadata["continue"]] = (version, rest)
            api_version, kind = KINDS[path]
            return {
                "kind": f"{kind}List",
                "apiVersion": api_version,
                "metadata": metadata,
                "items": items[:limit],
            }

    def events(
        self, path: str, query: dict[str, str], version: int, *, is_open: bool = False
    ) -> tuple[list[Document], int]:
        """Return the events after a version, and the version that they lead to.

        A watch that is open already misses nothing, whatever history is forgotten.

        Raises:
            Refusal: it is a Status.
        """
        with self.changed:
            self._check_served(path)
            if version < self._oldest and not is_open:
                raise Refusal(410, "Expired", f"too old resource version: {version} ({self._oldest})")
            if version > self.version:
                text = f"Timeout: Too large resource version: {version}, current: {self.version}"
                raise Refusal(504, "Timeout", text)
            found = []
            for write in self._history:
                if write.path == path and write.version > version:
                    found += _event(write, query)
            return found, self.version

    def _check_served(self, path: str) -> None:
        if path not in self.served:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")


def _event(write: _Write, query: dict[str, str]) -> list[Document]:
    was = write.before is not None and is_selected(write.before, query)
    now = write.after is not None and is_selected(write.after, query)
    api_version, kind = KINDS[write.path]
    shown = write.after if now else write.before
    if not (was or now) or shown is None:
        return []
    metadata = {**shown["metadata"], "resourceVersion": str(write.version)}
    document = {"kind": kind, "apiVersion": api_version, **shown, "metadata": metadata}
    return [{"type": "MODIFIED" if was and now else "ADDED" if now else "DELETED", "object": document}]


def bookmark(path: str, version: int) -> Document:
    """Return a bookmark."""
    api_version, kind = KINDS[path]
    document = {"kind": kind, "apiVersion": api_version, "metadata": {"resourceVersion": str(version)}}
    return {"type": "BOOKMARK", "object": document}


def is_selected(document: Document, query: dict[str, str]) -> bool:
    """Say whether selectors select an object; those that a proxy uses."""
    labels = document["metadata"].get("labels") or {}
    for part in filter(None, query.get("labelSelector", "").split(",")):
        assert part.startswith("!"), part
        if part[1:] in labels:
            return False
    field, equals, value = query.get("fieldSelector", "").partition("=")
    assert field in ("", "metadata.name"), field
    return not equals or document["metadata"]["name"] == value
