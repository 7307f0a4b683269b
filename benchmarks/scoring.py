"""Recording at full size: training, Ray Data, memory, and what bfloat16 does to losses and groups.

    python benchmarks/scoring.py train --data 'rows/*.jsonl' --tokenizer tokenizer.json
    python benchmarks/scoring.py actors --data 'rows/*.jsonl' --tokenizer tokenizer.json
    python benchmarks/scoring.py recording --data 'rows/*.jsonl' --tokenizer tokenizer.json
    python benchmarks/scoring.py million --work /tmp/million
    python benchmarks/scoring.py bfloat16 --run RUN_DIR
    python benchmarks/scoring.py statistics --data 'rows/*.jsonl' --tokenizer tokenizer.json

`train`: tokens per second beside transformers' Trainer as it comes, Pythia-70M's shape. `actors`: two Ray Data actors beside
one process with two threads, start-up taken off. `recording`: wall time of a run's `trajectories` over that of its `proxy`.
`million`: `s2l run` to `trajectories` on short examples with four checkpoints
of a tiny proxy; the largest process, the time, and four passes for one. `bfloat16`: the checkpoints of a finished run scored
in both precisions. `statistics`: rows scored with and without `trajectories.statistics`, in turns. Scoring itself beside the
one-by-one loop: `gpu_scoring.py`. Every run adds a line to `results/scoring/MEASURE.jsonl`.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from gpu_scoring import SHAPES, make_models, real_rows

from s2l_ray.runtime.process import keep_freed_memory
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance
from s2l_ray.training.flops import matmul_flops_per_second

RESULTS = Path(__file__).parent / "results" / "scoring"
Row = dict[str, Any]


def keep(measure: str, result: Row) -> None:
    """Say a result and add it to the measure's file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{measure}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result | provenance()) + "\n")
    print(json.dumps(result, indent=1))


# --- training ------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Tokens per second of the proxy's training beside transformers' Trainer, pair by pair, on the same rows."""
    import torch
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

    from s2l_ray.training.batches import BatchPlan, length_balanced_order
    from s2l_ray.training.fine_tuning import Collator, TrainingRows, token_mean_loss

    keep_freed_memory()
    plan = BatchPlan.of(arguments.global_batch, 1, arguments.device_batch)
    tokens = real_rows(arguments.data, arguments.tokenizer, arguments.rows, np.random.default_rng(0), 512)
    steps = arguments.rows // arguments.global_batch
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": plan.device_batch,
        "gradient_accumulation_steps": plan.accumulate,
        "learning_rate": 2e-5,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=arguments.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)

    def plain(folder: str) -> Trainer:
        rows = [
            {"input_ids": ids.tolist(), "labels": np.where(marks, ids, -100).tolist(), "attention_mask": [1] * len(ids)}
            for ids, marks in (tokens[i] for i in range(len(tokens)))
        ]
        collator = DataCollatorForSeq2Seq(tokenizer)
        (model,) = make_models("70m", 1, torch.device("cpu"))
        return Trainer(model, TrainingArguments(folder, **options), train_dataset=rows, data_collator=collator)

    def ours(folder: str) -> Trainer:
        order = np.random.default_rng(1).permutation(len(tokens))[: steps * plan.global_batch]
        rows = TrainingRows(tokens, length_balanced_order(order, tokens.lengths, plan))
        (model,) = make_models("70m", 1, torch.device("cpu"))
        return Trainer(
            model,
            TrainingArguments(folder, train_sampling_strategy="sequential", **options),
            train_dataset=rows,
            data_collator=Collator(restrict_logits=True),
            compute_loss_func=token_mean_loss,
        )

    pairs = []
    for _ in range(arguments.pairs):
        seconds = {}
        for way in (plain, ours):
            with tempfile.TemporaryDirectory() as folder:
                trainer = way(folder)
                begun = time.perf_counter()
                trainer.train()
                seconds[way.__name__] = time.perf_counter() - begun
        pairs.append(seconds | {"rate": matmul_flops_per_second(torch.device("cpu"), torch.float32)})
        print(pairs[-1])
    result = {
        "rows": len(tokens),
        "tokens": len(tokens.ids),
        "global_batch": arguments.global_batch,
        "device_batch": plan.device_batch,
        "ratio": statistics.median(pair["plain"] / pair["ours"] for pair in pairs),
        "tokens_per_second": statistics.median(len(tokens.ids) / pair["ours"] for pair in pairs),
        "pairs": pairs,
    }
    keep("train", result)


# --- Ray Data ------------------------------------------------------------------------------------------------------


def prepared(folder: Path, corpus: Path, checkpoints: list[Path], *more: str) -> tuple[Any, dict[str, Artifact]]:
    """A run up to the proxy from checkpoints that exist; its config and artifacts."""
    from s2l_ray.config import load_config
    from s2l_ray.pipeline import run

    configs = Path(__file__).parents[1] / "configs"
    places = json.dumps([str(place) for place in checkpoints])
    overrides = ["name=scoring", f"examples.dataset={corpus}", "examples.held_out_fraction=0", f"proxy.checkpoints={places}"]
    config = load_config(configs / "jsonl-cpu.yaml", [*overrides, "proxy.max_tokens=512", *more])
    return config, run(config, str(folder / "run"), until="proxy")


def actors(arguments: argparse.Namespace) -> None:
    """Seconds for N parts more: through Ray Data with two actors of one thread, and in this process with two threads."""
    import torch

    from s2l_ray.runtime.pool import do_units
    from s2l_ray.runtime.session import connect_ray
    from s2l_ray.runtime.workers import Workers
    from s2l_ray.training.models import save_model
    from s2l_ray.training.tokenizers import load_tokenizer
    from s2l_ray.trajectories.stage import Scorer, ScoringJob

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (model,) = make_models(arguments.shape, 1, torch.device("cpu"))
        save_model(model, load_tokenizer(arguments.tokenizer), folder / "step-000001")
        more = [f"examples.rows_per_part={arguments.rows_per_part}", f"proxy.tokenizer={arguments.tokenizer}"]
        config, found = prepared(folder, Path(arguments.data), [folder / "step-000001"], *more)
        connect_ray()
        job = ScoringJob.of(config, found["examples"], found["proxy"].root, [1], Storage(str(folder / "scratch")))
        units = job.units[: arguments.parts]
        for unit in units:
            job.parts.read(unit.part)  # neither way pays for the tokens
        pairs = []
        for pair in range(arguments.pairs):
            seconds: dict[str, float] = {}
            for count in (len(units) // 2, len(units)):
                work = Storage(str(folder / f"actors-{pair}-{count}"))
                begun = time.perf_counter()
                do_units("trajectories", units[:count], Scorer, job, work, Workers(2, 1, 0, 2))
                seconds[f"actors {count}"] = time.perf_counter() - begun
            worker = Scorer(job, Storage(str(folder / f"here-{pair}")), Workers(1, 2, 0, 1), 1)
            for i, unit in enumerate(units):
                if i == len(units) // 2:
                    begun = time.perf_counter()
                worker({"part": [unit.part], "models": [unit.model], "units": [1]})
            seconds["here"] = time.perf_counter() - begun
            seconds["actors"] = seconds[f"actors {len(units)}"] - seconds[f"actors {len(units) // 2}"]
            pairs.append(seconds)
            print(seconds)
        ratio = statistics.median(pair["here"] / pair["actors"] for pair in pairs)
        keep("actors", {"shape": arguments.shape, "parts": len(units), "ratio": ratio, "pairs": pairs})


def recording(arguments: argparse.Namespace) -> None:
    """Wall time of recording twelve checkpoints over that of training for three epochs, each stage as `s2l run` does it."""
    import transformers

    from s2l_ray.config import load_config
    from s2l_ray.pipeline import run

    layers, hidden, heads = SHAPES[arguments.shape]
    shape = {"architecture": "gpt_neox", "layers": layers, "hidden": hidden, "heads": heads, "max_positions": 512}
    lines = [line for path in sorted(glob.glob(arguments.data)) for line in Path(path).read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taken = np.random.default_rng(0).permutation(len(lines))[: arguments.rows]
        (folder / "rows.jsonl").write_text("".join(lines[i] + "\n" for i in taken), "utf-8")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=arguments.tokenizer)
        tokenizer.eos_token = "<|endoftext|>"  # noqa: S105 - a token of text
        tokenizer.save_pretrained(folder / "tokenizer")
        auto = json.dumps({"num_workers": "auto", "cpus_per_worker": "auto"})
        overrides = {
            "examples.dataset": folder / "rows.jsonl",
            "examples.held_out_fraction": 0,
            "examples.rows_per_part": arguments.rows_per_part,
            "proxy.model": json.dumps({"scratch": shape}),
            "proxy.tokenizer": folder / "tokenizer",
            "proxy.max_tokens": 512,
            "proxy.global_batch_size": 32,
            "machines.proxy": auto,
            "machines.trajectories": auto,
        }
        configs = Path(__file__).parents[1] / "configs"
        config = load_config(configs / "jsonl-cpu.yaml", [f"{name}={value}" for name, value in overrides.items()])
        found = run(config, str(folder / "run"), until="trajectories")
        seconds = {stage: artifact.manifest["provenance"]["seconds"] for stage, artifact in found.items()}
        result = {
            "shape": arguments.shape,
            "rows": found["examples"].summary["pool"],
            "steps": found["proxy"].summary["steps"],
            "ratio": seconds["trajectories"] / seconds["proxy"],
            "seconds": seconds,
        }
        keep("recording", result)


# --- a million examples --------------------------------------------------------------------------------------------


def write_corpus(path: Path, rows: int) -> None:
    """Short sums with their results, all different."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for i, (a, b, c) in enumerate(rng.integers(0, 10**6, (rows, 3)).tolist()):
            row = {"id": f"sum-{i:08d}", "instruction": f"{a} + {b} - {c} =", "output": f"{a + b - c}", "source": f"s{i % 7}"}
            file.write(json.dumps(row) + "\n")
    path.with_suffix(".tmp").rename(path)


@contextmanager
def largest_process(process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """Watch the private memory (GiB) of every process of a session; the largest by command at the end."""
    found: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if os.getsid(int(pid)) != process.pid:
                        continue
                    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    size = int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0])  # Ray's object store is shared
                    found[fields["Name"].strip()] = max(found.get(fields["Name"].strip(), 0), size / 2**20)
                except (OSError, KeyError, ValueError):
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def million(arguments: argparse.Namespace) -> None:
    """Time and the largest process of `s2l run --until trajectories` at two sizes; four passes for one at the smaller."""
    import torch
    from transformers import AutoModelForCausalLM

    from s2l_ray.config import Scratch
    from s2l_ray.training.models import save_model, scratch_config

    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    shape = Scratch(architecture="gpt_neox", layers=2, hidden=32, heads=2, max_positions=128)

    class NoTokenizer:
        def save_pretrained(self, _folder: Path) -> None: ...

    places = [work / f"step-{step:06d}" for step in (1, 2, 3, 4)]
    for seed, place in enumerate(places):
        torch.manual_seed(seed)
        save_model(AutoModelForCausalLM.from_config(scratch_config(shape, 512, 0)), NoTokenizer(), place)

    def one(rows: int, name: str, checkpoints: list[Path], reuse: Path | None = None) -> Row:
        corpus, run_dir = work / f"{rows}.jsonl", work / f"run-{rows}-{name}"
        write_corpus(corpus, rows)
        settings = {
            "examples.dataset": corpus,
            "examples.id_field": "id",
            "examples.held_out_fraction": 0,
            "examples.prompt_template": json.dumps("{instruction} "),
            "examples.prompt_template_if_empty": "null",
            "proxy.checkpoints": json.dumps([str(place) for place in checkpoints]),
            "proxy.tokenizer": json.dumps({"train": "bpe", "vocab_size": 512}),
            "proxy.max_tokens": 128,
        }
        command = [str(Path(sys.executable).with_name("s2l")), "run", "configs/jsonl-cpu.yaml", "--run-dir", str(run_dir)]
        command += ["--until", "trajectories"] + (["--reuse", str(reuse)] if reuse else [])
        command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], start_new_session=True)
        with largest_process(process) as sizes:
            assert process.wait() == 0, "the run failed"
        seconds = {
            stage: Artifact.read(Storage(str(run_dir)).child(stage)).manifest["provenance"]["seconds"]
            for stage in ("examples", "proxy", "trajectories")
        }
        gib = dict(sorted(sizes.items(), key=lambda item: -item[1])[:5])
        return {"rows": rows, "seconds": time.perf_counter() - begun, "stages": seconds, "gib": gib}

    small, large = arguments.sizes
    runs = {str(rows): one(rows, "all", places) for rows in (small, large)}
    passes = [one(small, f"only-{i}", [place], work / f"run-{small}-all") for i, place in enumerate(places)]
    four = sum(row["stages"]["trajectories"] for row in passes)
    of_rows = {name: row["stages"]["examples"] + row["stages"]["trajectories"] for name, row in runs.items()}
    result = {
        "runs": runs,
        "time_per_row_large_over_small": of_rows[str(large)] / large / (of_rows[str(small)] / small),
        "four_passes_over_one": four / runs[str(small)]["stages"]["trajectories"],
        "passes": passes,
    }
    keep("million", result)


# --- bfloat16 ------------------------------------------------------------------------------------------------------


def bfloat16(arguments: argparse.Namespace) -> None:
    """Losses and groups of a finished run's checkpoints in bfloat16 beside float32, on its first parts.

    A CPU without such instructions multiplies bfloat16 three hundred times slower; there each product is made in float32 from
    the rounded factors and its result rounded, which is what hardware does.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from s2l_ray.clustering.diagnostics import mean_agreement
    from s2l_ray.clustering.stage import cluster
    from s2l_ray.config import ExamplesConfig
    from s2l_ray.storage.layout import TOKENIZER
    from s2l_ray.training.checkpoints import checkpoint_folder
    from s2l_ray.training.losses import losses_of_models
    from s2l_ray.training.models import load_model
    from s2l_ray.training.token_parts import TokenParts
    from s2l_ray.training.token_rows import RowLimit, TokenRows

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            def wide(value: Any) -> Any:
                return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

            name = function.__name__.partition(".")[0]
            if name in ("addmm", "mm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"):
                was = any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in args)
                out = function(*map(wide, args), **(kwargs or {}))
                first = out[0] if isinstance(out, tuple) else out
                rounded = first.to(torch.bfloat16) if was else first
                return (rounded, *out[1:]) if isinstance(out, tuple) else rounded
            return function(*args, **(kwargs or {}))

    keep_freed_memory()
    place = Storage(arguments.run)
    examples, proxy = (Artifact.read(place.child(stage)) for stage in ("examples", "proxy"))
    config = json.loads(place.read("run.json"))
    max_tokens = (config.get("config") or config)["proxy"]["max_tokens"]
    corpus = ExamplesConfig(dataset="none")  # its examples are made, and none of them is a conversation
    with tempfile.TemporaryDirectory() as scratch:
        parts = TokenParts.of(examples, proxy.root.child(TOKENIZER), RowLimit(max_tokens), Storage(scratch), corpus)
        tokens, taken = [], 0
        for part in map(parts.read, examples.parts()):
            tokens.append(part.tokens)
            taken += len(part.tokens)
            if taken >= arguments.rows:
                break
        rows = TokenRows.join(tokens)
        rows = rows.take(np.arange(min(len(rows), arguments.rows)))
        found: dict[str, list[np.ndarray]] = {"float32": [], "bfloat16": []}
        for step in proxy.summary["steps"]:
            model = load_model(checkpoint_folder(proxy.root, step))
            found["float32"] += losses_of_models([model], rows, 4096, "float32")
            with Products():
                found["bfloat16"] += losses_of_models([model], rows, 4096, "bfloat16")
            difference = np.abs(found["bfloat16"][-1] - found["float32"][-1])
            print(f"step {step}: mean difference {difference.mean():.1e}, largest {difference.max():.1e} nats", flush=True)
    exact_NT, rounded_NT = (np.stack(columns, 1) for columns in found.values())
    groups = [cluster(losses, num_clusters=arguments.clusters, seed=0).cluster_ids_N for losses in (exact_NT, rounded_NT)]
    other = cluster(exact_NT, num_clusters=arguments.clusters, seed=1).cluster_ids_N
    difference_NT = np.abs(exact_NT - rounded_NT)
    result = {
        "rows": len(rows),
        "checkpoints": exact_NT.shape[1],
        "num_clusters": arguments.clusters,
        "mean_difference": float(difference_NT.mean()),
        "largest_difference": float(difference_NT.max()),
        "agreement": mean_agreement(np.stack(groups)),
        "agreement_of_two_seeds_in_float32": mean_agreement(np.stack([groups[0], other])),
    }
    keep("bfloat16", result)


# --- statistics ----------------------------------------------------------------------------------------------------


def statistics_beside_losses(arguments: argparse.Namespace) -> None:
    """Time of scoring with the statistics of every response's tokens over that without, pair by pair in turns.

    Wall time, and the process's CPU time, which other programs on the machine disturb less.
    """
    import torch

    from s2l_ray.training.losses import losses_of_models, statistics_of_models

    keep_freed_memory()
    rows = real_rows(arguments.data, arguments.tokenizer, arguments.rows, np.random.default_rng(0), 512)
    models = make_models(arguments.shape, arguments.checkpoints, torch.device("cpu"))
    ways = {"losses": losses_of_models, "statistics": statistics_of_models}
    pairs: list[dict[str, float]] = []
    for pair in range(-1, arguments.pairs):  # the first is not counted
        spent: dict[str, float] = {}
        for name in sorted(ways, reverse=pair % 2 == 0):
            wall, cpu = time.perf_counter(), time.process_time()
            found = list(ways[name](models, rows, 4096, "float32"))
            spent |= {name: time.perf_counter() - wall, f"{name}_cpu": time.process_time() - cpu}
            assert len(found) == len(models)
        pairs += [spent] if pair >= 0 else []
    result = {
        "shape": arguments.shape,
        "rows": len(rows),
        "tokens": len(rows.ids),
        "labels": int(rows.num_labels.sum()),
        "checkpoints": len(models),
        "threads": torch.get_num_threads(),
        "ratio": statistics.median(pair["statistics"] / pair["losses"] for pair in pairs),
        "ratio_of_cpu_time": statistics.median(pair["statistics_cpu"] / pair["losses_cpu"] for pair in pairs),
        "pairs": pairs,
    }
    keep("statistics", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    measures = parser.add_subparsers(required=True)
    for measure in (train, actors, recording, million, bfloat16, statistics_beside_losses):
        options = measures.add_parser(measure.__name__.partition("_")[0], help=(measure.__doc__ or "").partition("\n")[0])
        options.set_defaults(measure=measure)
        options.add_argument("--pairs", type=int, default=3)
        if measure in (train, actors, recording, statistics_beside_losses):
            options.add_argument("--data", required=True, help="JSON Lines, a glob")
            options.add_argument("--tokenizer", required=True, help="tokenizer.json")
        if measure is train:
            options.add_argument("--rows", type=int, default=128)
            options.add_argument("--global-batch", type=int, default=32)
            options.add_argument("--device-batch", type=int, default=8)
        if measure is actors:
            options.add_argument("--shape", default="7m")
            options.add_argument("--rows-per-part", type=int, default=256)
            options.add_argument("--parts", type=int, default=48)
        if measure is recording:
            options.add_argument("--shape", choices=SHAPES, default="7m")
            options.add_argument("--rows", type=int, default=1000)
            options.add_argument("--rows-per-part", type=int, default=128)
        if measure is million:
            options.add_argument("--work", required=True, help="a folder with room for a few GB")
            options.add_argument("--sizes", type=int, nargs=2, default=[250_000, 1_000_000])
        if measure is statistics_beside_losses:
            options.add_argument("--shape", choices=SHAPES, default="7m")
            options.add_argument("--rows", type=int, default=100)
            options.add_argument("--checkpoints", type=int, default=2)
        if measure is bfloat16:
            options.add_argument("--run", required=True, help="a finished run")
            options.add_argument("--rows", type=int, default=4000)
            options.add_argument("--clusters", type=int, default=100)
    arguments = parser.parse_args()
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
