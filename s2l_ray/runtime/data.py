"""Ray Data without its own bars and messages: progress is shown once, by us."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_restore = contextlib.ExitStack()
_num_users = 0


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Within it Ray Data shows no bars, and no messages but errors; its log files keep them all.

    A dataset keeps the settings that it was made under, so it is made within, too. Several threads may be within at a time.
    """
    global _num_users  # noqa: PLW0603 - Ray Data's settings are one per process, too
    with _lock:
        if not _num_users:
            _make_quiet(_restore)
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if not _num_users:
                _restore.close()


def _make_quiet(restore: contextlib.ExitStack) -> None:
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    restore.enter_context(ray.data.DataContext.current(context))
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            restore.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.ERROR)
