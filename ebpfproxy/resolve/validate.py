"""All that is wrong with a set of documents, without a node and without a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ebpfproxy.errors import InvalidObject
from ebpfproxy.model.objects import ObjectKey, Problem, decode, expand, key_of, problems_of
from ebpfproxy.resolve.allocate import AllocationOptions, Allocator
from ebpfproxy.resolve.resolver import NodeContext, Resolver

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ebpfproxy.model.objects import Object


def validate_documents(
    documents: Iterable[tuple[str, int, Any]], options: AllocationOptions | None = None
) -> tuple[list[Problem], int]:
    """Return what is wrong with parsed documents, each alone and all together.

    Args:
        documents: file, number of the document in it (from 0), content.
        options: the ranges to check against.

    Returns:
        The problems in the order of files and documents, and how many objects of ours there are.
    """
    problems: list[Problem] = []
    objects: dict[ObjectKey, Object] = {}
    sources: dict[ObjectKey, str] = {}
    count = 0
    for file, index, document in documents:
        source = f"{file}#{index + 1}" if index else file
        for item in expand(document):
            try:
                obj = decode(item)
            except InvalidObject as error:
                count += 1
                problems += problems_of(error, source)
                continue
            if obj is None:
                continue
            count += 1
            key = key_of(obj)
            if key in sources:
                problems.append(Problem(*key, "", f"is defined in {sources[key]} too", source))
            objects[key], sources[key] = obj, source
    allocation = Allocator(options or AllocationOptions()).allocate(objects)
    resolution = Resolver().resolve(allocation.objects, NodeContext())
    for each in (*allocation.problems, *resolution.problems):
        source = sources.get(ObjectKey(each.kind, each.namespace, each.name), "")
        problems.append(replace(each, source=source))
    return problems, count
