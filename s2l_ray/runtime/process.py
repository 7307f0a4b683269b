"""What a process sets for itself before it works: quiet libraries, and what becomes of memory that it frees."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import warnings

_POOL = "ARROW_DEFAULT_MEMORY_POOL"


def quiet_libraries() -> None:
    """Keep the chatter of libraries in a worker out of the user's log; their errors still come as exceptions."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def share_one_heap() -> None:
    """Let all threads of this process, Arrow's included, take memory from one heap; to be called before pyarrow is loaded.

    Else each thread keeps what it frees, and no other finds it: reading and sorting a million rows of 12 losses took 400 MB
    instead of 270, and a fifth more of the processors. Processes started later choose for themselves.
    """
    arena_max = -8  # from malloc.h
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(arena_max, 1)
    if _POOL in os.environ:
        return
    os.environ[_POOL] = "system"
    try:
        import pyarrow as pa

        pa.default_memory_pool()  # the choice is made here, once
    finally:
        del os.environ[_POOL]


def keep_freed_memory() -> None:
    """Let this process keep large arrays that it frees, instead of giving them back to the system and asking for them again.

    glibc does that for every array above a threshold, and the system clears each page anew: on a CPU half of the time
    that tiles of logits take. Where there is another C library it stays as it is.
    """
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older versions take at most 32 MB.
        if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):
            mallopt(trim_threshold, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give what this process has freed back to the system, where the C library can: arrays of ever other sizes leave holes that
    it does not find again, and a training of a few million parameters grew to 8 GB in 600 steps."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
