"""Reads manifest files: bytes in, objects and what is wrong with them out. Knows no directory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import yaml

from ebpfproxy.errors import EbpfproxyError, InvalidObject
from ebpfproxy.model.objects import Object, ObjectKey, decode, expand, key_of, problems_of

SUFFIXES = (".yaml", ".yml", ".json")

_KEPT_TAGS = ("bool", "null", "merge")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without the C library, 10 times slower


class _Loader(_Base):  # type: ignore[misc]  # chosen at run time
    """Reads YAML as kubectl does: times stay text, and 1:30 is no number in base 60."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _KEPT_TAGS]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]*|[-+]?[1-9][0-9_]*|[-+]?0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*\.|[-+]?\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


class ManifestError(EbpfproxyError):
    """A file can't be parsed."""


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
        ManifestError: it is not YAML or JSON; the message names the line.
    """
    objects: dict[ObjectKey, Object] = {}
    raw: dict[ObjectKey, Any] = {}
    places: dict[ObjectKey, str] = {}
    refused: set[ObjectKey] = set()
    problems: list[str] = []
    ignored: Counter[str] = Counter()
    for place, document in _objects(_documents(name, data)):
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


def _objects(documents: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each object with its place in the file, for people: counted from 1."""
    for number, document in enumerate(documents, 1):
        items = list(expand(document))
        is_list = (
            isinstance(document, Mapping)
            and "items" in document
            and str(document.get("kind")).endswith("List")
        )
        for index, item in enumerate(items, 1):
            yield f"document {number}" + (f", item {index}" if is_list else ""), item


def _documents(name: str, data: bytes) -> list[Any]:
    """Return the documents in a file, as plain objects."""
    if name.endswith(".json"):
        return _json_documents(name, data)
    try:
        return list(yaml.load_all(data, Loader=_Loader))  # derived from the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        what = ", ".join(text for text in (error.context, error.problem) if text)
        raise ManifestError(f"{name}, {place}: is not YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = data.count(b"\n", 0, error.position) + 1
        raise ManifestError(f"{name}, line {line}: is not YAML: {error.reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(f"{name}: is not YAML: {error}") from error


def _json_documents(name: str, data: bytes) -> list[Any]:
    """Return the JSON values in ``data``: one, or several after one another."""
    try:
        return [msgspec.json.decode(data)]
    except (msgspec.DecodeError, RecursionError):
        pass
    # Slower, and it takes several values and knows the line of an error.
    try:
        text = data.decode()
        documents, position, decoder = [], 0, json.JSONDecoder()
        while (start := position + len(text[position:]) - len(text[position:].lstrip())) < len(text):
            document, position = decoder.raw_decode(text, start)
            documents.append(document)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ManifestError(f"{name}, {place}: is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{name}, line {line}: is not JSON: not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise ManifestError(f"{name}: is not JSON: nested too deep") from error
    return documents
