"""Flattens a BPF source for BCC: every macro and include of ours expanded, system includes left alone.

BCC's front-end rewrites ``map.lookup(...)`` and must see it in plain text, never inside a macro.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pcpp

LIB = Path(__file__).resolve().parent / "lib"


class Flattener(pcpp.Preprocessor):  # type: ignore[misc]
    """A C preprocessor that knows our macros only."""

    def __init__(self) -> None:
        super().__init__()
        self.line_directive = None
        self.add_path(str(LIB))
        self.define("LOADER_BCC 1")

    def on_include_not_found(
        self, is_malformed: bool, is_system_include: bool, curdir: str, includepath: str
    ) -> None:
        """Leave ``#include <...>`` to BCC; a missing file of ours is an error."""
        if is_malformed or not is_system_include:
            super().on_include_not_found(is_malformed, is_system_include, curdir, includepath)
        raise pcpp.OutputDirective(pcpp.Action.IgnoreAndPassThrough)


def flatten(source: Path, stamp: str) -> str:
    """Return the flattened text of ``source``; its first line is the stamp."""
    flattener = Flattener()
    flattener.parse(source.read_text(), str(source))
    out = io.StringIO()
    flattener.write(out)
    if flattener.return_code:
        sys.exit(f"{source}: can't be flattened")
    return f"/* stamp: {stamp} */\n{out.getvalue()}"


def main() -> None:
    """Flatten one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stamp", required=True)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(flatten(args.source, args.stamp))


if __name__ == "__main__":
    main()
