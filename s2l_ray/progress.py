"""What a user sees while a run goes on: one log line per event, and one bar with an ETA where there is a terminal.

Log lines appear above the bar. Elsewhere (a job's log, a file) progress is a plain line every ten seconds at most. Library
code logs through `get_log(stage)`; only the command line prints.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from s2l_ray.errors import printable

LINE_EVERY_SECONDS = 10.0
STARTING = "starting workers"
_ROOT = "s2l_ray"
_one_bar = threading.Lock()
# The bar on the terminal, while there is one.
_bar: Any = None


def get_log(stage: str) -> logging.Logger:
    """The logger of a stage; its lines start with the stage's name."""
    return logging.getLogger(f"{_ROOT}.{stage}")


def log_to_console() -> None:
    """Send log lines to standard error as `stage         message`. For the command line; libraries leave it alone."""
    root = logging.getLogger(_ROOT)
    if root.handlers:
        return
    handler = _AboveTheBar(sys.stderr)
    handler.setFormatter(_StageFormatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


@contextmanager
def quiet(stages: Iterable[str]) -> Iterator[None]:
    """Only warnings of these stages, while what they do is a small part of something else."""
    logs = [get_log(stage) for stage in stages]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.WARNING)
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


class _AboveTheBar(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines to a stream, and above the bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if (bar := _bar) is None:
            super().emit(record)
        else:  # the terminal wraps long lines: a path stays one word for whoever copies it
            bar.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class _StageFormatter(logging.Formatter):
    """`stage         message`, with the level where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        stage = record.name.rpartition(".")[2]
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        lines = printable(record.getMessage()).splitlines() or [""]
        return "\n".join(f"{stage:<13} {level}{line}" for line in lines)


class Progress:
    """How far one stage is. Made by `track`."""

    def __init__(self, stage: str, total: float, unit: str, done: float = 0.0, bar: Any = None) -> None:
        self.log, self.total, self.unit, self.done = get_log(stage), total, unit, done
        self._last_line = time.monotonic()
        # The first report is where the clock for the ETA starts: what comes before is start-up, or an earlier run's work.
        self._first: tuple[float, float] | None = None
        self._bar = bar
        if bar is not None:
            self._task = bar.add_task(f"{stage:<13}", total=total or None, completed=done, text=STARTING)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count finished units; `note` stands behind the bar or the line."""
        self.at(self.done + amount, note=note)

    def at(self, done: float, total: float | None = None, note: str = "") -> None:
        """Report how many units are finished in all, and how many there are if that was not known before."""
        self.total = self.total if total is None else total
        self.done = min(done, self.total)
        now = time.monotonic()
        self._first = self._first or (now, self.done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, text=self._text(now, note))
        elif now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            self.log.info(self._text(now, note))

    def _text(self, now: float, note: str) -> str:
        begun, done_before = self._first or (now, self.done)
        fresh = self.done - done_before
        eta = (self.total - self.done) * (now - begun) / fresh if fresh > 0 else None
        fraction = self.done / self.total if self.total else 1.0
        parts = [f"{self.unit} {self.done:,.0f}/{self.total:,.0f} ({fraction:.1%})", note]
        return "  ".join([p for p in parts if p] + ([f"eta {duration(eta)}"] if eta is not None else []))


@contextmanager
def track(stage: str, total: float, unit: str, done: float = 0.0) -> Iterator[Progress]:
    """A bar with an ETA on a terminal, a plain line every ten seconds elsewhere, and where another bar is shown.

    `total` is 0 while it is unknown; `done` is what an earlier run has finished. Until the first report the bar shows that
    workers start.
    """
    global _bar  # noqa: PLW0603 - a terminal is one per process, too
    if not sys.stderr.isatty() or not _one_bar.acquire(blocking=False):
        yield Progress(stage, total, unit, done)
        return
    try:
        with _new_bar() as _bar:
            yield Progress(stage, total, unit, done, _bar)
    finally:
        _bar = None
        _one_bar.release()


def _new_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(stderr=True)
    # On a narrow terminal the text is cut, and what a terminal echoes (^C) never makes a new line.
    rest = Column(no_wrap=True, max_width=max(10, console.width - 32))
    return Bar(
        TextColumn("{task.description}", markup=False),
        SpinnerColumn(),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[text]}", markup=False, table_column=rest),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )


def duration(seconds: float) -> str:
    """Seconds for people: `4.2s`, `41m 05s`, `7h 30m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
