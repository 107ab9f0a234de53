"""Rows as a table for people, or as JSON or YAML for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


_GAP = 3  # spaces between columns


class Column(NamedTuple, Generic[T]):
    """One column of a table."""

    header: str
    text: Callable[[T], object]
    is_wide: bool = False  # shown by -o wide only


def show(rows: Sequence[T], columns: Sequence[Column[T]], style: str, *, empty: str) -> None:
    """Print ``rows``.

    Args:
        rows: values that msgspec can encode.
        columns: what a table shows of them.
        style: table | wide | json | yaml.
        empty: said on standard error in place of a table without rows.
    """
    if style in ("json", "yaml"):
        encode(list(rows), style)
    elif rows:
        print(table(rows, columns, is_wide=style == "wide"))
    else:
        print(empty, file=sys.stderr)


def table(rows: Sequence[T], columns: Sequence[Column[T]], *, is_wide: bool = False) -> str:
    """Return ``rows`` as a table; an empty cell is a dash, so that columns can be cut by a script."""
    cells = []
    for column in columns:
        if is_wide or not column.is_wide:
            texts = [column.header, *(_cell(column.text(row)) for row in rows)]
            width = max(map(len, texts)) + _GAP
            cells.append([text.ljust(width) for text in texts])
    return "\n".join("".join(line).rstrip() for line in zip(*cells, strict=True))


def encode(value: Any, style: str) -> None:
    """Print one value as ``json`` or ``yaml``."""
    import msgspec

    if style == "json":
        data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    else:
        import msgspec.yaml

        data = msgspec.yaml.encode(value)
    sys.stdout.flush()
    sys.stdout.buffer.write(data)


def _cell(value: object) -> str:
    if isinstance(value, (list, tuple, frozenset)):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


def seconds(value: float) -> str:
    """Return a duration as people read it: 45s, 3m20s, 2h05m, 3d04h."""
    whole = int(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def size(value: int) -> str:
    """Return a number of bytes as people read it: 512B, 4.0KiB, 12.5MiB."""
    if value < 1024:
        return f"{value}B"
    number = float(value)
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f}{unit}"
    return f"{number / 1024:.1f}TiB"
