"""The translator of errno values: every failed call becomes one of our exceptions here."""

from __future__ import annotations

import errno
import os

from ebpfproxy.errors import KernelError

# The kernel's own "not supported" (include/linux/errno.h); no header of user space has it.
ENOTSUPP = 524


def kernel_error(result: int, what: str) -> KernelError:
    """Return the error for a negative ``result`` of operation ``what``."""
    number = -result
    text = "not supported by this kernel" if number == ENOTSUPP else os.strerror(number)
    hint = ": this needs root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)" if number == errno.EPERM else ""
    return KernelError(f"{what}: {text}{hint}", number)


def check(result: int, what: str) -> int:
    """Return ``result`` of operation ``what`` unless it is negative.

    Raises:
        KernelError: the operation failed.
    """
    if result < 0:
        raise kernel_error(result, what)
    return result
