"""What a user sees while a run goes on: one log line per event, and a bar with ETA where there is a terminal.

Elsewhere (a job's log, a file) progress is a plain line every ten seconds at most. Library code logs through
`get_log(stage)`; only the command line prints.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_EVERY_SECONDS = 10.0
_ROOT = "s2l_ray"


def get_log(stage: str) -> logging.Logger:
    """The logger of a stage; its lines start with the stage's name."""
    return logging.getLogger(f"{_ROOT}.{stage}")


def log_to_console() -> None:
    """Send log lines to standard error as `stage         message`. For the command line; libraries leave it alone."""
    root = logging.getLogger(_ROOT)
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_StageFormatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


class _StageFormatter(logging.Formatter):
    """`stage         message`, with the level where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        stage = record.name.rpartition(".")[2]
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        lines = record.getMessage().splitlines() or [""]
        return "\n".join(f"{stage:<13} {level}{line}" for line in lines)


class Progress:
    """How far one stage is. Made by `track`."""

    def __init__(self, stage: str, total: float, unit: str, bar: Any = None) -> None:
        self.log, self.total, self.unit = get_log(stage), total, unit
        self.done = 0.0
        self._bar = bar
        self._last_line = time.monotonic()
        # The first report is where the clock for the ETA starts: what comes before is start-up, or an earlier run's work.
        self._first: tuple[float, float] | None = None
        self._task = bar.add_task(f"{stage:<13}", total=total, note="") if bar is not None else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count finished units; `note` stands behind the bar or the line."""
        self.at(self.done + amount, note=note)

    def at(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say how many units are finished in all, and how many there are where that was not known before."""
        self.total = self.total if total is None else total
        self.done = min(done, self.total)
        self._first = self._first or (time.monotonic(), self.done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            self.log.info(self._line(now, note))

    def _line(self, now: float, note: str) -> str:
        begun, done_before = self._first or (now, self.done)
        fresh = self.done - done_before
        eta = (self.total - self.done) * (now - begun) / fresh if fresh > 0 else None
        share = self.done / self.total if self.total else 1.0
        parts = [f"{self.unit} {self.done:,.0f}/{self.total:,.0f} ({share:.1%})", note]
        return "  ".join([p for p in parts if p] + ([f"eta {duration(eta)}"] if eta is not None else []))


@contextmanager
def track(stage: str, total: float, unit: str) -> Iterator[Progress]:
    """A bar with ETA on a terminal, a plain line every ten seconds elsewhere."""
    if not sys.stderr.isatty():
        yield Progress(stage, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[note]}", markup=False),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Progress(stage, total, unit, bar)


def duration(seconds: float) -> str:
    """Seconds for people: `4.2s`, `41m 05s`, `7h 30m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
