"""First readings of `s2l compare` on two uneven mixtures of real data: is S2L better than a random sample, and what is?

    python benchmarks/readings.py DATA_DIR WORK_DIR {mathematics,general} {pretrain,rates,compare} [--set section.field=value
    ...]

DATA_DIR holds JSON Lines files of `id, source, instruction, input, output`. `pretrain` trains tokenizer, proxy and target once
on text that is in neither the pool nor the held-out rows; `rates` trains a random subset at three learning rates and prints the
loss on the validation split, by which the rate of `compare` was chosen (see LOG.md, written before the first comparison);
`compare` runs or goes on with the comparison and copies its table and the cells' losses to `benchmarks/results/compare`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from s2l_ray.config import parse_config
from s2l_ray.pipeline import run
from s2l_ray.progress import log_to_console

HERE = Path(__file__).parent
HELD_OUT = 100
# Rows of the pool by file, falling as the sources of real mixtures do; each file gives its held-out and validation rows
# besides.
MIXTURES = {
    "mathematics": {
        "mathqa": 4000,
        "gsm8k": 2500,
        "math_hendrycks_test": 1200,
        "mawps": 700,
        "dolphin1878": 450,
        "svamp": 300,
        "draw1k": 220,
        "theoremqa": 160,
        "aqua": 120,
        "alg514": 100,
    },
    "general": {"dolly": 2400, "medquad": 1000, "pubmedqa": 500, "mts_dialog": 250, "dolphin1878": 120},
}
# What proxy and target have read before: disjoint from the mixture.
PRETRAINED_ON = {
    "mathematics": {"dolly": 3000, "medquad": 1500},
    "general": {"mathqa": 3000, "math_hendrycks_test": 2000, "gsm8k": 1500},
}
REASONING_GYM = (
    "basic_arithmetic",
    "simple_equations",
    "leg_counting",
    "sentence_reordering",
    "family_relationships",
    "syllogism",
)
SHAPES = {
    "proxy": {"architecture": "gpt_neox", "layers": 2, "hidden": 24, "heads": 2, "max_positions": 512, "tie_embeddings": True},
    "target": {
        "architecture": "gpt_neox",
        "layers": 4,
        "hidden": 192,
        "heads": 4,
        "max_positions": 512,
        "tie_embeddings": True,
    },
}
TRAINING = {"global_batch_size": 32, "max_tokens": 256, "lr_schedule": "cosine"}
TARGET = TRAINING | {"precision": "bfloat16", "zero_stage": 0}
RATES = (5.0e-4, 1.0e-3, 2.0e-3)
ARMS = [
    "random",
    "source_balanced",
    "source_matched",
    "source_and_length_matched",
    "s2l",
    "s2l_allocation_1",
    "s2l_profile",
    "s2l_inside_sources",
]
MACHINES: dict[str, Any] = {
    "proxy": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "trajectories": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "target": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "compare": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
}


def rows_of(data: Path, name: str, count: int) -> list[dict[str, Any]]:
    """So many rows of a file, by a hash of their ids; of GSM8K the training rows. `source` is the file's name."""
    rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    rows = [row for row in rows if name != "gsm8k" or row["split"] == "train"]
    rows.sort(key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())
    wanted = ("id", "instruction", "input", "output")
    return [{"source": name} | {field: row[field] for field in wanted} for row in rows[:count]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON Lines; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fields() -> dict[str, Any]:
    """How the files' rows are read."""
    template = {"prompt_template": "{instruction}\n{input}\n", "prompt_template_if_empty": "{instruction}\n"}
    return {"id_field": "id", "response_field": "output", "source_field": "source", **template}


def reasoning_rows() -> list[dict[str, Any]]:
    """Procedural tasks as rows."""
    import reasoning_gym

    found = []
    for task in REASONING_GYM:
        for place, entry in enumerate(reasoning_gym.create_dataset(task, seed=7, size=400)):
            row = {"instruction": entry["question"], "input": "", "output": str(entry["answer"])}
            found.append({"source": task, "id": f"{task}-{place}", **row})
    return found


def pretrain(data: Path, work: Path, mixture: str) -> None:
    """Train tokenizer, proxy and target on the other text, as a run whose subset is all of it."""
    rows = reasoning_rows()
    for name, count in PRETRAINED_ON[mixture].items():
        rows += rows_of(data, name, count)
    corpus = write(work / f"{mixture}-pretraining.jsonl", rows)
    values = {
        "name": f"{mixture}-pretraining",
        "examples": {"dataset": corpus, "held_out_fraction": 0.02, **fields()},
        "proxy": {
            "model": {"scratch": SHAPES["proxy"]},
            "tokenizer": {"train": "bpe", "vocab_size": 4096},
            "epochs": 3,
            "learning_rate": 3.0e-3,
            "num_checkpoints": 1,
            **TRAINING,
        },
        "clustering": {"num_clusters": 2, "stratify_by": None},
        "selection": {"budget": 1_000_000},
        "target": {"model": {"scratch": SHAPES["target"]}, "epochs": 3, "learning_rate": 2.0e-3, **TARGET},
        "machines": MACHINES,
    }
    run(parse_config(values), str(work / f"{mixture}-pretraining"), until="evaluation")


def config(data: Path, work: Path, mixture: str) -> dict[str, Any]:
    """The comparison's config."""
    rows = [row for name, count in MIXTURES[mixture].items() for row in rows_of(data, name, round(1.04 * count) + HELD_OUT)]
    pretrained = work / f"{mixture}-pretraining"
    checkpoint = max((pretrained / "proxy").glob("step-*"), default=None)
    if checkpoint is None:
        raise SystemExit(f"{pretrained}: no proxy there; `readings.py DATA_DIR WORK_DIR {mixture} pretrain` trains it")
    return {
        "name": mixture,
        "examples": {
            "dataset": write(work / f"{mixture}.jsonl", rows),
            "held_out_fraction": 0.0,
            "held_out_per_source": HELD_OUT,
            "validation_fraction": 0.04,
            **fields(),
        },
        "proxy": {
            "model": str(checkpoint),
            "tokenizer": str(pretrained / "proxy" / "tokenizer"),
            "epochs": 3,
            "learning_rate": 2.0e-3,
            "num_checkpoints": 8,
            "include_untrained": True,
            **TRAINING,
        },
        "trajectories": {"statistics": True},
        "clustering": {"num_clusters": 100, "stratify_by": None},
        "selection": {"budget": 0.1},
        "target": {
            "model": str(pretrained / "target" / "model"),
            "epochs": 2,
            "learning_rate": 2.0e-3,
            **TARGET,
        },
        "evaluation": {"max_generations": 0},
        "compare": {"arms": ARMS, "budgets": [0.1], "seeds": 8, "full_seeds": 1, "redo_from": "clustering"},
        "machines": MACHINES,
    }


def rates(values: dict[str, Any], place: Path) -> None:
    """Losses on the validation split of a random subset trained at three rates, two seeds each."""
    from s2l_ray.compare.stage import compare

    run(parse_config(values), str(place), until="trajectories")
    values["evaluation"] |= {"split": "validation"}
    values["compare"] |= {
        "arms": ["source_balanced"],
        "primary": "source_balanced",
        "seeds": 2,
        "full_seeds": 0,
        "redo_from": "target",
    }
    for rate in RATES:
        values["target"] |= {"learning_rate": rate}
        found = compare(parse_config(values), str(place.with_name(f"{place.name}-rate-{rate:g}")), reuse=str(place))
        print(rate, json.dumps(found.to_json()["rows"], indent=1))


def main() -> None:
    """Do one of the three steps."""
    from s2l_ray.compare.stage import compare
    from s2l_ray.config.parsing import apply_override

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("mixture", choices=MIXTURES)
    parser.add_argument("step", choices=("pretrain", "rates", "compare"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    log_to_console()
    if arguments.step == "pretrain":
        pretrain(arguments.data, arguments.work, arguments.mixture)
        return
    values, place = config(arguments.data, arguments.work, arguments.mixture), arguments.work / arguments.mixture
    for override in arguments.set:
        apply_override(values, override)
    if arguments.step == "rates":
        rates(values, place)
        return
    print(compare(parse_config(values), str(place)).text())
    results = HERE / "results" / "compare"
    results.mkdir(exist_ok=True)
    for name in ("table.json", "table.md"):
        shutil.copy(place / "compare" / name, results / f"{arguments.mixture}-{name}")


if __name__ == "__main__":
    main()
