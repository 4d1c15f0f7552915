"""Host memory that a net on a CPU gives back and soon needs again."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the process; False where it is not glibc.

    By default glibc may return every large tensor to the kernel, which clears its pages before it
    gives them out again: on a CPU up to a sixth of an octic block's time (docs/performance.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
