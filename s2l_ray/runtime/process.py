"""What a process sets for itself: quiet libraries, memory that it keeps, and who gets Ctrl-C."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator


def quiet_libraries() -> None:
    """Keep the chatter of libraries in a worker out of the user's log; their errors still come as exceptions."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


@contextlib.contextmanager
def own_interrupts() -> Iterator[None]:
    """Turns SIGINT into KeyboardInterrupt at the end of the block, whatever a library within does with it.

    Ray Train installs a handler that aborts the training, stays when the training is over, and leaves by SystemExit(0) as if
    all were well, or not at all where the training was just ending.
    """
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        os.close(writer)
        with open(reader, "rb") as received:
            if signal.SIGINT in received.read():
                raise KeyboardInterrupt from None
