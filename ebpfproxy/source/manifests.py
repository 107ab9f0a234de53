"""Reads manifest files: bytes in, objects and what is wrong with them out. Knows no directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ebpfproxy import documents
from ebpfproxy.errors import InvalidObject
from ebpfproxy.model.objects import Object, ObjectKey, decode, expand, key_of, problems_of

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one file says."""

    objects: dict[ObjectKey, Object]
    raw: dict[ObjectKey, Any]  # each good object as it was written, List kinds taken apart
    refused: frozenset[ObjectKey]  # objects that are there and wrong
    problems: tuple[str, ...]
    ignored: Counter[str] = field(default_factory=Counter)  # kinds that are not ours


def read(name: str, data: bytes) -> Manifest:
    """Return the objects in ``data``, the content of the file ``name``.

    Raises:
        DocumentError: it is not YAML or JSON; the message names the line.
    """
    objects: dict[ObjectKey, Object] = {}
    raw: dict[ObjectKey, Any] = {}
    places: dict[ObjectKey, str] = {}
    refused: set[ObjectKey] = set()
    problems: list[str] = []
    ignored: Counter[str] = Counter()
    for place, document in _objects(documents.read(name, data)):
        where = f"{name}, {place}"
        try:
            obj = decode(document)
        except InvalidObject as error:
            problems += [str(problem) for problem in problems_of(error, where)]
            refused.add(ObjectKey(error.kind, error.namespace, error.name))
            continue
        except (TypeError, ValueError, RecursionError) as error:  # a shape that decode did not think of
            problems.append(f"{where}: can't be read: {type(error).__name__}: {error}")
            continue
        if obj is None:
            ignored[f"{document.get('kind')} ({document.get('apiVersion')})"] += 1
            continue
        key = key_of(obj)
        if key in objects:
            problems.append(f"{where}: {key}: is defined in {places[key]} too, which is used")
            continue
        objects[key], raw[key], places[key] = obj, document, place
    return Manifest(objects, raw, frozenset(refused - objects.keys()), tuple(problems), ignored)


def _objects(found: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each object with its place in the file, for people: counted from 1."""
    for number, document in enumerate(found, 1):
        items = list(expand(document))
        is_list = (
            isinstance(document, Mapping)
            and "items" in document
            and str(document.get("kind")).endswith("List")
        )
        for index, item in enumerate(items, 1):
            yield f"document {number}" + (f", item {index}" if is_list else ""), item
