"""Names that no other run uses."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

PREFIX = f"ebp-{os.getpid()}-"

_numbers = itertools.count(1)


def unique(label: str = "") -> str:
    """Return a new name: the prefix, a number and ``label``."""
    number = next(_numbers)
    return f"{PREFIX}{number}-{label}" if label else f"{PREFIX}{number}"


def temporary_directory(label: str = "") -> Path:
    """Make a new directory under the system's temporary one; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=f"{unique(label)}-"))
