"""The whole pipeline on a mixture of mathematics files: what it cost and what came out, whatever it says.

    python benchmarks/mathematics_mixture.py DATA_DIR RUN_DIR

DATA_DIR holds the JSON Lines files named below, rows of `id, source, instruction, input, output`. GSM8K's test rows stay out of
the pool. The run resumes like any other; the summary goes to `benchmarks/results/mathematics_mixture.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from s2l_ray.config import load_config
from s2l_ray.pipeline import STAGES, run
from s2l_ray.progress import log_to_console
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage

HERE = Path(__file__).parent
FILES = ("gsm8k", "mathqa", "math_hendrycks_test", "aqua", "svamp", "mawps", "draw1k", "alg514", "dolphin1878", "theoremqa")
OVERRIDES = [
    "name=mathematics-mixture",
    "examples.id_field=id",
    'evaluation.answer_pattern="(?i)answer (?:is|:) *(.+)"',
]


def gather(data: Path, folder: Path) -> None:
    """Link the mixture's files into one folder; of GSM8K the training rows only."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (data / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    train = [line for line in lines if json.loads(line)["split"] == "train"]
    (folder / "gsm8k_train.jsonl").write_text("".join(f"{line}\n" for line in train), encoding="utf-8")
    for name in FILES[1:]:
        link = folder / f"{name}.jsonl"
        if not link.exists():
            link.symlink_to((data / f"{name}.jsonl").resolve())


def summarize(place: Storage) -> dict[str, object]:
    """Times, group sizes, sources and metrics of a finished run."""
    found = {stage.name: Artifact.read(place.child(stage.name)) for stage in STAGES}
    clustering, selection = found["clustering"].summary, found["selection"].summary
    sizes = sorted(clustering["sizes"])
    return {
        "provenance": {name: artifact.manifest["provenance"] for name, artifact in found.items()},
        "seconds": {name: artifact.manifest["provenance"]["seconds"] for name, artifact in found.items()},
        "examples": {key: found["examples"].summary[key] for key in ("rows", "pool", "held_out", "dropped")},
        "proxy": {key: found["proxy"].summary[key] for key in ("num_parameters", "tokens", "total_steps", "steps", "dropped")},
        "trajectories": {key: found["trajectories"].summary[key] for key in ("rows", "mean_losses", "tokens")},
        "clustering": {key: clustering[key] for key in ("num_clusters", "inertia", "explained_variance", "num_iterations")}
        | {"sizes": {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1], "all": clustering["sizes"]}},
        "selection": {key: selection[key] for key in ("rows", "pool", "sources", "num_response_tokens", "quotas")},
        "target": {key: found["target"].summary[key] for key in ("num_parameters", "total_steps", "tokens", "dropped")},
        "evaluation": json.loads(found["evaluation"].read_bytes("metrics.json")),
    }


def main(data: str, run_dir: str) -> None:
    """Run (or go on with) the pipeline and write the summary."""
    log_to_console()
    corpus = Path(run_dir).with_name(f"{Path(run_dir).name}-corpus")
    gather(Path(data), corpus)
    config = load_config(HERE.parent / "configs" / "jsonl-cpu.yaml", [*OVERRIDES, f"examples.dataset={corpus}"])
    run(config, run_dir)
    results = HERE / "results" / "mathematics_mixture.json"
    results.write_text(json.dumps(summarize(Storage(run_dir)), indent=1) + "\n", encoding="utf-8")
    print(results)


if __name__ == "__main__":
    main(*sys.argv[1:])
