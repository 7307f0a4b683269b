"""What a user sees on a real terminal: `s2l` under a pseudo-terminal, and the screen that its bytes make.

Also here: what a user's machine may be like (a long TMPDIR, another `s2l run` at the same time).
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
import yaml

from s2l_ray.pipeline import STAGES
from s2l_ray.runtime.session import _without_core_notice

ROWS, COLUMNS = 200, 160
LINE = re.compile(rf"({'|'.join(['run', 's2l:', *(stage.name for stage in STAGES)])}) ")
FOREIGN = re.compile(r"Running Dataset|\(raylet\)|logging\.cc|Traceback|pid=|\bray\.|0/0|\[\d{4}-\d\d-\d\d ")
S2L = [sys.executable, "-c", "from s2l_ray.cli import main; main()"]


class Terminal:
    """A command on a terminal of its own. `frames`: the rows of the screen after whatever the command wrote at a time."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None, command: list[str] = S2L) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self.raw, self.frames = b"", [[""]]
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests in the background has it ignored
            ours = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "COLUMNS", "NO_COLOR")}
            os.execve(command[0], [*command, *map(str, arguments)], ours | {"TERM": "xterm-256color"} | (environment or {}))
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    @property
    def rows(self) -> list[str]:
        """What the screen shows now."""
        return [row.rstrip() for row in self.screen.display]

    def read(self) -> bool:
        """Show what the command writes next; False once it has ended."""
        try:
            written = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            written = b""
        self.raw += written
        self._stream.feed(written)
        self.frames.append(self.rows)
        return bool(written)

    def read_until(self, condition: Callable[[str], object]) -> None:
        """Read until a row fulfils the condition."""
        while not any(map(condition, self.rows)):
            assert self.read(), f"it ended before:\n{self.text}"

    def press_control_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def finish(self) -> int:
        """Read to the end; the exit code."""
        while self.read():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def text(self) -> str:
        return "\n".join(filter(None, self.rows))

    def check(self) -> None:
        """Nothing foreign at any time, one bar at a time, and at the end only log lines, each on a line of its own."""
        foreign = FOREIGN.search(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw.decode()))
        assert not foreign, f"{foreign}\n{self.text}"
        for rows in self.frames:
            assert sum("━" in row or "starting workers" in row for row in rows) <= 1, "\n".join(filter(None, rows))
        for before, row in itertools.pairwise(["", *filter(None, self.rows)]):
            assert LINE.match(row) or len(before) == COLUMNS, f"{row!r} in\n{self.text}"
            assert not re.search(r"━|starting workers", row), "the bar is gone at the end"


def write_config(folder: Path) -> Path:
    """A tiny run on one worker of one CPU, long enough to be interrupted in its training and its scoring."""
    words = ["".join(letters) for letters in itertools.product("abcdefg", repeat=3)]
    rows = [{"prompt": f"Say {word} twice: ", "response": f"{word} {word}"} for word in words]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"num_workers": 1, "cpus_per_worker": 1}
    model = {"scratch": {"layers": 2, "hidden": 64, "heads": 2, "max_positions": 128}}
    training = {"model": model, "epochs": 6, "global_batch_size": 4, "max_tokens": 64}
    values = {
        "name": "seen",
        "examples": {"dataset": str(folder / "corpus.jsonl"), "rows_per_part": 20},
        "proxy": {**training, "tokenizer": {"train": "bpe", "vocab_size": 300}, "num_checkpoints": 3},
        "selection": {"budget": 0.2},
        "target": training,
        "trajectories": {"tokens_per_batch": 1},  # one example per forward pass
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), one),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_shows_one_bar_at_a_time_and_nothing_foreign(tmp_path):
    arguments = ("run", write_config(tmp_path), "--run-dir", tmp_path / "run", "--until", "trajectories")
    for bar in (r"proxy .*━.* step \d", r"trajectories .*━.* unit \d"):
        terminal = Terminal(*arguments)
        terminal.read_until(re.compile(bar).match)
        terminal.press_control_c()
        assert terminal.finish() == 1, terminal.text
        terminal.check()
        assert terminal.text.splitlines()[-1] == "s2l: interrupted. The same command goes on where this one stopped."
        assert re.search("starting workers", terminal.raw.decode())
    terminal = Terminal(*arguments)
    assert terminal.finish() == 0, terminal.text
    terminal.check()
    assert re.search(r"^trajectories +finished in", terminal.text, re.MULTILINE)


# --- the machine as it is ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[subprocess.CompletedProcess[str]], Path]:
    """Two runs of one user at the same time, each with a Ray of its own; the second one under a long TMPDIR."""
    folder = tmp_path_factory.mktemp("two")
    config, long = write_config(folder), folder / ("l" * 120)
    ours = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    started = []
    for name, environment in (("first", ours), ("second", ours | {"TMPDIR": str(long)})):
        command = [*S2L, "run", str(config), "--run-dir", str(folder / name), "--until", "examples"]
        with (folder / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=300) for process in started]
    texts = [(folder / f"{name}.log").read_text() for name in ("first", "second")]
    return [subprocess.CompletedProcess((), code, text) for code, text in zip(codes, texts, strict=True)], long


def test_two_runs_of_one_user_at_the_same_time_both_finish_each_with_a_ray_of_its_own(two_runs):
    for done in two_runs[0]:
        assert done.returncode == 0, done.stdout
        assert re.search(r"^run +Ray: .* on 1 node", done.stdout, re.MULTILINE)
        assert re.search(r"^examples +finished in", done.stdout, re.MULTILINE)


def test_a_log_file_has_our_lines_and_nothing_foreign(two_runs):
    for done in two_runs[0]:
        assert not FOREIGN.search(done.stdout), done.stdout
        assert all(LINE.match(line) for line in done.stdout.splitlines()), done.stdout


def test_a_long_tmpdir_is_used_by_ray_whose_sockets_have_short_paths(two_runs):
    (_, done), long = two_runs
    assert done.returncode == 0, done.stdout
    assert list(long.glob("ray/session_*/logs/raylet.out")), "Ray wrote where the user wants it"
    assert not list(Path("/tmp").glob("s2l-*")), "the short path is gone"


# --- the bar alone -------------------------------------------------------------------------------------------------

BARS = """
import threading, time
from s2l_ray.progress import get_log, log_to_console, track
log_to_console()
with track("proxy", 0, "step") as bar:
    time.sleep(0.3)
    get_log("proxy").info("a line of [red]207[/red] letters " + 160 * "x")
    for step in range(1, 4):
        bar.at(step, 8, note=f"loss [{step}]")
        time.sleep(0.15)
    with track("trajectories", 5, "unit") as other:
        other.advance()
        get_log("trajectories").warning("two\\nlines")
        time.sleep(0.15)
get_log("proxy").info("the end")
"""


@pytest.fixture(scope="module")
def bars() -> Terminal:
    terminal = Terminal(command=[sys.executable, "-c", BARS])
    assert terminal.finish() == 0, terminal.text
    return terminal


def test_log_lines_stand_above_the_bar_as_they_are(bars):
    assert "".join(bars.rows).startswith("proxy         a line of [red]207[/red] letters " + 160 * "x")
    assert bars.text.splitlines()[-3:] == [
        "trajectories  WARNING: two",
        "trajectories  WARNING: lines",
        "proxy         the end",
    ]


def test_the_bar_shows_that_workers_start_and_then_how_far_they_are(bars):
    seen = [row for rows in bars.frames for row in rows if "━" in row]
    texts = list(dict.fromkeys(re.sub(r"^proxy +. [━╸╺]+ ", "", row) for row in seen))
    assert texts[0] == "starting workers"
    assert re.fullmatch(r"step 2/8 \(25\.0%\)  loss \[2\]  eta \d\.\ds", texts[2])
    assert not any(re.search(r"0/0", row) for row in seen)


def test_there_is_one_bar_at_a_time(bars):
    assert max(sum("━" in row for row in rows) for rows in bars.frames) == 1
    assert "unit 1/5" not in bars.raw.decode(), "a second one gives lines, ten seconds apart"
    assert "━" not in bars.text


def test_what_is_written_while_ray_starts_is_kept_but_for_the_notice_of_its_core(capfd):
    with _without_core_notice():
        os.write(2, b"[2026-11-28 05:26:23,769 I 1 1] logging.cc:303: Set ray log level from RAY_BACKEND_LOG_LEVEL to 3\n")
        sys.stderr.write("kept\n")
    sys.stderr.write("after\n")
    assert capfd.readouterr().err == "kept\nafter\n"


def test_the_message_of_an_interrupt_has_a_line_of_its_own_where_there_is_no_bar(tmp_path):
    wait = "import sys, time, s2l_ray.pipeline as p; p.run = lambda *_, **k: (sys.stderr.write('run begun\\n'), time.sleep(60))"
    terminal = Terminal("run", write_config(tmp_path), command=[*S2L[:2], f"{wait}; {S2L[2]}"])
    terminal.read_until(re.compile("run begun").match)
    terminal.press_control_c()
    assert terminal.finish() == 1
    terminal.check()
    assert terminal.text.splitlines() == ["run begun", "s2l: interrupted. The same command goes on where this one stopped."]
