"""Without source labels: how much of what balancing sources gives can groups recover?

    python benchmarks/recovery.py DATA_DIR WORK_DIR {mathematics,general} {diagnose,choose,confirm,table}

WORK_DIR has the pretrained models of `readings.py pretrain`. Recovered is (L_random - L_method) / (L_random - L_balanced), L a
loss on held-out rows, pairs by seed, labels hidden from the method. `diagnose` trains no target: how near each candidate's
subset is to equal sources, and how well its groups agree with sources. `choose` trains the candidates of `CHOOSE`; one of
them, `CHOSEN`, `confirm` trains again, on another mixture (LOG.md has what was frozen when). `table` writes what is there to
`benchmarks/results/recovery`, and `diagnose` too. All resume. Candidates are given in the code: those of `diagnose` in
`recovery_groups.candidates`, where one that is added is diagnosed by the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import readings
from recovery_groups import PROXIES, Candidate, Floats, SeenPool, candidates, embedding_of_target, seen

from s2l_ray import run
from s2l_ray.compare.arms import Arm
from s2l_ray.compare.cells import CellSpec, budgets_of, read_bytes_table, seeded, spec
from s2l_ray.compare.statistics import Cell, HeldOutLosses, paired, ratio_of_means
from s2l_ray.compare.worker import FACTS, CellsJob, CellWorker
from s2l_ray.config import RunConfig, parse_config
from s2l_ray.config.parsing import apply_override
from s2l_ray.evaluation.stage import evaluated_parts
from s2l_ray.progress import log_to_console
from s2l_ray.runtime.pool import Unit, do_units
from s2l_ray.runtime.session import connect_ray
from s2l_ray.runtime.workers import Workers
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.drafts import table_bytes
from s2l_ray.storage.layout import CELL_LOSSES
from s2l_ray.storage.places import Storage
from s2l_ray.storage.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "recovery"
RANDOM, BALANCED = "random", "source_balanced"
CHOOSE = [
    Candidate(("raw",)),
    Candidate(("embedding",), "spherical", (10,)),
    Candidate(("embedding",), "levels", (1000, 100, 20)),
    Candidate(("raw",), "mixture", (10,)),
    Candidate(("profile",), "mixture", (10,)),
    Candidate(("profile", "embedding"), "mixture", (10,)),
    # Added after the confirmation: what had not been tried.
    Candidate(("profile",), "mixture", (10,), proxy="long"),
    Candidate(("raw",), proxy="long"),
    Candidate(("raw",), allocation=0.5),
]
CHOSEN: Candidate | None = Candidate(("profile",), "mixture", (10,))
DIAGNOSED_SEEDS = 3
SEEDS = {"choose": 4, "confirm": 6}


# --- runs and cells ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """A mixture with its run."""

    config: RunConfig
    finished: Mapping[str, Artifact]
    place: Path
    budget: int

    @classmethod
    def of(cls, data: Path, work: Path, mixture: str, proxy: str, overrides: list[str]) -> Reading:
        """The run of a proxy up to its trajectories, built where it is missing."""
        values = readings.config(data, work, mixture)
        values["trajectories"] |= {"embeddings": True}
        for override in [*overrides, *(f"{field}={value}" for field, value in PROXIES[proxy].items())]:
            apply_override(values, override)
        config, place = parse_config(values), work / f"recovery-{mixture}{proxy and '-'}{proxy}"
        finished = run(config, str(place), until="trajectories")
        return cls(config, finished, place, budgets_of(config, finished["examples"].summary["pool"])[0])

    def pool(self) -> SeenPool:
        """What candidates see."""
        return seen(self.finished, Storage(str(self.place)))

    @property
    def work(self) -> Storage:
        """Where subsets and losses of cells are."""
        return Storage(str(self.place.with_name(f"{self.place.name}-cells")))

    def cells(self, pool: SeenPool, wanted: list[Candidate], seeds: int) -> dict[str, tuple[CellSpec, pa.Table]]:
        """Random, source-balanced and the candidates, seed by seed, with their subsets, by the names of their units."""
        found = {}
        for seed in range(seeds):
            orders = {RANDOM: pool.order(None, seed), BALANCED: pool.order((pool.sources_N, ()), seed)}
            orders |= {one.name: pool.order(pool.groups(one, seed), seed, one.allocation) for one in wanted}
            for arm, order_N in orders.items():
                ids = pool.example_ids.take(pa.array(np.sort(order_N[: self.budget])))
                config = seeded(self.config.model_copy(update={"compare": None}), Arm(arm, {}), seed)
                inputs = {name: self.finished[name] for name in ("examples", "proxy")}
                one = spec(config, arm, self.budget, seed, inputs)
                subset = pa.table({"example_id": ids, "weight": np.ones(len(ids))})
                found[self.unit(one, subset)] = one, subset
        return found

    def unit(self, one: CellSpec, subset: pa.Table) -> str:
        """Names a cell by all that decides its losses."""
        made = json.dumps([one.key.recipe["target"], one.key.recipe["evaluation"], subset["example_id"].to_pylist()])
        return f"{one.arm}-{one.budget}-seed{one.seed}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"

    def train(self, cells: Mapping[str, tuple[CellSpec, pa.Table]]) -> None:
        """Train what is missing."""
        specs = {unit: one for unit, (one, _) in cells.items()}
        for unit, (_, subset) in cells.items():
            self.work.write(f"{unit}.parquet", table_bytes(subset))
        examples = self.finished["examples"]
        parts = evaluated_parts(self.config, examples)
        job = CellsJob(examples, self.finished["proxy"], specs, self.work, parts, frozenset())
        connect_ray()
        workers = Workers.resolve(self.config.machines.compare, one_per_cpu=True)
        do_units("compare", [Unit(unit, CELL_LOSSES) for unit in specs], CellWorker, job, self.work, workers)

    def trained(self, cells: Mapping[str, tuple[CellSpec, pa.Table]]) -> list[Cell]:
        """The cells that are there."""
        there, found = set(self.work.names(recursive=True)), []
        for unit, (one, _) in cells.items():
            path = f"{unit}/{CELL_LOSSES}"
            if path in there:
                table = read_bytes_table(self.work.read(path))
                facts = json.loads(table.schema.metadata[FACTS])
                losses = table.select(["example_id", "source", "loss", "num_response_tokens"]).replace_schema_metadata(None)
                diverged = not np.isfinite(losses["loss"].to_numpy()).all()
                found.append(
                    Cell(one.arm, one.budget, one.seed, losses, None, facts["supervised_tokens"], facts["steps"], diverged)
                )
        return found


# --- what is measured ----------------------------------------------------------------------------------------------


def diagnosis(pool: SeenPool, one: Candidate, budget: int, seeds: int) -> dict[str, Any]:
    """How near a candidate's subsets are to equal sources, means over seeds, and how its groups agree with sources."""
    from sklearn.metrics import adjusted_mutual_info_score

    number = len(pool.source_names)
    rows_S = np.bincount(pool.sources_N, minlength=number)
    random_S = rows_S * budget / rows_S.sum()
    balanced_S = np.bincount(pool.sources_N[pool.order((pool.sources_N, ()), 0)[:budget]], minlength=number)
    distance = lambda counts_S: float(np.abs(counts_S - balanced_S).sum() / 2 / budget)  # noqa: E731
    level = lambda counts_S: float(np.log(counts_S + 1).mean())  # noqa: E731
    removed, logs, agreement, counts = [], [], [], []
    for seed in range(seeds):
        groups = pool.groups(one, seed)
        taken_S = np.bincount(pool.sources_N[pool.order(groups, seed, one.allocation)[:budget]], minlength=number)
        removed.append(1 - distance(taken_S) / distance(random_S))
        logs.append((level(taken_S) - level(random_S)) / (level(balanced_S) - level(random_S)))
        agreement.append(float(adjusted_mutual_info_score(pool.sources_N, groups[0])))
        counts.append(taken_S)
    means = {name: round(float(np.mean(found)), 4) for name, found in (("removed", removed), ("log", logs), ("ami", agreement))}
    ranges = {
        "removed_range": [round(min(removed), 4), round(max(removed), 4)],
        "log_range": [round(min(logs), 4), round(max(logs), 4)],
    }
    shares = dict(zip(pool.source_names, np.mean(counts, axis=0).round(1).tolist(), strict=True))
    return {**means, **ranges, "rows": shares}


def diagnose(one: Reading, mixture: str, wanted: list[Candidate]) -> None:
    """Diagnose candidates that share a proxy, and keep what is found."""
    pool = one.pool()
    saved = one.place.with_name(f"{one.place.name}-target-embedding.npy")
    if any("target_embedding" in candidate.see for candidate in wanted):
        pool.matrices["target_embedding"] = embedding_of_target(one.config, one.finished, pool, saved)
    path = RESULTS / f"{mixture}-diagnosis.json"
    known = json.loads(path.read_text(encoding="utf-8"))["candidates"] if path.exists() else {}
    for candidate in wanted:
        if candidate.name not in known:
            known[candidate.name] = diagnosis(pool, candidate, one.budget, DIAGNOSED_SEEDS)
            print(candidate.name, known[candidate.name], flush=True)
            save(path.name, {"mixture": mixture, "budget": one.budget, "candidates": known})


def recovered(random_K: Floats, arm_K: Floats, balanced_K: Floats) -> dict[str, float | None]:
    """Ratio of the mean gains of pairs (K,), with the 95% interval of Fieller's theorem; without one where the gain of balance
    is not clearly above 0."""
    gains_K, gaps_K, number = random_K - arm_K, random_K - balanced_K, len(random_K)
    gain, gap = float(gains_K.mean()), float(gaps_K.mean())
    if not gap:
        return {"share": None, "low": None, "high": None}
    covariance = np.cov(gaps_K, gains_K) / number
    return asdict(ratio_of_means(gain, gap, covariance[1, 1], covariance[0, 0], covariance[0, 1], number))


def measured(cells: list[Cell], pool_rows: Mapping[str, int]) -> dict[str, Any]:
    """Losses of every cell and what each arm recovers, over the seeds that are whole."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    seeds = [seed for seed in sorted({c.seed for c in cells}) if {c.arm for c in cells if c.seed == seed} >= {RANDOM, BALANCED}]
    held_out = HeldOutLosses.of(cells, pool_rows)
    losses = {
        (cell.arm, cell.seed): {kind: held_out.mean(held_out.losses[cell.name], kind) for kind in held_out.kinds}
        for cell in cells
    }
    rows = {}
    for arm in arms:
        own = [seed for seed in seeds if (arm, seed) in losses]
        if len(own) < 2:
            continue
        of = lambda name, kind, own=own: np.array([losses[name, seed][kind] for seed in own])  # noqa: E731
        rows[arm] = {
            kind: {
                "loss": float(of(arm, kind).mean()),
                "difference": None if arm == RANDOM else asdict(paired(of(arm, kind) - of(RANDOM, kind))),
                "recovered": None
                if arm in (RANDOM, BALANCED)
                else recovered(of(RANDOM, kind), of(arm, kind), of(BALANCED, kind)),
            }
            for kind in held_out.kinds
        } | {"seeds": len(own)}
    each = [
        {"arm": c.arm, "seed": c.seed, "steps": c.steps, "supervised_tokens": c.supervised_tokens, **losses[c.arm, c.seed]}
        for c in cells
    ]
    return {"arms": rows, "cells": each}


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was trained."""
    lines = ["| groups | seeds | over tokens | recovered | averaged over sources | recovered |", "| --- " * 6 + "|"]
    for arm, row in found["arms"].items():
        columns = [arm, str(row["seeds"])]
        for kind in ("loss_per_token", "loss_macro"):
            one = row[kind]
            columns.append(f"{one['loss']:.3f}")
            if one["difference"]:
                half = (one["difference"]["high"] - one["difference"]["low"]) / 2
                columns[-1] = f"{one['difference']['mean']:+.3f} ± {half:.3f}"
            share = one["recovered"]
            interval = "" if not share or share["low"] is None else f" [{share['low']:.2f}, {share['high']:.2f}]"
            columns.append("" if not share or share["share"] is None else f"{share['share']:.2f}{interval}")
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def save(name: str, found: dict[str, Any]) -> None:
    """Write a result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(json.dumps(found | {"provenance": provenance()}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Do one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the JSON Lines files of the sources")
    parser.add_argument("work", type=Path, help="where `readings.py pretrain` wrote; runs and cells are kept here")
    parser.add_argument("mixture", choices=readings.MIXTURES, help="`choose` is for mathematics, `confirm` for general")
    parser.add_argument("step", choices=("diagnose", "choose", "confirm", "table"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="changes the run's config")
    arguments = parser.parse_args()
    log_to_console()
    mixture, step = arguments.mixture, arguments.step

    def reading(proxy: str = "") -> Reading:
        return Reading.of(arguments.data, arguments.work, mixture, proxy, arguments.set)

    if step == "diagnose":
        wanted = candidates()
        for proxy in PROXIES:
            diagnose(reading(proxy), mixture, [one for one in wanted if one.proxy == proxy])
        return
    one = reading()
    pool, arms = one.pool(), CHOOSE if mixture == "mathematics" else [CHOOSE[0], *([CHOSEN] if CHOSEN else [])]
    seeds = SEEDS["confirm" if mixture == "general" else "choose"]
    cells: dict[str, tuple[CellSpec, pa.Table]] = {}
    for proxy in dict.fromkeys(arm.proxy for arm in arms):
        of_proxy = reading(proxy)
        cells |= of_proxy.cells(of_proxy.pool(), [arm for arm in arms if arm.proxy == proxy], seeds)
    if step in SEEDS:
        one.train(cells)
    rows = dict(zip(pool.source_names, np.bincount(pool.sources_N).tolist(), strict=True))
    found = measured(one.trained(cells), rows)
    save(f"{mixture}.json", {"mixture": mixture, "budget": one.budget, "pool": rows, **found})
    print(markdown(found))


if __name__ == "__main__":
    main()
