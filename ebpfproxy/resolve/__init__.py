"""From Kubernetes objects to what this node must serve: pure. Kubernetes types end here."""

from ebpfproxy.resolve.allocate import Allocation, AllocationOptions, Allocator
from ebpfproxy.resolve.env import environment
from ebpfproxy.resolve.resolver import (
    NodeContext,
    Resolution,
    ResolveOptions,
    Resolver,
    node_context,
)
from ebpfproxy.resolve.validate import validate_documents

__all__ = [
    "Allocation",
    "AllocationOptions",
    "Allocator",
    "NodeContext",
    "Resolution",
    "ResolveOptions",
    "Resolver",
    "environment",
    "node_context",
    "validate_documents",
]
