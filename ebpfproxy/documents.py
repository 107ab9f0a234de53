"""The one home of YAML: documents in, plain objects out, and errors that name the line. JSON too."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, ClassVar

import msgspec
import yaml

from ebpfproxy.errors import EbpfproxyError

_KEPT_TAGS = ("bool", "null", "merge")
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without the C library, 10 times slower


class DocumentError(EbpfproxyError):
    """A file can't be parsed; the message names the file and, where known, the line."""


class _Loader(_Base):  # type: ignore[misc]  # chosen at run time
    """Reads YAML as kubectl does: times stay text, 1:30 is no number in base 60, a key stands there once."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _KEPT_TAGS]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Return a mapping; what ``<<`` merges in may be there twice, what is written may not."""
        if len(node.value) > 1:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:str":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]*|[-+]?[1-9][0-9_]*|[-+]?0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*\.|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read(name: str, data: bytes) -> list[Any]:
    """Return the documents in ``data``, the content of the file ``name``: JSON if that ends in .json.

    Raises:
        DocumentError: it is not YAML or JSON.
    """
    if name.endswith(".json"):
        return _read_json(name, data.removeprefix(codecs.BOM_UTF8))  # editors put it there
    return _read_yaml(name, data)


def _read_yaml(name: str, data: bytes) -> list[Any]:
    try:
        return list(yaml.load_all(data, Loader=_Loader))  # derived from the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(text for text in (error.context, error.problem) if text)
        raise DocumentError(f"{name}{place}: is not YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = data.count(b"\n", 0, error.position) + 1
        raise DocumentError(f"{name}, line {line}: is not YAML: {error.reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(f"{name}: is not YAML: {error}") from error


def _read_json(name: str, data: bytes) -> list[Any]:
    """Return the JSON values in ``data``: one, or several after one another."""
    try:
        return [msgspec.json.decode(data)]
    except (msgspec.DecodeError, RecursionError):
        pass
    # Slower, but it takes several values and knows the line of an error.
    documents: list[Any] = []
    try:
        text = data.decode().rstrip()
        decoder, position = json.JSONDecoder(), 0
        while position < len(text):
            document, position = decoder.raw_decode(text, _skip_space(text, position))
            documents.append(document)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DocumentError(f"{name}, {place}: is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"{name}, line {line}: is not JSON: not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise DocumentError(f"{name}: is not JSON: nested too deep") from error
    return documents


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
