"""SmallToLarge beyond language: images, a medical table and a financial series, from a training loop of one's own.

    pip install arch scikit-learn                  # the data; nothing is downloaded when the script runs
    python benchmarks/beyond_language.py run       # three data sets x ten seeds, a few minutes on one core; resumes
    python benchmarks/beyond_language.py table     # the results as Markdown

Nothing in the method is about text. All that s2l_ray needs of a training is the loss of every example at a few of its steps:

    recorded = s2l_ray.recorded_steps(total_steps, num_checkpoints=12, include_untrained=True)
    for step in your_training_loop():              # 0 is the untrained model
        if step in recorded:
            losses_N = ...                         # of all examples, the model in evaluation mode, nothing averaged
            s2l_ray.record_losses("trajectories", step, example_ids, losses_N, source=labels)
    s2l_ray.finish_recording("trajectories")

`example_ids` are unique strings or integers; `source` is any label worth counting by (a class, a year, a clinic). Then
`s2l select trajectories --budget 0.1 --num-clusters 20 --output out` (here: `select`) writes the subset's ids. The
functions `train`, `record_trajectories` and `select` below are all there is to replace for other data.

Each seed: a small network is watched on the pool, k-means groups its trajectories, and a larger network learns from scratch
on the subset, on a random subset of the same size and on the whole pool; same initial weights, same number of steps.
The seed decides weights, order of batches, grouping and draws; of digits and cancer also the held-out quarter (these
overlap, which makes the intervals somewhat too narrow). The series is split by time, so that its seeds share one test
period: their interval says nothing about other periods.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import s2l_ray
from s2l_ray.config import ClusteringConfig, SelectionConfig
from s2l_ray.selection.alone import select_trajectories
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "beyond_language.json"
WINDOW_DAYS = 20
BUDGETS = (0.1, 0.3)
Row = dict[str, Any]

# One recipe, fixed before any subset of S2L was tested. With 400 steps at 0.001 (tried: 200, 400, 800; 0.001, 0.003)
# the target learns four fifths of a pool, and random parts of them, well enough by the last fifth; the proxy's training loss
# falls all along. Of digits and cancer that was the pool of seed 99: some of its rows are test rows of other seeds.
SETTINGS: Row = {
    "num_seeds": 10,
    "proxy_hidden": [8],
    "target_hidden": [64, 64],
    "batch_size": 32,
    "proxy_epochs": 10,
    "proxy_learning_rate": 3e-3,
    "target_steps": 400,
    "target_learning_rate": 1e-3,
    "weight_decay": 0.01,
    "num_checkpoints": 12,
    "num_clusters": 20,
}


@dataclass(frozen=True)
class Task:
    """A pool to choose from and the rows to test on, standardised with the pool's mean and deviation only."""

    example_ids: list[str]
    """Of the pool's N rows."""

    sources: list[str]
    """A label for each row of the pool."""

    inputs_ND: Tensor
    targets_N: Tensor
    """Classes (int64), or numbers to predict (float32)."""

    test_ids: list[str]
    test_inputs_MD: Tensor
    test_targets_M: Tensor

    @property
    def num_outputs(self) -> int:
        """Classes, or one number."""
        return int(self.targets_N.max()) + 1 if self.is_classification else 1

    @property
    def is_classification(self) -> bool:
        return not self.targets_N.is_floating_point()


# --- Three data sets --------------------------------------------------------------------------------------------------


def table_task(name: str, seed: int) -> Task:
    """scikit-learn's digits (8 x 8 pixels, 10 classes) or its breast-cancer table (30 measures, 2 classes).

    A quarter of the rows, in equal shares of the classes, is held out.
    """
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.model_selection import train_test_split

    found = {"digits": load_digits, "cancer": load_breast_cancer}[name]()
    rows = np.arange(len(found.target))
    pool, test = train_test_split(rows, test_size=0.25, random_state=seed, stratify=found.target)
    return Task(
        example_ids=[f"{name}-{row:04d}" for row in pool],
        sources=[str(found.target_names[label]) for label in found.target[pool]],
        inputs_ND=standardised(found.data[pool], found.data[pool]),
        targets_N=torch.from_numpy(found.target[pool].astype(np.int64)),
        test_ids=[f"{name}-{row:04d}" for row in test],
        test_inputs_MD=standardised(found.data[test], found.data[pool]),
        test_targets_M=torch.from_numpy(found.target[test].astype(np.int64)),
    )


def finance_task() -> Task:
    """Tomorrow's volatility of the S&P 500 from the last 20 days, 1999 to 2018: the first 75% of the days are the pool.

    Volatility is the logarithm of the day's range, log(log(high / low)): nearly normal, and far less noisy than a squared
    return. Inputs are returns and log ranges. No day is in windows of both sides: those across the border are left out.
    """
    days, inputs, targets = volatility_windows()
    border = int(0.75 * len(days))
    pool, test = slice(0, border), slice(border + WINDOW_DAYS, None)
    return Task(
        example_ids=[str(day) for day in days[pool]],
        sources=[str(day)[:4] for day in days[pool]],
        inputs_ND=standardised(inputs[pool], inputs[pool]),
        targets_N=standardised(targets[pool], targets[pool]),
        test_ids=[str(day) for day in days[test]],
        test_inputs_MD=standardised(inputs[test], inputs[pool]),
        test_targets_M=standardised(targets[test], targets[pool]),
    )


def volatility_windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The predicted days in order, what was known on the evening before, and the day's log range."""
    from arch.data import sp500

    table = sp500.load()
    days = table.index.to_numpy().astype("datetime64[D]")
    close, ranges = np.log(table["Adj Close"].to_numpy()), np.log(np.log((table["High"] / table["Low"]).to_numpy()))
    returns = np.diff(close)  # of days 1, 2, ...
    windows = np.lib.stride_tricks.sliding_window_view(np.stack([returns, ranges[1:]]), WINDOW_DAYS, axis=1)
    inputs = windows[:, :-1].transpose(1, 0, 2).reshape(-1, 2 * WINDOW_DAYS)  # the last window has no tomorrow
    return days[WINDOW_DAYS + 1 :], inputs, ranges[WINDOW_DAYS + 1 :]


def standardised(values: np.ndarray, pool: np.ndarray) -> Tensor:
    """Values less the pool's mean, over its deviation, column by column; a column that is constant there gives 0."""
    deviation = pool.std(axis=0)
    scaled = np.where(deviation > 0, (values - pool.mean(axis=0)) / np.where(deviation > 0, deviation, 1), 0)
    return torch.from_numpy(scaled.astype(np.float32))


def load(name: str, seed: int) -> Task:
    """A data set by name."""
    return finance_task() if name == "finance" else table_task(name, seed)


# --- A plain training loop that is watched ------------------------------------------------------------------------------


def network(task: Task, hidden: list[int], seed: int) -> nn.Module:
    """A perceptron with these hidden layers; the seed decides its initial weights."""
    torch.manual_seed(seed)
    widths = [task.inputs_ND.shape[1], *hidden]
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], task.num_outputs))


def example_losses(model: nn.Module, inputs_BD: Tensor, targets_B: Tensor) -> Tensor:
    """Each example's own loss, shape (B,): cross-entropy in nats, or the squared error in variances of the pool."""
    outputs_BC = model(inputs_BD)
    if targets_B.is_floating_point():
        return (outputs_BC[:, 0] - targets_B) ** 2
    return functional.cross_entropy(outputs_BC, targets_B, reduction="none")


def evaluated(model: nn.Module, inputs_ND: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of every example from the model in evaluation mode: without it dropout would add noise to trajectories."""
    model.eval()
    with torch.no_grad():
        losses_N = example_losses(model, inputs_ND, targets_N)
    model.train()
    return losses_N


def train(
    model: nn.Module, inputs_ND: Tensor, targets_N: Tensor, *, total_steps: int, learning_rate: float, seed: int
) -> Iterator[int]:
    """Train, and give the number of the step after each; first 0, before anything has changed.

    Every step has a full batch, whatever the number of rows, so that equal steps are equal numbers of examples seen.
    """
    yield 0
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=SETTINGS["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    generator, batch_size = torch.Generator().manual_seed(seed), SETTINGS["batch_size"]
    num_epochs = -(-total_steps * batch_size // len(inputs_ND))
    order = torch.cat([torch.randperm(len(inputs_ND), generator=generator) for _ in range(num_epochs)])
    for step in range(1, total_steps + 1):
        rows_B = order[(step - 1) * batch_size : step * batch_size]
        optimizer.zero_grad()
        example_losses(model, inputs_ND[rows_B], targets_N[rows_B]).mean().backward()
        optimizer.step()
        schedule.step()
        yield step


def record_trajectories(task: Task, seed: int, directory: Path, total_steps: int) -> nn.Module:
    """Train the proxy on the pool; at every recorded step write the loss of every example. Gives the trained proxy."""
    proxy = network(task, SETTINGS["proxy_hidden"], seed)
    recorded = s2l_ray.recorded_steps(total_steps, num_checkpoints=SETTINGS["num_checkpoints"], include_untrained=True)
    options: Row = {"total_steps": total_steps, "learning_rate": SETTINGS["proxy_learning_rate"], "seed": seed}
    for step in train(proxy, task.inputs_ND, task.targets_N, **options):
        if step in recorded:
            losses_N = evaluated(proxy, task.inputs_ND, task.targets_N)
            s2l_ray.record_losses(directory, step, task.example_ids, losses_N.numpy(), source=task.sources)
    s2l_ray.finish_recording(directory)
    return proxy


# --- Grouping and selection -----------------------------------------------------------------------------------------------


def select(directory: Path, output: Path, seed: int) -> tuple[dict[float, list[str]], Row]:
    """The ids chosen for each budget, smaller within larger, and what the grouping says of itself.

    The same as `s2l select DIRECTORY --num-clusters 20 --budget 0.1 --budget 0.3 --output OUTPUT`.
    """
    grouping = ClusteringConfig(num_clusters=SETTINGS["num_clusters"], seed=seed)
    budget, *more = BUDGETS
    chosen = select_trajectories(
        str(directory), str(output), grouping, SelectionConfig(budget=budget, more_budgets=list(more), seed=seed)
    )
    ids = {one["budget"]: chosen.read_table(one["file"])["example_id"].to_pylist() for one in chosen.summary["budgets"]}
    found = Artifact.read(Storage(str(output)).child("clustering")).summary
    return ids, {
        "explained_variance": found["explained_variance"],
        "effective_dimension": found["diagnostics"]["effective_dimension"],
    }


# --- Was it worth it? -----------------------------------------------------------------------------------------------------


def fit_and_test(task: Task, rows_M: np.ndarray, seed: int) -> Row:
    """The target trained from scratch on these rows of the pool: mean loss and score on the test rows.

    The score is the accuracy, or the correlation of prediction and truth.
    """
    target, rows = network(task, SETTINGS["target_hidden"], seed), torch.from_numpy(rows_M)
    options: Row = {"total_steps": SETTINGS["target_steps"], "learning_rate": SETTINGS["target_learning_rate"], "seed": seed}
    for _ in train(target, task.inputs_ND[rows], task.targets_N[rows], **options):
        pass
    loss = float(evaluated(target, task.test_inputs_MD, task.test_targets_M).mean())
    with torch.no_grad():
        outputs_MC = target(task.test_inputs_MD)
    if task.is_classification:
        score = float((outputs_MC.argmax(dim=1) == task.test_targets_M).double().mean())
    else:
        score = float(np.corrcoef(outputs_MC[:, 0].numpy(), task.test_targets_M.numpy())[0, 1])
    return {"examples": len(rows_M), "loss": loss, "score": score}


def one_seed(name: str, seed: int) -> Row:
    """Recording, grouping, selection and the targets for one data set and seed."""
    begun, task = time.perf_counter(), load(name, seed)
    num_rows = len(task.example_ids)
    with tempfile.TemporaryDirectory() as folder:
        total_steps = SETTINGS["proxy_epochs"] * -(-num_rows // SETTINGS["batch_size"])
        proxy = record_trajectories(task, seed, Path(folder, "trajectories"), total_steps)
        subsets, groups = select(Path(folder, "trajectories"), Path(folder, "subset"), seed)
    row_of = {example_id: row for row, example_id in enumerate(task.example_ids)}
    shuffled_N = np.random.default_rng(seed).permutation(num_rows)
    runs = [{"method": "pool", "budget": 1.0} | fit_and_test(task, np.arange(num_rows), seed)]
    for budget, example_ids in subsets.items():
        rows_M = np.array(sorted(row_of[example_id] for example_id in example_ids))
        for method, chosen in (("s2l", rows_M), ("random", np.sort(shuffled_N[: len(rows_M)]))):
            runs.append({"method": method, "budget": budget} | fit_and_test(task, chosen, seed))
    sizes = {"pool": num_rows, "test": len(task.test_targets_M), "proxy_parameters": count(proxy)}
    sizes["target_parameters"] = count(network(task, SETTINGS["target_hidden"], seed))
    found = {"data": name, "seed": seed, "seconds": round(time.perf_counter() - begun, 2), "git": provenance()["git"]}
    return found | sizes | groups | {"runs": runs}


def count(model: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- Results ------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[Row]:
    """What was run before, by these settings."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != SETTINGS:
        raise SystemExit(f"{path} was made with other settings: {found['settings']}. Move it away to run with {SETTINGS}.")
    return list(found["seeds"])


def made_with() -> Row:
    """Commit and versions, those of the packages with the data included."""
    found = provenance()
    try:
        found["versions"] |= {package: metadata.version(package) for package in ("arch", "scikit-learn")}
    except metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed. Run: pip install arch scikit-learn") from error
    return found


def run(path: Path) -> None:
    """Every data set and seed that is not in the file yet; each is written as soon as it is there."""
    torch.set_num_threads(1)  # the matrices are too small for two
    seeds, made = read_results(path), made_with()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["data"], row["seed"]) for row in seeds}
    for name in ("digits", "cancer", "finance"):
        for seed in range(SETTINGS["num_seeds"]):
            if (name, seed) in done:
                continue
            seeds.append(one_seed(name, seed))
            beside = path.with_name(f".{path.name}")
            beside.write_text(json.dumps({"provenance": made, "settings": SETTINGS, "seeds": seeds}, indent=1) + "\n", "utf-8")
            os.replace(beside, path)
            print(f"{name} seed {seed}: {seeds[-1]['seconds']:.1f} s", flush=True)


def values(seeds: list[Row], method: str, budget: float, metric: str) -> np.ndarray:
    """A metric of each seed, in order of seeds."""
    ordered = sorted(seeds, key=lambda row: row["seed"])
    return np.array([r[metric] for row in ordered for r in row["runs"] if (r["method"], r["budget"]) == (method, budget)])


def table_line(seeds: list[Row], budget: float, metric: str) -> str:
    """One line of the table: means, the paired difference with its 95% t-interval, and in how many seeds S2L is better."""
    from scipy import stats

    s2l, random, pool = (values(seeds, m, b, metric) for m, b in (("s2l", budget), ("random", budget), ("pool", 1.0)))
    differences = s2l - random
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    better = differences < 0 if metric == "loss" else differences > 0
    name = {"loss": "test loss (less is better)", "score": "correlation" if seeds[0]["data"] == "finance" else "accuracy"}[
        metric
    ]
    label = f"{seeds[0]['data']}, {budget:.0%} of {seeds[0]['pool']:,}"
    interval = f"{differences.mean():+.4f} [{differences.mean() - half:+.4f}, {differences.mean() + half:+.4f}]"
    counts = f"{better.sum()} / {(differences == 0).sum()} / {(~better & (differences != 0)).sum()}"
    return f"| {label} | {name} | {s2l.mean():.4f} | {random.mean():.4f} | {interval} | {counts} | {pool.mean():.4f} |"


def print_table(path: Path) -> None:
    """The results as Markdown."""
    found = read_results(path)
    print("| data, budget | on test rows | S2L | random | S2L - random [95%] | better / same / worse | whole pool |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("digits", "cancer", "finance"):
        seeds = [row for row in found if row["data"] == name]
        if len(seeds) > 1:  # one seed has no interval
            for budget in BUDGETS:
                print("\n".join(table_line(seeds, budget, metric) for metric in ("loss", "score")))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        run(options.results)
    print_table(options.results)


if __name__ == "__main__":
    main()
