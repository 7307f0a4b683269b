"""Trajectories: from anybody's Parquet to one checked value in the order of the ids."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from s2l_ray.errors import ArtifactError, ConfigError, DataError
from s2l_ray.storage.artifacts import Artifact, Key
from s2l_ray.storage.drafts import Draft
from s2l_ray.storage.places import Storage
from s2l_ray.trajectories import files as trajectory_files
from s2l_ray.trajectories.files import fetch_rows, read_trajectories
from s2l_ray.trajectories.loss_columns import losses_of, trajectories_table
from s2l_ray.trajectories.parts import files_identity, find_artifact
from s2l_ray.trajectories.store import Trajectories, TrajectoryStore

LOSSES = np.array([[3.0, 2.0], [2.5, 2.25], [4.0, 0.5], [1.0, 1.0]], np.float32)


def write(path: Path, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def content_identity(trajectories: Trajectories) -> str:
    with ThreadPoolExecutor(2) as pool:
        return TrajectoryStore.of(trajectories).identity(pool)


def fetched(uri: str, ids: list[Any], numbers: list[int]) -> dict[str, list[Any]]:
    tables = list(fetch_rows(uri, pa.array(ids), np.array(numbers)))
    rows = pa.concat_tables(tables)["row"].combine_chunks()
    return pa.Table.from_struct_array(rows).to_pydict()


def lists(losses: Any = LOSSES, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([list(map(float, row)) for row in losses], kind or pa.list_(pa.float64()))


def finished_run(tmp_path: Path, num_rows: int = 7) -> Artifact:
    draft = Draft.open(Storage(str(tmp_path)), Key("trajectories", 1, {"precision": "float32"}, {}))
    losses = np.arange(num_rows * 2, dtype=np.float32).reshape(-1, 2)
    ids = [f"id-{row}" for row in range(num_rows)]
    for part, rows in enumerate((slice(0, 4), slice(4, None))):
        tokens = np.arange(num_rows)[rows]
        table = trajectories_table(ids[rows], losses[rows], ["web"] * len(tokens), tokens)
        draft.write_table(f"part-{part:05d}.parquet", table)
    return draft.publish({"rows": num_rows})


def test_rows_come_in_the_order_of_their_ids_bytewise() -> None:
    trajectories = Trajectories.of(
        LOSSES, ["b", "é", "B", "a"], sources=["s1", "s2", "s3", "s4"], num_response_tokens=[1, 2, 3, 4]
    )
    assert trajectories.example_ids.to_pylist() == ["B", "a", "b", "é"]
    assert trajectories.losses_NT.tolist() == [[4.0, 0.5], [1.0, 1.0], [3.0, 2.0], [2.5, 2.25]]
    assert trajectories.sources.to_pylist() == ["s3", "s4", "s1", "s2"]
    assert trajectories.num_response_tokens_N.tolist() == [3, 4, 1, 2]


def test_ids_are_row_numbers_unless_given() -> None:
    assert Trajectories.of([[1, 2], [3, 4]]).example_ids.to_pylist() == [0, 1]


@pytest.mark.parametrize("form", [list, tuple, lambda x: list(map(tuple, x)), lambda x: pd.Series(list(x)), pd.DataFrame])
def test_losses_may_be_lists_arrays_or_pandas(form: Any) -> None:
    assert np.array_equal(Trajectories.of(form(LOSSES)).losses_NT, LOSSES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, None])
def test_a_loss_that_is_no_number_names_its_example(bad: float | None) -> None:
    losses = LOSSES.tolist()
    losses[2][1] = bad
    with pytest.raises(DataError, match="example_id 'c'"):
        Trajectories.of(losses, list("abcd"))


def test_many_bad_examples_are_named_a_few_and_then_counted() -> None:
    losses = np.full((100, 3), np.nan)
    with pytest.raises(DataError, match=r"example_id 0, 1, 2, 3, 4 and 95 more"):
        Trajectories.of(losses)


def test_ragged_losses_name_the_odd_examples() -> None:
    with pytest.raises(DataError, match=r"Others have 2 values.*\(3, say\) for example_id 'c', 'd'"):
        Trajectories.of([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0], [1.0]], list("abcd"))


def test_duplicate_ids_are_named() -> None:
    with pytest.raises(DataError, match="more than once: 'a', 'b'"):
        Trajectories.of(LOSSES, ["b", "a", "b", "a"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"example_ids": [1.5, 2.0, 3.0, 4.0]}, "'example_id' is double, expected string or integer"),
        ({"example_ids": ["a", None, "b", "c"]}, "example_id is missing in 1 rows"),
        ({"example_ids": ["a", "b"]}, "2 values of example_id for 4 trajectories"),
        ({"losses": [1.0, 2.0, 3.0, 4.0]}, "'losses' is double, expected lists of floats"),
        ({"losses": [[], [], [], []]}, "losses"),
        ({"losses": []}, "no rows|losses"),
        ({"num_response_tokens": [1.0, 2.0, 3.0, 4.0]}, "'num_response_tokens' is double, expected integers"),
        ({"num_response_tokens": [1, -2, 3, 4]}, "negative or too large for example_id 1"),
        ({"sources": [[1], [2], [3], [4]]}, "'source' is list"),
        ({"sources": ["web"]}, "1 values of source for 4 trajectories"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_was_expected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Trajectories.of(**({"losses": LOSSES} | changed))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.float64(), 2),
        pa.list_(pa.float16()),
    ],
    ids=str,
)
@pytest.mark.parametrize("id_kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_kind_of_list_and_string_reads_the_same(tmp_path: Path, kind: pa.DataType, id_kind: pa.DataType) -> None:
    half = [row.astype(np.float16) for row in LOSSES]
    losses = pa.array(half, kind) if kind == pa.list_(pa.float16()) else lists(kind=kind)
    uri = write(tmp_path / "t.parquet", losses=losses, example_id=pa.array(list("dcba")).cast(id_kind))
    found = read_trajectories(uri)
    assert found.example_ids.equals(pa.array(list("abcd")))
    assert np.array_equal(found.losses_NT, LOSSES[::-1])


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.uint64()], ids=str)
def test_integer_ids_of_any_width_sort_as_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    uri = write(tmp_path / "t.parquet", losses=lists(), example_id=pa.array([100, 9, 20, 1], kind))
    assert read_trajectories(uri).example_ids.equals(pa.array([1, 9, 20, 100], pa.int64()))


def test_what_pandas_wrote_reads(tmp_path: Path) -> None:
    frame = pd.DataFrame({"example_id": [3, 1, 2, 0], "losses": list(LOSSES), "source": pd.Categorical(["x", "y", "x", "y"])})
    frame.to_parquet(tmp_path / "t.parquet")
    found = read_trajectories(str(tmp_path / "t.parquet"))
    assert np.array_equal(found.losses_NT, LOSSES[[3, 1, 2, 0]])
    assert found.sources.to_pylist() == ["y", "y", "x", "x"]


def test_a_file_a_directory_a_glob_and_a_uri_give_the_same(tmp_path: Path) -> None:
    for part in range(4):
        write(
            tmp_path / "parts" / f"day={part % 2}" / f"{part}.parquet", losses=lists(LOSSES[part : part + 1]), example_id=[part]
        )
    (tmp_path / "parts" / "_SUCCESS").touch()
    whole = write(tmp_path / "whole.parquet", losses=lists(), example_id=[0, 1, 2, 3])
    parts = tmp_path / "parts"
    uris = [whole, str(parts), f"{parts}/", f"{parts}/**/*.parquet", f"{parts}/day=?/[0-9].par*", f"file://{parts}"]
    assert len({content_identity(read_trajectories(uri)) for uri in uris}) == 1
    assert read_trajectories(f"{parts}/day=1/*").example_ids.to_pylist() == [1, 3]


def test_object_storage_reads_like_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        filesystem = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        filesystem.create_dir("trajectory-store")
        for part in range(3):
            local = write(tmp_path / f"{part}.parquet", losses=lists(LOSSES[part : part + 1]), example_id=[part])
            with filesystem.open_output_stream(f"trajectory-store/parts/{part}.parquet") as stream:
                stream.write(Path(local).read_bytes())
        found = read_trajectories("s3://trajectory-store/parts")
        assert content_identity(found) == content_identity(read_trajectories(str(tmp_path)))
        assert read_trajectories("s3://trajectory-store/*/[12].parquet").example_ids.to_pylist() == [1, 2]
        assert fetched("s3://trajectory-store/parts", [2], [2]) == {"example_id": [2]}
        with pytest.raises(DataError, match="nowhere: no such file or directory"):
            read_trajectories("s3://trajectory-store/nowhere")
    finally:
        server.stop()


def test_identity_is_that_of_the_content() -> None:
    base = {"losses": LOSSES, "example_ids": list("abcd"), "sources": list("xxyy"), "num_response_tokens": [1, 2, 3, 4]}
    order = [2, 0, 3, 1]
    shuffled = {name: [values[row] for row in order] for name, values in base.items()}
    assert content_identity(Trajectories.of(**base)) == content_identity(Trajectories.of(**shuffled))
    changes: list[dict[str, Any]] = [
        {"losses": LOSSES + np.float32(2**-20)},
        {"example_ids": list("abce")},
        {"sources": list("xxxy")},
        {"sources": None},
        {"num_response_tokens": [1, 2, 3, 5]},
        {"columns": {"day": list("1122")}},
    ]
    assert len({content_identity(Trajectories.of(**(base | change))) for change in [{}, *changes]}) == len(changes) + 1


def test_a_missing_source_gets_a_name(tmp_path: Path) -> None:
    uri = write(tmp_path / "t.parquet", losses=lists(), example_id=[0, 1, 2, 3], source=["x", None, "y", None])
    assert read_trajectories(uri).sources.to_pylist() == ["x", "(none)", "y", "(none)"]


def test_a_column_to_stratify_by_is_read_and_an_unknown_one_is_refused_with_the_known(tmp_path: Path) -> None:
    uri = write(tmp_path / "t.parquet", losses=lists(), example_id=[0, 1, 2, 3], level=[5, 5, 6, 6])
    assert read_trajectories(uri, stratify_by="level").columns["level"].to_pylist() == ["5", "5", "6", "6"]
    with pytest.raises(ConfigError, match=r"no column 'levle'.*Known: losses, example_id, level"):
        read_trajectories(uri, stratify_by="levle")
    with pytest.raises(ConfigError, match=r"clustering.stratify_by: no column 'topic'.*Known: source"):
        TrajectoryStore.of(Trajectories.of(LOSSES, sources=list("xxyy"))).names_of("topic")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.parquet: no such file"):
        read_trajectories(str(tmp_path / "nowhere.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no Parquet files"):
        read_trajectories(str(tmp_path / "empty"))
    (tmp_path / "text.parquet").write_text("example_id,losses\n")
    with pytest.raises(DataError, match=r"text.parquet: cannot be read as Parquet"):
        read_trajectories(str(tmp_path / "text.parquet"))
    write(tmp_path / "parts" / "0.parquet", losses=lists(), example_id=[0, 1, 2, 3])
    damaged = tmp_path / "parts" / "1.parquet"
    write(damaged, losses=lists(), example_id=[4, 5, 6, 7])
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"parts/1.parquet: cannot be read as Parquet"):
        read_trajectories(str(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"example_id": [0, 1, 2, 3]}, r"'losses' is missing \(columns: example_id\)"),
        ({"losses": lists()}, "'example_id' is missing"),
        ({"losses": pa.array([[1], [2], [3], [4]]), "example_id": [0, 1, 2, 3]}, r"'losses' is list<.*int64>"),
        ({"losses": lists(), "example_id": pa.array([0.0, 1.0, 2.0, 3.0])}, "'example_id' is double"),
        ({"losses": lists([]), "example_id": pa.array([], pa.int64())}, "no rows"),
        ({"losses": pa.array([[1.0, 2.0], None]), "example_id": ["a", "b"]}, "losses are missing for example_id 'b'"),
        ({"losses": pa.array([[1.0, 2.0], [1.0]]), "example_id": ["a", "b"]}, "ragged.*for example_id 'b'"),
        ({"losses": pa.array([[1.0, 2.0], [1.0, None]]), "example_id": ["a", "b"]}, "missing.*for example_id 'b'"),
        ({"losses": lists(), "example_id": [0, 1, 1, 3]}, "more than once: 1"),
    ],
)
def test_bad_columns_are_named_with_the_file(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"t.parquet: .*{message}"):
        read_trajectories(write(tmp_path / "t.parquet", **columns))


def test_parts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", losses=lists(), example_id=[0, 1, 2, 3])
    write(tmp_path / "1.parquet", losses=lists([[1.0, 2.0, 3.0]]), example_id=[4])
    with pytest.raises(DataError, match=r"1.parquet: losses are ragged.*example_id 4"):
        read_trajectories(str(tmp_path))
    write(tmp_path / "1.parquet", losses=lists(), example_id=list("abcd"))
    with pytest.raises(DataError, match=r"1.parquet: has example_id: string, but .*0.parquet has example_id: int64"):
        read_trajectories(str(tmp_path))
    write(tmp_path / "1.parquet", losses=lists(), example_id=[6, 3, 7, 8])
    with pytest.raises(DataError, match="more than once: 3"):
        read_trajectories(str(tmp_path))


def test_a_runs_own_parts_have_the_contracts_schema_and_read_back(tmp_path: Path) -> None:
    artifact = finished_run(tmp_path)
    schema = artifact.read_table("part-00000.parquet").schema
    assert [(f.name, str(f.type).replace("element", "item")) for f in schema] == [
        ("example_id", "string"),
        ("source", "string"),
        ("losses", "fixed_size_list<item: float>[2]"),
        ("num_response_tokens", "int32"),
    ]
    loaded = read_trajectories(artifact)
    assert loaded.num_response_tokens_N.tolist() == list(range(7))
    assert np.array_equal(losses_of(artifact.read_table("part-00001.parquet")), loaded.losses_NT[4:])
    read = read_trajectories(str(tmp_path / "trajectories"))
    assert content_identity(read) == content_identity(loaded)
    assert find_artifact(str(tmp_path / "trajectories")).identity == artifact.identity


def test_a_part_without_rows_is_a_part() -> None:
    table = trajectories_table(pa.array([], pa.string()), np.empty((0, 3), np.float32), pa.array([], pa.string()), [])
    assert losses_of(table).shape == (0, 3)


def test_a_damaged_unfinished_or_wrong_run_directory_is_refused(tmp_path: Path) -> None:
    artifact = finished_run(tmp_path)
    part = tmp_path / "trajectories" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"part-00001.parquet: damaged"):
        read_trajectories(artifact.root.uri)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"looks like a run: give .*/trajectories"):
        read_trajectories(str(tmp_path / "run"))
    Draft.open(Storage(str(tmp_path / "other")), Key("trajectories", 1, {}, {}))
    with pytest.raises(ArtifactError, match="unfinished"):
        read_trajectories(str(tmp_path / "other" / "trajectories"))
    manifest = tmp_path / "trajectories" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"stage": "examples"}))
    with pytest.raises(ArtifactError, match="holds the stage 'examples'"):
        read_trajectories(artifact.root.uri)


def test_fetched_rows_are_the_corpus_columns_in_the_order_of_the_files(tmp_path: Path) -> None:
    meta = pa.array([{"k": row} for row in range(4)])
    tags = pa.array(["x", None, "y", "x"]).dictionary_encode()
    write(tmp_path / "a.parquet", text=list("ABCD"), losses=lists(), example_id=list("dbca"), meta=meta, tag=tags)
    pq.write_table(
        pa.table({"losses": lists(), "example_id": list("hgfe"), "text": list("EFGH"), "meta": meta}),
        tmp_path / "b.parquet",
        row_group_size=1,
    )
    assert fetched(str(tmp_path), ["a", "b", "f", "g"], [3, 1, 6, 5]) == {
        "text": ["B", "D", "F", "G"],
        "example_id": ["b", "a", "g", "f"],
        "meta": [{"k": 1}, {"k": 3}, {"k": 1}, {"k": 2}],
        "tag": [None, "x", None, None],
    }
    for ids, numbers in ((["a", "zz"], [3, 5]), (["a"], [8])):
        with pytest.raises(DataError, match="changed while it was read"):
            fetched(str(tmp_path), ids, numbers)


def test_clustering_and_selection_need_neither_torch_nor_ray() -> None:
    code = "import sys, s2l_ray.selection.stage; print({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_columns_that_only_folders_name_are_read_and_passed_through(tmp_path: Path) -> None:
    table = pa.table({"example_id": list("abcd"), "losses": lists(), "source": ["web", "a/b", "web", "a/b"]})
    pq.write_to_dataset(table, tmp_path, partition_cols=["source"])
    found = read_trajectories(str(tmp_path), stratify_by="source")
    assert found.sources.to_pylist() == ["web", "a/b", "web", "a/b"]
    assert fetched(str(tmp_path), ["b"], [0]) == {"example_id": ["b"], "source": ["a/b"]}


def test_results_inside_the_input_folder_are_not_input(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", losses=lists(), example_id=[0, 1, 2, 3])
    for stage, name in (("clustering", "manifest.json"), ("selection", "building.json")):
        write(tmp_path / "out" / stage / "assignments-00000.parquet", example_id=[0])
        (tmp_path / "out" / stage / name).write_text("{}")
    assert len(read_trajectories(str(tmp_path))) == 4


def test_other_texts_of_the_same_size_are_other_files(tmp_path: Path) -> None:
    uri = write(tmp_path / "t.parquet", losses=lists(), example_id=[0, 1, 2, 3], text=["aaaa"] * 4)
    before, size = files_identity(uri), (tmp_path / "t.parquet").stat().st_size
    write(tmp_path / "t.parquet", losses=lists(), example_id=[0, 1, 2, 3], text=["bbbb"] * 4)
    assert (tmp_path / "t.parquet").stat().st_size == size
    assert files_identity(uri) != before


def test_views_are_passed_through_as_strings(tmp_path: Path) -> None:
    text = pa.array(["a text longer than twelve bytes", "b", None, "d"], pa.string_view())
    uri = write(tmp_path / "t.parquet", losses=lists(), example_id=pa.array(list("dcba"), pa.string_view()), text=text)
    assert fetched(uri, ["a", "d"], [3, 0]) == {"example_id": ["d", "a"], "text": ["a text longer than twelve bytes", "d"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"num_response_tokens": pa.array([1, 2, 3, 2**63], pa.uint64())}, "too large for example_id 3"),
        ({"example_id": pa.array([b"a", b"b", b"c", b"\xff"]).view(pa.string())}, "not UTF-8"),
    ],
)
def test_numbers_and_ids_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_trajectories(write(tmp_path / "t.parquet", **({"losses": lists(), "example_id": [0, 1, 2, 3]} | columns)))


def test_a_part_that_vanishes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        write(tmp_path / f"{part}.parquet", losses=lists(), example_id=[4 * part, 4 * part + 1, 4 * part + 2, 4 * part + 3])
    checked = trajectory_files._checked_columns

    def and_then_gone(*arguments: Any) -> pa.Table:
        (tmp_path / "2.parquet").unlink(missing_ok=True)
        return checked(*arguments)

    monkeypatch.setattr(trajectory_files, "_checked_columns", and_then_gone)
    with pytest.raises(DataError, match=r"2.parquet: cannot be read"):
        read_trajectories(str(tmp_path))


def test_a_column_that_occurs_twice_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table(
        [pa.array(["a"]), pa.array([[1.0, 2.0]]), pa.array([1]), pa.array([2])], ["example_id", "losses", "x", "x"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'x' occurs more than once"):
        read_trajectories(str(tmp_path / "t.parquet"))
