"""Prints docs/cli.md, made from the command line's own grammar; a test compares it with the file.

Usage: .venv/bin/python scripts/cli_docs.py >docs/cli.md
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ebpfproxy.cli import parser
from ebpfproxy.cli.kube_proxy_flags import FLAGS, OTHER_JOBS

if TYPE_CHECKING:
    from collections.abc import Iterator

INTRODUCTION = """\
# The command line

Made by `scripts/cli_docs.py` from the program's own grammar.

Commands that are nouns read, verbs change. In mode `bpf` reading works from the pinned maps: it needs no
agent, only the right to read them (root), and `--bpffs` where the BPF file system is not at its usual place.
Every noun knows `-o table|wide|json|yaml`; tables are for people, the field names of JSON and YAML stay.

In other modes `explain` says what the running agent wants, and `services`, `backends`, `connections`,
`affinity`, `stats` and `maps` say which command shows the same ([modes](dataplanes.md#reading)); they find
the mode in `--state-dir`.

`ebpfproxy completion bash|zsh` prints a completion script; `make completion` installs both.

## Exit status

| status | meaning |
|---|---|
| 0 | done; what was asked for is there |
| 1 | the operation failed, or `check` or `validate` found something wrong |
| 2 | wrong usage, or a wrong configuration file |
| 3 | not there: nothing is programmed, no agent runs, no such Service or VIP (an empty list is 0); \
of `run --once`: some objects were refused, all others are programmed |
| 130 | interrupted (Ctrl-C) |

Errors are one line on standard error, `ebpfproxy: ...`; answers go to standard output.
"""


_KUBE_PROXY_FLAGS = """
Beside these it takes every flag of kube-proxy: each sets the field of the configuration file that it stands
for ([configuration.md](configuration.md#kube-proxys-flags)).
"""

# argparse keeps what a parser consists of in private attributes, and has no other way to ask.
# ruff: noqa: SLF001


def document() -> str:
    """Return the whole document."""
    commands = next(
        action for action in parser.build()._actions if isinstance(action, argparse._SubParsersAction)
    )
    sections = [_section(name, command) for name, command in commands.choices.items()]
    return INTRODUCTION + "".join(sections)


def _section(name: str, command: argparse.ArgumentParser) -> str:
    rows = [f"| {_names(action)} | {_meaning(action)} |" for action in _arguments(command)]
    table = "\n| argument | meaning |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    more = _KUBE_PROXY_FLAGS if name == "run" else ""
    return f"\n## `ebpfproxy {name}`\n\n{command.description}\n{table}{more}"


def _arguments(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Return the arguments; kube-proxy's flags, which have no words of their own, are in another document."""
    known = {f"--{flag.name}" for flag in FLAGS} | {f"--{name}" for name in OTHER_JOBS}
    return (
        action
        for action in command._actions
        if action.dest != "help" and not known.intersection(action.option_strings)
    )


def _names(action: argparse.Action) -> str:
    values = "\\|".join(map(str, action.choices or ())) or str(action.metavar or "").replace("|", "\\|")
    if not action.option_strings:
        return f"`{values}`"
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return flags if action.nargs == 0 else f"{flags} `{values}`"


def _meaning(action: argparse.Action) -> str:
    return (action.help or "") + (" (required)" if action.required and action.option_strings else "")


if __name__ == "__main__":
    print(document(), end="")
