"""Globs: what Python's own module finds on a disk, and hidden files only where they are named."""

from __future__ import annotations

import glob as python
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2l_ray.storage.listing import files_below, is_glob, split_glob

NAMES = ("a", "b1", "ab", "c.parquet", "[x]")
PIECES = st.sampled_from(["*", "?", "a*", "[ab]*", "[!a]*", "*.parquet", "b?", "**", "a", "*1"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for first in NAMES:
        for second in NAMES:
            (root / f"{first}d" / f"{second}d").mkdir(parents=True, exist_ok=True)
            (root / f"{first}d" / second).touch()
            (root / f"{first}d" / f"{second}d" / "a1").touch()
        (root / first).touch()
    for hidden in (".part.crc", "_SUCCESS", "ad/_log", ".git/a"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).touch()
    return root


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(pieces=st.lists(PIECES, min_size=1, max_size=3))
def test_a_glob_finds_what_python_finds(tree, pieces):
    pattern = "/".join(pieces)
    found = [os.path.relpath(path, tree) for path in python.glob(f"{tree}/{pattern}", recursive=True) if os.path.isfile(path)]
    visible = {name for name in found if not any(part.startswith((".", "_")) for part in name.split("/"))}
    assert set(files_below(str(tree), pattern)) == visible


def test_hidden_files_are_found_where_the_glob_names_them(tree):
    assert set(files_below(str(tree), "_*")) == {"_SUCCESS"}
    assert set(files_below(str(tree), "**/_log")) == {"ad/_log"}
    assert ".git/a" not in files_below(str(tree))


def test_a_path_that_exists_is_no_glob(tree):
    assert is_glob(f"{tree}/*")
    assert not is_glob(f"{tree}/[x]")
    assert split_glob(f"{tree}/a*/b") == (str(tree), "a*/b")
    assert split_glob("*.parquet") == (".", "*.parquet")
    assert split_glob("s3://bucket/a/*") == ("s3://bucket/a", "*")
