"""What a user sees while a run goes on."""

from __future__ import annotations

import logging

import pytest

from s2l_ray import progress
from s2l_ray.progress import duration, get_log, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_one_line_every_ten_seconds(caplog, clock):
    caplog.set_level(logging.INFO, "s2l_ray")
    with track("trajectories", 100, "unit") as bar:
        for _ in range(50):
            clock[0] += 1
            bar.advance(note="fast")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert lines[-1] == "unit 50/100 (50.0%)  fast  eta 50.0s"


def test_the_eta_counts_neither_start_up_nor_what_an_earlier_run_did(caplog, clock):
    caplog.set_level(logging.INFO, "s2l_ray")
    with track("proxy", 0, "step") as bar:
        clock[0] += 100
        bar.at(60, total=100)
        clock[0] += 20
        bar.at(80, total=100)
    assert caplog.records[-1].getMessage() == "step 80/100 (80.0%)  eta 20.0s"


def test_log_lines_start_with_the_stage_and_name_their_level_if_it_is_a_warning():
    record = get_log("selection").makeRecord("s2l_ray.selection", logging.WARNING, "", 0, "less %s", ("budget",), None)
    assert progress._StageFormatter().format(record) == "selection     WARNING: less budget"


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2s"), (59.96, "60.0s"), (65, "1m 05s"), (5430, "1h 30m")])
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
