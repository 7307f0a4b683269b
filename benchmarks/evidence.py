"""Does the selection pay on a pretrained target? The arms of `s2l compare` on SmolLM2-135M, trained where there is no Ray.

    python benchmarks/evidence.py choose DATA_DIR WORK_DIR --model MODEL_DIR [--kind KIND]     here, with the whole package
    python benchmarks/evidence.py pack WORK_DIR/KIND --model MODEL_DIR --output DIR            parts that can be sent
    python benchmarks/evidence.py train WORK_DIR/KIND --model MODEL_DIR [--minutes 7.5]        without Ray, on a GPU
    python benchmarks/evidence.py table DATA_DIR WORK_DIR --model MODEL_DIR [--kind KIND]      here again

`choose` pretrains a proxy of 3.4M parameters on other text, trains it on the pool, records its losses, and writes what every
cell (arm, budget, seed) trains on into a bundle, all of a budget seed by seed. `train` does the cells that have no result, in
that order, so that every interruption leaves whole pairs: 0 all done, 3 call the same again. `table` makes them cells of the
comparison and prints its table over the seeds that are whole.

Kinds: `whole`; `rates`, the learning rate by random subsets and the validation split, read first, whose answer `choose --rate`
takes; `upper`, with the target
itself, trained for a few steps, as the proxy (for a machine with Ray and a GPU); `reduced`, what a CPU can do. Settings were
frozen in LOG.md before the first cell. `table` keeps cells in WORK_DIR/run (but for `rates`): another rate after it, or
`--tiny` with another kind, needs another WORK_DIR and is refused in the same.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for place in (str(HERE.parent), str(HERE / "gpu"), str(HERE)):
    sys.path.insert(0, place)

import packing  # noqa: E402
import readings  # noqa: E402
from measuring import AGAIN, machine, write_json  # noqa: E402

from s2l_ray.errors import S2LError  # noqa: E402

MIXTURE, CELLS, SUBSETS, EXAMPLES, RESULTS = "mathematics", "cells.json", "subsets", "examples", "results"
ARCHIVE = "evidence.tar"
MACHINES = "machines.json"
"""Every machine that trained cells."""
PROXY = {"architecture": "gpt_neox", "layers": 6, "hidden": 192, "heads": 6, "max_positions": 512, "tie_embeddings": True}
ARMS = [
    "random",
    "source_balanced",
    "s2l_inside_sources",
    "s2l",
    "source_matched",
    "source_and_length_matched",
    "s2l_allocation_0.5",
    "s2l_allocation_1",
    "s2l_weighted",
    "s2l_profile",
    "longest",
]
ANSWERED = ("gsm8k", "svamp", "mawps")
"""Sources whose answers are written by the model and looked at."""

RATES = (1.0e-5, 3.0e-5, 1.0e-4)
RATE = 1.0e-4
"""Where nothing else is asked for."""


@dataclass(frozen=True)
class Kind:
    """A comparison of this file."""

    arms: list[str]
    primary: str
    budgets: list[int | float]
    seeds: int
    full_seeds: int = 0
    epochs: int = 1
    batch: int = 32
    rates: tuple[float, ...] = ()
    """The learning rates that are compared; none where one is given."""

    split: str = "held_out"
    rows_per_source: int | None = None
    """How many held-out rows of each source are evaluated; None: all."""

    small_batches: bool = False
    """For a CPU: a batch of 16 at once takes 11 GB."""

    writes_answers: bool = False
    proxy_is_target: bool = False


KINDS = {
    "whole": Kind(ARMS, "s2l", [0.1, 0.3], 8, full_seeds=3, epochs=2, writes_answers=True),
    "upper": Kind([*ARMS[:4], "s2l_profile"], "s2l", [0.1], 8, epochs=2, writes_answers=True, proxy_is_target=True),
    "reduced": Kind(ARMS[:3], "s2l_inside_sources", [256], 3, batch=16, rows_per_source=20, small_batches=True),
    "rates": Kind(["source_balanced"], "source_balanced", [0.1], 2, rates=RATES, split="validation"),
}


# --- what is chosen ------------------------------------------------------------------------------------------------


def pretrained_proxy(data: Path, work: Path, *, tiny: bool) -> tuple[str, str]:
    """Model and tokenizer folder of the proxy, trained on text that is in neither the pool nor the held-out rows."""
    from s2l_ray.config import parse_config
    from s2l_ray.pipeline import run

    place = work / f"{MIXTURE}-pretraining"
    rows = readings.reasoning_rows()
    for name, count in readings.PRETRAINED_ON[MIXTURE].items():
        rows += readings.rows_of(data, name, count)
    values = {
        "name": "pretraining",
        "examples": {
            "dataset": readings.write(work / "pretraining.jsonl", rows[:200] if tiny else rows),
            "held_out_fraction": 0.02,
            **readings.fields(),
        },
        "proxy": {
            "model": {"scratch": PROXY | ({"layers": 1, "hidden": 24, "heads": 2} if tiny else {})},
            "tokenizer": {"train": "bpe", "vocab_size": 512 if tiny else 4096},
            "epochs": 1 if tiny else 2,
            "learning_rate": 2.0e-3,
            "num_checkpoints": 1,
            **readings.TRAINING,
            "precision": "bfloat16",
        },
        "selection": {"budget": 0.5},
        "target": {"model": {"scratch": PROXY}},  # never trained
        "machines": readings.MACHINES,
    }
    run(parse_config(values), str(place), until="proxy")
    return str(max((place / "proxy").glob("step-*"))), str(place / "proxy" / "tokenizer")


def config(data: Path, work: Path, model: str, kind: Kind, *, tiny: bool = False) -> dict[str, Any]:
    """The comparison's config."""
    proxy, tokenizer = pretrained_proxy(data, work, tiny=tiny)
    values = readings.config(data, work, MIXTURE)
    values["examples"] |= {"held_out_per_source": 5 if tiny else readings.HELD_OUT}
    values["proxy"] |= {"model": proxy, "tokenizer": tokenizer, "learning_rate": 1.0e-3, "precision": "bfloat16"}
    values["proxy"] |= {"epochs": 1 if tiny else 2, "num_checkpoints": 2 if tiny else 4}
    if kind.proxy_is_target:  # a few steps of it
        values["proxy"] |= {"model": model, "tokenizer": None, "learning_rate": RATE, "epochs": 0.25}
    values["clustering"] |= {"num_clusters": 5 if tiny else 100}
    values["target"] = {
        "model": model,
        "epochs": kind.epochs,
        "learning_rate": RATE,
        **readings.TARGET,
        "global_batch_size": 8 if tiny else kind.batch,
    }
    answers = {"answer_pattern": r"The answer is (.+)", "max_generations": 50, "max_new_tokens": 160}
    values["evaluation"] = {"split": kind.split} | (answers if kind.writes_answers else {"max_generations": 0})
    values["compare"] = {
        "arms": kind.arms,
        "primary": kind.primary,
        "budgets": [16] if tiny else kind.budgets,
        "seeds": kind.seeds,
        "full_seeds": kind.full_seeds,
        "redo_from": "clustering",
        "fit": "together",
    }
    if kind.small_batches:
        values["machines"] = values["machines"] | {"target": values["machines"]["target"] | {"device_batch_size": 4}}
    return values


def run_directory(arguments: argparse.Namespace) -> Path:
    """Where proxy and losses are: one for all kinds with the same proxy."""
    return Path(arguments.work / ("run-upper" if KINDS[arguments.kind].proxy_is_target else "run"))


def planned(arguments: argparse.Namespace) -> Iterator[tuple[float, Any, Any, Any, Any]]:
    """For each learning rate: the config, the run directory, its artifacts and all cells."""
    from s2l_ray.compare.stage import plan_cells
    from s2l_ray.config import parse_config
    from s2l_ray.pipeline import run
    from s2l_ray.storage.places import Storage

    kind = KINDS[arguments.kind]
    values = config(arguments.data, arguments.work, str(arguments.model), kind, tiny=arguments.tiny)
    place = run_directory(arguments)
    for rate in kind.rates or (arguments.rate,):
        values["target"] |= {"learning_rate": rate}
        parsed = parse_config(values)
        finished = run(parsed, str(place), until="trajectories")
        yield rate, parsed, Storage(str(place)), finished, plan_cells(parsed, Storage(str(place)), finished)


def in_order(specs: Iterable[Any]) -> list[Any]:
    """By budget, inside a budget by seed; all data last."""
    return sorted(specs, key=lambda one: (one.budget, one.seed))


def choose(arguments: argparse.Namespace) -> int:
    """Write a bundle: each cell's settings and subset, the examples, which rows are evaluated."""
    from s2l_ray.compare.stage import choose as choose_subsets
    from s2l_ray.evaluation.stage import choose_generated, evaluated_parts
    from s2l_ray.examples.reading import read_evaluated
    from s2l_ray.storage.places import Storage

    bundle = arguments.work / arguments.kind
    cells: list[dict[str, Any]] = []
    for _, parsed, place, finished, plan in planned(arguments):
        specs = in_order(one for one in plan.specs if arguments.kind != "rates" or one.arm == "random")
        choose_subsets(parsed, plan, specs, place, finished, Storage(str(bundle / SUBSETS)))
        cells += [
            {
                "unit": one.unit,
                "arm": one.arm,
                "budget": one.budget,
                "examples": one.examples,
                "seed": one.seed,
                "config": one.config.model_dump(mode="json", exclude_none=True),
            }
            for one in specs
        ]
    examples = finished["examples"]
    parts = evaluated_parts(parsed, examples)
    generated = choose_generated(parsed, examples, parts)
    answered = [
        example_id
        for part in parts
        for example_id, source in zip(
            *read_evaluated(examples, part, parsed.evaluation.split, ["example_id", "source"]).to_pydict().values(), strict=True
        )
        if source in ANSWERED and example_id in generated
    ]
    shutil.copytree(run_directory(arguments) / EXAMPLES, bundle / EXAMPLES, dirs_exist_ok=True)
    some, evaluated = KINDS[arguments.kind].rows_per_source, None
    if some:
        evaluation = parsed.evaluation.model_copy(update={"max_generations": some})
        evaluated = sorted(choose_generated(parsed.model_copy(update={"evaluation": evaluation}), examples, parts))
    listed = {"cells": cells, "parts": parts, "answered": sorted(answered), "evaluated": evaluated, "rate": arguments.rate}
    write_json(bundle / CELLS, listed)
    print(f"{len(cells)} cells in {bundle}")
    return 0


def pack(arguments: argparse.Namespace) -> int:
    """The bundle and the model as one archive in parts."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    whole = arguments.output / ARCHIVE
    with tarfile.open(whole, "w") as archive:
        archive.add(arguments.bundle, "bundle", filter=lambda member: None if RESULTS in member.name.split("/") else member)
        archive.add(arguments.model, "model")
    files = packing.cut([whole], arguments.output)
    whole.unlink()
    # $OUT is emptied before every call and at most eight files come back: results stay beside the parts, and return as one.
    train_there = "timeout 530 python benchmarks/evidence.py train /root/parts/bundle --model /root/parts/model"
    back = "code=$?; tar -C /root/parts -cf $OUT/results.tar results; exit $code"
    then = f"python benchmarks/evidence.py join /root/parts && ({train_there} --results /root/parts/results; {back})"
    then += "\nOn a fresh machine, before the last: carry results.tar and tar -C /root/parts -xf it."
    print(packing.in_calls(files, arguments.output, "/root/parts", then))
    return 0


def join(arguments: argparse.Namespace) -> int:
    """Unpack the parts where they arrived."""
    (whole,) = packing.joined(arguments.bundle)
    with tarfile.open(whole) as archive:
        archive.extractall(arguments.bundle, filter="data")
    return 0


# --- what is trained, without Ray -----------------------------------------------------------------------------------


def worker_on(ids: list[str] | None) -> Any:
    """The class of a worker that evaluates these held-out rows; all of them where there is no list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from s2l_ray.compare.worker import CellWorker
    from s2l_ray.evaluation.held_out import HeldOut
    from s2l_ray.training.token_rows import RowLimit
    from s2l_ray.training.tokens import encode_table

    class SomeRowsWorker(CellWorker):
        def _known(self, one: Any) -> Any:
            tokenizer, pool, held_out = super()._known(one)
            table = held_out.table.filter(pc.is_in(held_out.table["example_id"], pa.array(ids)))
            return tokenizer, pool, HeldOut(table, encode_table(tokenizer, table, RowLimit.of(one.config.target)))

    return CellWorker if ids is None else SomeRowsWorker


def train(arguments: argparse.Namespace) -> int:
    """The cells that have no result yet, in their order, until the minutes are over."""
    import torch

    from s2l_ray.compare.cells import CellSpec
    from s2l_ray.compare.worker import CellsJob
    from s2l_ray.config import parse_config
    from s2l_ray.runtime.workers import Workers
    from s2l_ray.storage.artifacts import Artifact, Key
    from s2l_ray.storage.places import Storage

    begun, bundle = time.monotonic(), arguments.bundle
    listed = json.loads((bundle / CELLS).read_text(encoding="utf-8"))
    specs = {}
    for cell in listed["cells"]:
        values = cell["config"]
        if isinstance(values["target"]["model"], str):
            values["target"]["model"] = str(arguments.model)
        stage = f"compare/{cell['unit']}"
        specs[cell["unit"]] = CellSpec(
            cell["arm"], cell["budget"], cell["examples"], cell["seed"], parse_config(values), Key(stage, 1, {}, {})
        )
    results = arguments.results or bundle / RESULTS
    results.mkdir(parents=True, exist_ok=True)
    held = (results / "lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{results}: another `train` writes there. Wait for it, or give --results")
        return 2
    on_gpu = torch.cuda.is_available()
    examples = Artifact.read(Storage(str(bundle / EXAMPLES)))
    subsets = Storage(str(bundle / SUBSETS))
    job = CellsJob(examples, examples, specs, subsets, listed["parts"], frozenset(listed["answered"]))
    workers = Workers(1, arguments.threads or torch.get_num_threads(), 1.0 if on_gpu else 0.0, 1)
    worker = worker_on(listed["evaluated"])(job, subsets, workers, 1)
    longest = 0.0
    for unit in specs:
        if (results / f"{unit}.parquet").exists():
            continue
        if longest and time.monotonic() - begun + longest > 60 * arguments.minutes:
            print("cells are left: call the same again")
            return AGAIN
        start = time.monotonic()
        ((_, data),) = worker.work_on(unit, {unit: worker.load(unit)})
        beside = results / f"{unit}.tmp"
        beside.write_bytes(data)
        add_machine(results / MACHINES, machine(worker.device))
        beside.rename(results / f"{unit}.parquet")
        longest = max(longest, time.monotonic() - start)
        print(f"{unit}: {time.monotonic() - start:.1f} s", flush=True)
    return 0


def add_machine(path: Path, on: dict[str, Any]) -> None:
    """Add a machine to those that trained cells, once."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_json(path, known if on in known else [*known, on])


# --- what came out -------------------------------------------------------------------------------------------------


def table(arguments: argparse.Namespace) -> int:
    """Results as cells of the run's comparison, and its table over whole seeds; of the kind `rates` the mean loss at each."""
    import pyarrow.parquet as pq

    from s2l_ray.compare.cells import publish
    from s2l_ray.compare.results import write_results
    from s2l_ray.compare.worker import FACTS

    bundle = arguments.work / arguments.kind
    results = arguments.results or bundle / RESULTS
    arguments.rate = json.loads((bundle / CELLS).read_text(encoding="utf-8")).get("rate", RATE)
    for rate, parsed, place, finished, plan in planned(arguments):
        there = [one for one in plan.specs if (results / f"{one.unit}.parquet").exists()]
        tables = {one.unit: pq.read_table(results / f"{one.unit}.parquet") for one in there}
        if arguments.kind == "rates":
            means = [mean_loss(tables[one.unit]) for one in there]
            mean = f"{sum(means) / len(means):.4f} nats per token of random" if means else "not trained"
            print(f"{rate:g}: {mean}, {len(means)} seeds")
            continue
        for one in there:
            if one.find(place) is None:
                facts = json.loads(tables[one.unit].schema.metadata[FACTS])
                publish(one, place, pq.read_table(bundle / SUBSETS / f"{one.unit}.parquet"), tables[one.unit], facts)
        kept = [one for one in there if all(other in there for other in plan.specs if together(other, one))]
        seeds = {budget: len({one.seed for one in kept if one.budget == budget}) for budget in plan.budgets}
        budgets = [budget for budget, whole in seeds.items() if whole >= 2]
        print(f"whole seeds by budget: {seeds}; {len(there)} of {len(plan.specs)} cells in {results}")
        if budgets:
            kept = [one for one in kept if one.budget in budgets or one.arm == "full"]
            found = write_results(parsed, kept, budgets, place, finished)
            print(found.text())
            right = exact_matches(kept, tables)
            for arm, by_source in right.items():
                print(arm, " ".join(f"{source} {share:.3f}" for source, share in by_source.items()))
            save(found, right, results, results if arguments.tiny else HERE / "results" / "evidence", arguments.kind)
    return 0


def together(one: Any, other: Any) -> bool:
    """Whether two cells are compared with each other."""
    return (one.budget, one.seed) == (other.budget, other.seed)


def mean_loss(losses: Any) -> float:
    """Nats per response token."""
    weights = losses["num_response_tokens"].to_numpy().astype(float)
    return float((losses["loss"].to_numpy() * weights).sum() / weights.sum())


def exact_matches(kept: list[Any], tables: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The share of right answers by arm at each budget and source."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in kept:
        for row in tables[one.unit].select(["source", "scores"]).to_pylist():
            if row["scores"]:
                of_arm = found.setdefault(f"{one.arm} {one.budget}", {})
                of_arm.setdefault(row["source"], []).append(json.loads(row["scores"])["exact_match"])
    return {arm: {source: sum(every) / len(every) for source, every in right.items()} for arm, right in found.items()}


def save(found: Any, right: dict[str, dict[str, float]], results: Path, folder: Path, kind: str) -> None:
    """The table with every cell's losses and the machine that trained them."""
    folder.mkdir(parents=True, exist_ok=True)
    known = results / MACHINES
    on = json.loads(known.read_text(encoding="utf-8")) if known.exists() else []
    if not on:
        print(f"{known} is missing: the table names no machine. Copy it from where the cells were trained")
    write_json(folder / f"{kind}-table.json", found.to_json() | {"exact_matches": right, "machines": on})
    (folder / f"{kind}-table.md").write_text(found.markdown(), encoding="utf-8")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with what is missing of a step's inputs."""
    if arguments.step != "join" and not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: no config.json there; it takes the folder of a transformers model")
    if arguments.step in {"pack", "train"} and not (arguments.bundle / CELLS).is_file():
        parser.error(f"{arguments.bundle}: no {CELLS} there; `choose` makes a bundle, in WORK_DIR/KIND")
    if arguments.step == "join" and not (arguments.bundle / packing.MANIFEST).is_file():
        parser.error(f"{arguments.bundle}: no {packing.MANIFEST} there; `pack` makes it, and every call brings it along")
    if arguments.step == "table" and not (arguments.work / arguments.kind / CELLS).is_file():
        parser.error(f"{arguments.work / arguments.kind}: no bundle there; `choose` makes it")
    if arguments.step in {"choose", "table"} and not arguments.data.is_dir():
        parser.error(f"{arguments.data}: no such folder; it has a JSON Lines file for each source (gsm8k.jsonl and so on)")


def main() -> int:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name, step in (("choose", choose), ("table", table)):
        of_step = steps.add_parser(name)
        of_step.set_defaults(do=step)
        of_step.add_argument("data", type=Path)
        of_step.add_argument("work", type=Path)
        of_step.add_argument("--kind", choices=KINDS, default="whole")
        of_step.add_argument("--rate", type=float, default=RATE, help="the target's learning rate; `table` takes the bundle's")
        of_step.add_argument("--tiny", action="store_true", help="a rehearsal: little data, small models")
    for name, step in (("pack", pack), ("join", join), ("train", train)):
        of_step = steps.add_parser(name)
        of_step.set_defaults(do=step)
        of_step.add_argument("bundle", type=Path, help="where the parts are" if name == "join" else "WORK_DIR/KIND")
    for name in ("choose", "table", "pack", "train"):
        steps.choices[name].add_argument("--model", type=lambda path: Path(path).resolve(), required=True)
    steps.choices["pack"].add_argument("--output", type=Path, default=Path("build/evidence"))
    steps.choices["train"].add_argument("--minutes", type=float, default=7.5, help="no cell begins that may end later")
    steps.choices["train"].add_argument("--threads", type=int)
    for name in ("train", "table"):
        steps.choices[name].add_argument("--results", type=Path, help="the bundle's results where nothing is given")
    arguments = parser.parse_args()
    check(parser, arguments)
    try:
        return int(arguments.do(arguments))
    except ModuleNotFoundError as error:
        wheels = "the wheels of gpu/kit.py pack --tier a" if arguments.step == "train" else "the whole package's requirements"
        raise SystemExit(f"not run: {error}. `{arguments.step}` needs {wheels}") from error
    except S2LError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
