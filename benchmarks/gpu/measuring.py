"""What every piece of the kit stands on: cells that are done once, checked before they are timed, within a number of minutes.

A piece is a list of *cells*, each a name and a function that returns numbers. What is done is in `RESULTS/PIECE.json`, with the
device, its driver, versions and commit; called again, a piece goes on with the cells that are missing. A result of another
commit or device is put aside, never mixed in.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Whose versions a result names.
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "pyarrow",
    "triton",
    "ray",
    "faiss-gpu",
    "faiss-cpu",
    "deepspeed",
)
Cell = Callable[[], dict[str, Any]]
AGAIN = 3
"""Exit code of a piece that has cells left: call it again."""


class WrongResultError(Exception):
    """What was computed is not what it should be; nothing was timed."""


@dataclass
class Kit:
    """How a piece is run: where results go, how large, for how long."""

    results: Path
    rehearse: bool
    minutes: float = 8.0
    data: str | None = None
    tokenizer: str | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> Any:
        """The GPU; the CPU in a rehearsal. Raises SystemExit where there is no GPU and nobody asked for a rehearsal."""
        import torch

        if self.rehearse:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise SystemExit("not run: torch sees no GPU here. `--rehearse` runs everything on the CPU at a tiny size.")
        return torch.device("cuda", 0)

    def size(self, whole: Any, tiny: Any) -> Any:
        """A size for the GPU, or for a rehearsal."""
        return tiny if self.rehearse else whole

    def run(self, piece: str, cells: dict[str, Cell]) -> int:
        """Run the cells that are missing and print the table. 0: all done; 1: a result is wrong; AGAIN: call again."""
        header = {"piece": piece, "rehearsal": self.rehearse} | machine(self.device)
        path = self.results / f"{piece}.json"
        record = self._earlier(path, header)
        longest, failed = 0.0, False
        for name, cell in cells.items():
            if name in record["cells"] and "wrong" not in record["cells"][name]:
                continue
            if time.monotonic() - self.begun + longest > 60 * self.minutes:
                break
            start = time.monotonic()
            try:
                found = cell()
            except WrongResultError as error:
                found, failed = {"wrong": str(error)}, True
            except Exception as error:  # noqa: BLE001 - the cells after it are measured all the same
                traceback.print_exc()
                found, failed = {"wrong": f"{type(error).__name__}: {error}"[:2000]}, True
            longest = max(longest, time.monotonic() - start)
            record["cells"][name] = found | {"cell_seconds": round(time.monotonic() - start, 2)}
            write_json(path, record)
            print(f"{piece} {name}: {words(found)}", flush=True)
        left = [name for name in cells if name not in record["cells"]]
        failed = failed or any("wrong" in record["cells"].get(name, {}) for name in cells)  # of an earlier call, not done again
        print(table(record["cells"]) + (f"\nleft: {', '.join(left)}. Call the same again." if left else ""), flush=True)
        return 1 if failed else AGAIN if left else 0

    def _earlier(self, path: Path, header: dict[str, Any]) -> dict[str, Any]:
        """What an earlier call with the same device, versions and commit has done."""
        empty: dict[str, Any] = header | {"cells": {}}
        if not path.exists():
            return empty
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = all(found.get(key) == header[key] for key in ("device", "commit", "versions", "rehearsal"))
        if same:
            return found
        shutil.move(path, path.with_name(f"{path.stem}-{found.get('commit')}-{int(path.stat().st_mtime)}.json"))
        return empty


def machine(device: Any) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    import torch

    name, driver, memory = f"{platform.machine()} CPU, {torch.get_num_threads()} threads", None, None
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _output(query)
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    commit = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    versions = found | {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {
        "device": name,
        "memory_bytes": memory,
        "driver": driver,
        "versions": versions,
        "commit": commit or os.environ.get("COMMIT"),
    }


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.rename(path)


def require(is_right: bool, what: str) -> None:
    """Raises WrongResultError with what is wrong."""
    if not is_right:
        raise WrongResultError(what)


def seconds_of(work: Callable[[], Any], device: Any, repeats: int = 3) -> float:
    """Median wall time of some work, the device's included; one call before, which is not timed."""
    import torch

    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def words(found: dict[str, Any]) -> str:
    """Numbers in one line."""
    shown = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The cells as a table, a line each."""
    width = max((len(name) for name in cells), default=0)
    return "\n".join(f"{name:{width}} | {words(found)}" for name, found in cells.items())


def use_package() -> None:
    """Read the package and the other benchmarks from this checkout, installed or not."""
    for path in (str(ROOT / "benchmarks"), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
