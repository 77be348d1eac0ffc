"""The memory of a process that computes on the CPU."""

import ctypes
import os
import platform

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**30  # bytes that stay with the process when they are freed
_LARGE = 32 * 2**20  # bytes, the most that glibc allows, from which on an allocation is the system's own


def keep_freed_memory() -> bool:
    """Has glibc keep freed memory for the next training step, which needs as much of it again.

    By default an activation of some megabytes goes back to the system as soon as it is freed, and its pages are cleared
    when they are next touched, in every step.

    Returns:
        Whether it was done: not where another C library is, or where the environment already says what malloc is to do.
    """
    told = any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ)
    if told or platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))
