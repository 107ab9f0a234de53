"""Kubernetes-style Services on Linux nodes, load-balanced by the kernel."""

from __future__ import annotations

__version__ = "0.1.0"
