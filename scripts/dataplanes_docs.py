"""Prints docs/dataplanes.md, made from the tables of modes and of what they do.

A test compares it with the file. Usage: .venv/bin/python scripts/dataplanes_docs.py >docs/dataplanes.md
"""

from __future__ import annotations

from ebpfproxy.dataplane import capabilities, modes

INTRODUCTION = """\
# Modes

Made by `scripts/dataplanes_docs.py` from the program's own tables, as `ebpfproxy check --capabilities`.

All modes take the same desired state and do the same with it; where one can't, this page says so.
`--mode auto` (`mode: auto` in the [configuration](configuration.md)) takes the first of these that the
machine can run:

"""

SWITCHING = """
`ebpfproxy check` says of each mode why this machine can't run it. The log, `ebpfproxy status` ("passed over")
and the metric `ebpfproxy_mode_passed_over` say it of those that `auto` could not use.

More on [nftables](nftables.md), [ipvs](ipvs.md), [iptables](iptables.md) and [userspace](userspace.md).

## Switching

Start the agent with another `--mode`. Once everything is programmed in the new mode, what the old one left in
the kernel is removed; `modes.json` in the state directory says which modes that may be. New connections are
served before and after it. What is established goes on where the kernel can keep it:

| from | established connections |
|---|---|
| `bpf` | of sockets on the node: go on. Others, also those under way: their translation goes with the maps |
| `nftables`, `iptables`, `ipvs` | go on; to `bpf` those of sockets on the node alone |
| `userspace` | go on until they end: the proxy process stays for them |

After a switch to `bpf` the nftables table `ebpfproxy-takeover` keeps the kernel's NAT at work until the last
connection that it translates has ended.

`ebpfproxy cleanup` removes what any mode ever made.

## Reading

`ebpfproxy explain VIP:PORT` says in every mode who gets a connection, and why others don't: in mode `bpf`
from the maps, in others from what the running agent wants (it answers at `agent.sock` in the state directory,
root alone). So do `ebpfproxy services` and `ebpfproxy backends`, which count connections in mode
`bpf` alone. The other commands that list read the maps of mode `bpf`; in other modes they name those of this
table.

| mode | Services and backends | connections |
|---|---|---|
{reading}

## What each mode does

"""


def document() -> str:
    """Return the whole document."""
    ways = [f"| `{each.name}` | {each.works_by} | {each.needs} |" for each in modes.TABLE]
    reading = [f"| `{each.name}` | `{each.services_by}` | `{each.connections_by}` |" for each in modes.TABLE]
    names = [each.name for each in modes.TABLE]
    rows, reasons = [], []
    for feature in capabilities.FEATURES:
        marks = []
        for name in names:
            reason = feature.limit(name)
            if reason and reason not in reasons:
                reasons.append(reason)
            marks.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
        rows.append(f"| {feature.what} | {' | '.join(marks)} |")
    return (
        INTRODUCTION
        + "| mode | works by | needs |\n|---|---|---|\n"
        + "\n".join(ways)
        + "\n"
        + SWITCHING.format(reading="\n".join(reading))
        + f"| | {' | '.join(f'`{name}`' for name in names)} |\n|---|{'---|' * len(names)}\n"
        + "\n".join(rows)
        + "\n\n"
        + "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
        + "\n"
    )


if __name__ == "__main__":
    print(document(), end="")
