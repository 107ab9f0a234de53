"""What is in the kernel, what should be, and the transaction between the two. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ebpfproxy.dataplane.nftables.render import TABLE, Fragment, Node, Object, header, node_fragment, render
from ebpfproxy.diff import Delta, diff

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ebpfproxy.model.services import DesiredState, Service, ServiceName


class Tables:
    """Keeps a fragment for each Service; a change costs what the changed ones have.

    Args:
        have: what the kernel has.
        families: IP families that this kernel knows; Services of others are left out.
        mark: bit of the packet mark that asks for masquerade.
        serves_loopback: NodePorts answer on 127.0.0.1, if that is one of their addresses.
    """

    def __init__(
        self,
        have: Mapping[Object, str],
        families: Iterable[int],
        mark: int,
        *,
        serves_loopback: bool = True,
    ) -> None:
        self.have = dict(have)
        self._families = tuple(families)
        self._mark = mark
        self._serves_loopback = serves_loopback
        self._node = Node(frozenset(), mark)
        self._services: dict[ServiceName, tuple[Service, Fragment]] = {}
        self._rest = Fragment({}, {})  # of the node
        self._owners: Counter[Object] = Counter()  # in how many fragments an object is
        self._touched: set[Object] = set(have)  # to be compared

    def update(self, state: DesiredState) -> tuple[Delta[Object, str], dict[Object, str]]:
        """Return what to change so that the kernel serves ``state``, and what new chains and sets hold."""
        node = Node(state.addresses.local, self._mark)
        services = {each.name: each for each in state.services if each.name.family in self._families}
        values: dict[Object, str] = {}
        bodies: dict[Object, str] = {}
        for name in [name for name in self._services if name not in services]:
            self._replace(self._services.pop(name)[1], None)
        for name, service in services.items():
            known = self._services.get(name)
            if known and known[0] is service and node == self._node:
                continue
            fragment = render(service, node)
            self._services[name] = (service, fragment)
            self._replace(known[1] if known else None, fragment)
            values |= fragment.objects
            bodies |= fragment.bodies
        rest = node_fragment(state, self._families, serves_loopback=self._serves_loopback)
        self._replace(self._rest, rest)
        values |= rest.objects
        self._rest, self._node = rest, node
        have = {each: self.have[each] for each in self._touched if each in self.have}
        # A touched object that is in no fragment of this time is as it was.
        want = {
            each: values.get(each, have.get(each, "")) for each in self._touched if self._owners[each] > 0
        }
        return diff(have, want), bodies

    def commit(self, delta: Delta[Object, str]) -> None:
        """Note that the delta is in the kernel."""
        self.have |= delta.upsert
        for each in delta.delete:
            del self.have[each]
        self._touched.clear()

    def _replace(self, old: Fragment | None, new: Fragment | None) -> None:
        if old:
            self._owners.subtract(old.objects.keys())
            self._touched.update(old.objects)  # |= of a set and the keys of a dict copies the set
        if new:
            self._owners.update(new.objects.keys())
            self._touched.update(new.objects)


def transaction(delta: Delta[Object, str], bodies: Mapping[Object, str], have: Mapping[Object, str]) -> str:
    """Return nft's commands for a delta: what elements lead to comes before them and goes after them."""
    made = sorted(each for each in delta.upsert if each.kind != "element")
    lines = [f"add set {_place(each)} {{ {bodies[each]} }}" for each in made if each.kind == "set"]
    chains = [each for each in made if each.kind == "chain"]
    lines += [f"add chain {_place(each)}" for each in chains]
    for each in chains:
        lines += [f"add rule {_place(each)} {rule}" for rule in bodies[each].split("\n")]
    elements = {each: value for each, value in delta.upsert.items() if each.kind == "element"}
    gone = [each for each in delta.delete if each.kind == "element"]
    lines += _per_set(
        "delete", {**dict.fromkeys(gone, ""), **dict.fromkeys((e for e in elements if e in have), "")}
    )
    lines += _per_set("add", elements)
    # Chains lead to one another: first all are emptied.
    old = sorted(each for each in delta.delete if each.kind == "chain")
    lines += [f"flush chain {_place(each)}" for each in old]
    lines += [f"delete chain {_place(each)}" for each in old]
    lines += [f"delete set {_place(each)}" for each in delta.delete if each.kind == "set"]
    return "\n".join(lines) + "\n" if lines else ""


def _per_set(verb: str, elements: Mapping[Object, str]) -> list[str]:
    """Return one command for each set or map."""
    sets: dict[tuple[int, str], list[str]] = {}
    for each, value in elements.items():
        sets.setdefault((each.family, each.name), []).append(f"{each.key} : {value}" if value else each.key)
    return [
        f"{verb} element {header(family)} {TABLE} {name} {{ {', '.join(listed)} }}"
        for (family, name), listed in sets.items()
    ]


def _place(each: Object) -> str:
    return f"{header(each.family)} {TABLE} {each.name}"
