"""The kit for a borrowed GPU: pieces that resume, wheels in parts, no Ray where none is, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"
ALONE = ("losses", "scoring", "training", "kmeans")
BLOCKED = """
import importlib.util
import sys
names = {"ray", "faiss", "deepspeed", "datasets", "reasoning_gym", "orjson", "plotly", "typer"}
find_spec = importlib.util.find_spec
def found(name, package=None):
    return None if name.partition(".")[0] in names else find_spec(name, package)
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
importlib.util.find_spec = found  # libraries ask it what there is
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the pieces stand on."""
    monkeypatch.syspath_prepend(str(KIT))
    import measuring

    return measuring


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that packs wheels, with parts of 100 bytes."""
    monkeypatch.syspath_prepend(str(KIT))
    import packing

    monkeypatch.setattr(packing, "PART_BYTES", 100)
    return packing


def wheels_in(folder: Path) -> list[Path]:
    """Wheels of 250, 100 and 3 bytes."""
    folder.mkdir()
    for name, size in (("a.whl", 250), ("b.whl", 100), ("c.whl", 3)):
        (folder / name).write_bytes(bytes(range(size)))
    return sorted(folder.iterdir())


def test_wheels_arrive_in_parts_and_are_the_same(packing: ModuleType, tmp_path: Path) -> None:
    wheels = wheels_in(tmp_path / "from")
    files = packing.cut(wheels, tmp_path)
    calls = packing.calls(files)
    sizes = [[(tmp_path / name).stat().st_size for name in call] for call in calls]
    assert all(sum(call) <= 100 for call in sizes)
    assert sum(map(sum, sizes)) == 353
    assert [wheel.read_bytes() for wheel in packing.joined(tmp_path)] == [wheel.read_bytes() for wheel in wheels]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_part_that_did_not_arrive_whole_is_named(packing: ModuleType, tmp_path: Path, damage: str) -> None:
    packing.cut(wheels_in(tmp_path / "from"), tmp_path)
    part = tmp_path / "a.whl.part01"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(bytes(100))
    with pytest.raises(SystemExit, match=r"a\.whl\.part01"):
        packing.joined(tmp_path)


def test_a_folder_without_a_manifest_is_named(packing: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no manifest"):
        packing.joined(tmp_path)


def test_a_piece_goes_on_with_the_cells_that_are_missing(kit: ModuleType, tmp_path: Path) -> None:
    called: list[str] = []

    def cell(name: str) -> dict[str, Any]:
        called.append(name)
        return {"value": len(called)}

    cells = {name: lambda name=name: cell(name) for name in ("one", "two")}
    assert kit.Kit(tmp_path, True, minutes=8).run("piece", {"one": cells["one"]}) == 0
    assert kit.Kit(tmp_path, True, minutes=-1).run("piece", cells) == kit.AGAIN
    assert kit.Kit(tmp_path, True, minutes=8).run("piece", cells) == 0
    assert called == ["one", "two"]
    record = json.loads((tmp_path / "piece.json").read_text())
    assert {"device", "driver", "versions", "commit"} <= record.keys()
    assert [record["cells"][name]["value"] for name in ("one", "two")] == [1, 2]


def test_a_wrong_result_is_said_and_measured_again(kit: ModuleType, tmp_path: Path) -> None:
    def wrong() -> dict[str, Any]:
        kit.require(False, "losses differ")
        return {}

    assert kit.Kit(tmp_path, True).run("piece", {"one": wrong}) == 1
    assert json.loads((tmp_path / "piece.json").read_text())["cells"]["one"]["wrong"] == "losses differ"
    assert kit.Kit(tmp_path, True).run("piece", {"one": lambda: {"value": 1}}) == 0


def test_results_of_another_commit_are_put_aside(kit: ModuleType, tmp_path: Path) -> None:
    kit.Kit(tmp_path, True).run("piece", {"one": lambda: {"value": 1}})
    record = json.loads((tmp_path / "piece.json").read_text())
    (tmp_path / "piece.json").write_text(json.dumps(record | {"commit": "another"}))
    assert kit.Kit(tmp_path, True).run("piece", {"one": lambda: {"value": 2}}) == 0
    assert json.loads((tmp_path / "piece.json").read_text())["cells"]["one"]["value"] == 2
    assert len(list(tmp_path.glob("piece-another-*.json"))) == 1


def run_kit(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The kit in a process of its own, which sees no GPU, after some code."""
    called = [str(KIT / "kit.py"), *arguments]
    code += f"\nimport runpy, sys\nsys.argv = {called!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_without_a_gpu_a_piece_says_that_it_was_not_run(tmp_path: Path) -> None:
    done = run_kit("", "kmeans", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "not run: torch sees no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_torch_transformers_and_what_tier_a_brings_are_enough(packing: ModuleType, tmp_path: Path) -> None:
    assert any(name.startswith("pydantic==") for name in packing.TIERS["a"])  # the machine has none
    done = run_kit(BLOCKED, "kmeans", "--rehearse", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    modules = f"sys.path.insert(0, {str(KIT)!r})\n" + "".join(f"import piece_{name}\n" for name in ALONE)
    imported = subprocess.run([sys.executable, "-c", BLOCKED + modules], capture_output=True, text=True, check=False)
    assert imported.returncode == 0, imported.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("piece", [*ALONE, "faiss", "run", "tests"])
def test_every_piece_is_rehearsed_on_the_cpu(piece: str, tmp_path: Path) -> None:
    done = run_kit(BLOCKED if piece in ALONE else "", piece, "--rehearse", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / f"{piece}.json").read_text())
    assert record["rehearsal"]
    assert record["cells"]
    assert not any("wrong" in cell for cell in record["cells"].values())
