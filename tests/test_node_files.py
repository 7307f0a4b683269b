"""Files of a node: written once for all its processes, whole or not at all, damaged never read, and their pages shared."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.errors import StorageError
from s2l_ray.runtime.nodes import PATIENCE_SECONDS, on_every_node
from s2l_ray.storage.node_files import ABANDONED_SECONDS, NodeFiles, is_whole, sealed
from s2l_ray.storage.places import Storage
from s2l_ray.training.token_rows import MappedRows

COLUMNS = ("tokens", "is_label")
NAME = "tokens"


def batches(number: int, rows: int, longest: int = 40) -> Iterator[pa.RecordBatch]:
    for seed in range(number):
        rng = np.random.default_rng(seed)
        starts = pa.array(np.cumsum([0, *rng.integers(2, longest, rows)]))
        ids = rng.integers(0, 50_000, starts[-1].as_py(), np.int32)
        lists = [pa.LargeListArray.from_arrays(starts, pa.array(values)) for values in (ids, ids % 3 == 0)]
        yield sealed(pa.record_batch(lists, COLUMNS, metadata={"number": str(seed)}))


def few() -> Iterator[pa.RecordBatch]:
    return batches(3, 50)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFiles:
    """Those of a run on a node whose disk is the test's folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return NodeFiles.of(Storage(str(tmp_path / "run")), "group")


def get(files: NodeFiles, **options: Any) -> list[pa.RecordBatch]:
    return files.get(NAME, few, **options)


def nothing() -> Iterator[pa.RecordBatch]:
    raise AssertionError("it was there already")


def test_batches_come_back_as_they_were_out_of_the_pages_of_the_file(files):
    for found, expected in zip(get(files), few(), strict=True):
        assert found.equals(expected, check_metadata=True)
        assert is_whole(found)
        assert not found["tokens"].values.to_numpy().flags.owndata
    before = pa.total_allocated_bytes()
    MappedRows(files.get(NAME, nothing, check=True))
    assert pa.total_allocated_bytes() == before


def test_a_batch_with_another_row_is_not_whole():
    one, other = list(batches(2, 5))
    assert not is_whole(one.replace_schema_metadata(other.schema.metadata))
    assert not is_whole(one.replace_schema_metadata(None))
    assert is_whole(one.slice(0, len(one)))


def test_of_several_at_once_one_writes_and_the_others_wait_for_it(files):
    made = []

    def slowly() -> Iterator[pa.RecordBatch]:
        made.append(True)
        for batch in few():
            time.sleep(0.05)
            yield batch

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: files.get(NAME, slowly), range(6)))
    assert len(made) == 1
    assert all(len(one) == 3 for one in found)


def test_a_process_killed_as_it_writes_leaves_nothing_that_is_read(files, tmp_path):
    code = f"""
import tempfile, time; tempfile.tempdir = {str(tmp_path)!r}
from tests.test_node_files import NAME, NodeFiles, few
def halfway():
    yield next(few())
    print("writing", flush=True)
    time.sleep(60)
NodeFiles({files.run!r}, {files.group!r}).get(NAME, halfway)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    assert files.find(NAME) is None
    writer.kill()
    writer.wait()
    assert [path.suffix for path in files.folder.iterdir()] == [".tmp"]
    assert [batch.equals(expected) for batch, expected in zip(get(files), few(), strict=True)] == [True] * 3
    assert [path.name for path in files.folder.iterdir()] == ["group-tokens"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_written_again(files, kept):
    get(files)
    path = files.folder / "group-tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    assert files.find(NAME) is None
    get(files)
    assert path.read_bytes() == whole


def test_a_file_with_a_flipped_bit_is_written_again_by_whoever_checks(files):
    [first, *_] = get(files)
    path = files.folder / "group-tokens"
    whole = path.read_bytes()
    token = first["tokens"].values.to_numpy()[7:9].tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(token)] ^= 1
    del first
    path.unlink()  # as no process of ours does it: who has mapped a file sees what is written into it
    path.write_bytes(damaged)
    found = files.find(NAME)
    assert found is not None
    assert [is_whole(batch) for batch in found] == [False, True, True]
    assert all(map(is_whole, get(files, check=True)))
    assert path.read_bytes() == whole


def test_wherever_a_byte_is_damaged_a_checked_file_is_the_one_that_was_written(files):
    expected = list(few())
    get(files)
    path = files.folder / "group-tokens"
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 150).astype(int).tolist():
        path.unlink()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = get(files, check=True)
        assert len(found) == 3
        assert all(one.equals(other, check_metadata=True) for one, other in zip(found, expected, strict=True))


def test_a_full_disk_is_named_and_leaves_nothing(files, monkeypatch):
    opened = pa.OSFile
    monkeypatch.setattr(pa, "OSFile", lambda path, mode: opened("/dev/full", mode))
    with pytest.raises(StorageError, match=rf"{files.folder} on .*: the disk is full\. Free some space"):
        get(files)
    assert list(files.folder.iterdir()) == []
    monkeypatch.setattr(pa, "OSFile", opened)
    assert len(get(files)) == 3


def test_a_run_removes_its_own_files_and_who_reads_them_goes_on(files, tmp_path, ray_session):
    other = NodeFiles.of(Storage(str(tmp_path / "other run")), "group")
    [first, *_], _ = get(files), get(other)
    on_every_node(files.delete)
    assert not files.folder.exists()
    assert files.find(NAME) is None
    assert is_whole(first)
    assert other.find(NAME) is not None


@pytest.mark.slow
def test_every_node_is_asked_and_one_that_is_lost_holds_up_nobody(files, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    def leave_a_mark() -> None:
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        on_every_node(leave_a_mark)
        assert {path.name for path in tmp_path.iterdir()} == {node["NodeID"] for node in ray.nodes()}
        cluster.remove_node(nodes[0], allow_graceful=False)
        begun = time.monotonic()
        on_every_node(leave_a_mark)
        assert time.monotonic() - begun < PATIENCE_SECONDS + 10
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_what_the_run_was_before_and_what_others_left_for_a_week_goes_when_a_file_is_written(files, tmp_path):
    old = NodeFiles(files.run, "before")
    abandoned, recent = (NodeFiles.of(Storage(str(tmp_path / name)), "group") for name in ("abandoned", "recent"))
    for one in (old, abandoned, recent):
        get(one)
    then = time.time() - ABANDONED_SECONDS - 60
    os.utime(abandoned.folder, (then, then))
    get(files)
    assert [path.name for path in files.folder.iterdir()] == ["group-tokens"]
    assert not abandoned.folder.exists()
    assert recent.find(NAME) is not None


WORKER = """
import sys, tempfile; tempfile.tempdir = sys.argv[1]
from s2l_ray.storage.node_files import NodeFiles
from s2l_ray.training.token_rows import MappedRows
from tests.test_node_files import NAME, nothing
def step(words):
    print(words, flush=True)
    sys.stdin.readline()
def read(name):
    rows = MappedRows(NodeFiles(sys.argv[2], sys.argv[3]).get(name, nothing))
    return sum(int(ids.sum()) + int(marks.sum()) for ids, marks in (rows[row] for row in range(len(rows))))
read("small")  # imports what reading takes
step("begun")
read(NAME)
step("read")
"""


def proportional_bytes(process: subprocess.Popen[bytes]) -> int:
    """Memory of a process, of a page that several share its part (smaps_rollup, in KiB there)."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@pytest.mark.skipif(sys.platform != "linux", reason="proportional set sizes are Linux's")
def test_a_second_worker_of_a_node_adds_next_to_nothing_to_the_tokens_in_memory(files, tmp_path):
    files.get(NAME, lambda: batches(8, 4_000, 600))
    files.get("small", few)
    size = (files.folder / "group-tokens").stat().st_size
    command = [sys.executable, "-c", WORKER, str(tmp_path), files.run, files.group]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]

    def next_step(worker: subprocess.Popen[bytes]) -> bytes:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
        return worker.stdout.readline()

    try:
        assert [worker.stdout.readline() for worker in workers if worker.stdout] == [b"begun\n"] * 2
        totals = [sum(map(proportional_bytes, workers))]
        for worker in workers:
            assert next_step(worker) == b"read\n"
            totals.append(sum(map(proportional_bytes, workers)))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    first, second = np.diff(totals)
    assert size > 30 * 2**20
    assert first > 0.9 * size, "the first has them in memory"
    assert second < 0.05 * size
