"""``python -m ebpfproxy`` and the console script ``ebpfproxy``."""

from __future__ import annotations

import sys

from ebpfproxy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
