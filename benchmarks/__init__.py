"""The figures of the BPF dataplane on this machine: ``python -m benchmarks``, see docs/benchmarks.md."""

from __future__ import annotations

import sys
from pathlib import Path

# The rig that the tests use makes the namespaces here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
