"""The shell's completion of `--set`: the real protocol of bash, zsh and fish, and a real bash."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from s2l_ray.config.completion import settings
from s2l_ray.config.methods import Method

METHODS = get_args(Method)
S2L = [sys.executable, "-c", "from s2l_ray.cli import main; main()"]


def complete(shell: str, command: str, **environment: str) -> list[str]:
    """What the shell is offered for a command that it is in the middle of."""
    ours = {**os.environ, "_S2L_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": command, **environment}
    done = subprocess.run(S2L, env=ours, capture_output=True, text=True, check=False, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def complete_bash(*words: str) -> list[str]:
    return complete("bash", "", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))


# --- what is offered -----------------------------------------------------------------------------------------------


def names(typed: str) -> list[str]:
    return [name for name, _ in settings(typed)]


def test_sections_come_first_and_one_that_is_left_opens():
    assert {"examples.", "proxy.", "clustering.", "name=", "trackers="} <= set(names(""))
    assert {"examples.dataset=", "examples.messages_field="} <= set(names("exam"))
    assert names("exam") == names("examples.")


def test_a_section_inside_a_section_is_reached():
    assert {"machines.proxy.num_workers=", "machines.proxy.device_batch_size="} <= set(names("machines.proxy."))
    assert "proxy.model.scratch.hidden=" in names("proxy.model.scratch.h")
    assert {"proxy.model=", "proxy.model."} == set(names("proxy.model"))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("selection.method=s", [f"selection.method={name}" for name in METHODS if name.startswith("s")]),
        ("clustering.features=r", ["clustering.features=raw", "clustering.features=reduction"]),
        ("target.zero_stage=", [f"target.zero_stage={stage}" for stage in range(4)]),
        ("evaluation.random_control=", ["evaluation.random_control=true", "evaluation.random_control=false"]),
        ("machines.proxy.num_workers=", ["machines.proxy.num_workers=auto"]),
        ("trackers=[m", ["trackers=[mlflow]"]),
        ("examples.dataset=", []),
        ("no_such.", []),
        ("no.such.key=", []),
        ("=", []),
    ],
)
def test_values_that_can_be_listed_are(typed, offered):
    assert names(typed) == offered


def test_the_last_key_is_offered_with_what_it_takes_so_that_no_space_follows():
    assert names("selection.budg") == ["selection.budget=", "selection.budget=INTEGER|NUMBER"]
    assert names("clustering.eng") == []
    assert names("selection.meth") == ["selection.method=", *(f"selection.method={name}" for name in METHODS)]


def test_help_is_one_short_line():
    lines = [text for section in ("", "examples.", "target.", "machines.proxy.") for _, text in settings(section)]
    assert all(len(text) <= 60 and "\n" not in text and "[" not in text for text in lines)
    assert any(lines)


# --- the shells ----------------------------------------------------------------------------------------------------


def test_bash_completes_keys_and_values():
    assert "examples.dataset=" in complete_bash("s2l", "run", "quickstart", "--set", "examples.d")
    assert "clustering.num_clusters=" in complete_bash("s2l", "plan", "--set", "clustering.")


def test_bash_completes_values_although_it_cuts_words_at_equals():
    before = ("s2l", "run", "quickstart", "--set", "clustering.features", "=")
    assert complete_bash(*before) == ["raw", "reduction", "shape", "whitened", "profile"]
    assert complete_bash(*before, "r") == ["raw", "reduction"]


def test_bash_completes_commands_still():
    assert complete_bash("s2l", "in") == ["init"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_keys(shell):
    offered = "\n".join(complete(shell, "s2l run quickstart --set selection.m", _TYPER_COMPLETE_FISH_ACTION="get-args"))
    assert "selection.method=" in offered
    assert "selection.min_per_source=" in offered
    assert "selection.budget" not in offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_real_bash_completes_and_puts_no_space_behind_equals(tmp_path):
    command = tmp_path / "s2l"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from s2l_ray.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    with contextlib.closing(Bash(tmp_path)) as bash:
        bash.type('eval "$(_S2L_COMPLETE=source_bash s2l)"; echo rea""dy\n', "ready")
        bash.type("s2l run quickstart --set selection.bud\t", "selection.budget=")
        bash.type("0.1 --set clustering.tr\t", "0.1 --set clustering.training_rows=")
        bash.type("null --set selection.meth\t", "selection.method=")
        bash.type("s2\t", "s2l ")


class Bash:
    """An interactive bash on a terminal of its own."""

    def __init__(self, path: Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"PATH": f"{path}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb", "COLUMNS": "200"}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def type(self, text: str, expected: str, seconds: float = 60) -> None:
        """Type, and read until what is expected has been shown."""
        os.write(self._terminal, text.encode())
        shown, end = "", time.monotonic() + seconds
        while expected not in shown.replace("\x07", ""):
            assert time.monotonic() < end, repr(shown)
            if select.select([self._terminal], [], [], 0.1)[0]:
                shown += os.read(self._terminal, 65536).decode()

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # what is typed behind an interrupt may be lost
        os.waitpid(self.pid, 0)
        os.close(self._terminal)
