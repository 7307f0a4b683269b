"""What cells' losses say: paired differences to random with their intervals, and how small a difference could have been seen.

Cells of one budget and seed are a pair: they start from the same weights, are trained for as many steps and evaluated on the
same rows, so that what differs is the subset. Two losses are the question together, over tokens and averaged over sources,
because one favours what is like the pool and the other favours balance. Where held-out rows do not have the shares of the
pool (`examples.held_out_per_source`), the mean over tokens does not either: a third one weighs each source by its rows there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import optimize, stats

from s2l_ray.errors import DataError

Floats = NDArray[np.float64]
TOKENS, MACRO, POOL, ACCURACY = "loss_per_token", "loss_macro", "loss_as_pool", "accuracy"
"""The two losses, in nats, under the names of `metrics.json`; the loss with sources weighed as in the pool; and the share of
answers that are right."""
LOSSES = (TOKENS, MACRO)
"""The co-primary ones."""
LEVEL, POWER = 0.05, 0.8
RESAMPLES, RESAMPLED_AT_ONCE, QUANTILES = 2000, 2**22, 4000


@dataclass(frozen=True, eq=False)
class Cell:
    """One target, trained on one subset."""

    arm: str
    budget: int
    """Examples of the subset's size that is compared."""

    seed: int
    losses: pa.Table
    """`example_id`, `source`, `loss` (nats per response token), `num_response_tokens` of the held-out rows."""

    accuracy: float | None
    supervised_tokens: int
    """Response tokens seen in training."""

    steps: int
    diverged: bool

    @property
    def name(self) -> str:
        """Names it in a message."""
        return f"{self.arm}-{self.budget}-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class HeldOutLosses:
    """The losses of all cells on the same rows, R of them, from S sources."""

    losses: Mapping[str, Floats]
    """By the cell's name, (R,)."""

    tokens_R: Floats
    sources_R: NDArray[np.int64]
    pool_S: Floats | None = None
    """Rows of each source in the pool, where that is known."""

    @classmethod
    def of(cls, cells: Sequence[Cell], pool: Mapping[str, int] | None = None) -> HeldOutLosses:
        """`pool`: rows of each source in the pool. Raises DataError naming a cell that was evaluated on other rows."""
        first = cells[0].losses.sort_by("example_id")
        same = ["example_id", "source", "num_response_tokens"]
        found = {}
        for cell in cells:
            table = cell.losses.sort_by("example_id")
            if not table.select(same).equals(first.select(same)):
                raise DataError(f"the cells {cells[0].name} and {cell.name} were evaluated on different rows. Remove one.")
            found[cell.name] = table["loss"].to_numpy().astype(np.float64)
        if not len(first):
            raise DataError("no held-out row has a response token: nothing can be compared. Raise examples.held_out_fraction.")
        names, sources_R = np.unique(first["source"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
        pool_S = None if pool is None else np.array([pool.get(str(name), 0) for name in names], np.float64)
        tokens_R = first["num_response_tokens"].to_numpy().astype(np.float64)
        return cls(found, tokens_R, sources_R.astype(np.int64), pool_S if pool_S is not None and pool_S.sum() else None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The losses that there are."""
        return (TOKENS, MACRO) if self.pool_S is None else (TOKENS, MACRO, POOL)

    def mean(self, values_R: Floats, kind: str) -> float:
        """Over tokens, or over tokens within each source and then over sources, alike or by their rows in the pool."""
        return float(self._means(values_R[None], np.ones((1, len(values_R))), kind)[0, 0])

    def _means(self, values_DR: Floats, counts_WR: Floats, kind: str) -> Floats:
        """The mean of each of D values per row when row r counts `counts_WR[w, r]` times, (W, D)."""
        tokens_WR = counts_WR * self.tokens_R
        if kind == TOKENS:
            return np.asarray(tokens_WR @ values_DR.T / tokens_WR.sum(axis=1, keepdims=True))
        sums = []
        for source in range(int(self.sources_R.max()) + 1):
            is_here = self.sources_R == source
            here_WR = tokens_WR[:, is_here]
            sums.append(here_WR @ values_DR[:, is_here].T / here_WR.sum(axis=1, keepdims=True))
        return np.asarray(np.average(sums, axis=0, weights=self.pool_S if kind == POOL else None))

    def bootstrap(self, values_DR: Floats) -> dict[str, Floats]:
        """95% intervals of means over rows drawn anew within each source, (D, 2) for each loss."""
        generator = np.random.default_rng(0)
        at_once = max(1, RESAMPLED_AT_ONCE // len(self.tokens_R))
        found: dict[str, list[Floats]] = {kind: [] for kind in self.kinds}
        for start in range(0, RESAMPLES, at_once):
            number = min(at_once, RESAMPLES - start)
            counts_WR = np.empty((number, len(self.tokens_R)))
            for source in range(int(self.sources_R.max()) + 1):
                places = np.flatnonzero(self.sources_R == source)
                counts_WR[:, places] = generator.multinomial(len(places), np.full(len(places), 1 / len(places)), size=number)
            for kind, means in found.items():
                means.append(self._means(values_DR, counts_WR, kind))
        tails = [LEVEL / 2, 1 - LEVEL / 2]
        return {kind: np.quantile(np.concatenate(means), tails, axis=0).T for kind, means in found.items()}


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, arm minus random: below 0 the arm's loss is lower."""

    mean: float
    low: float
    high: float
    """95% interval over seeds (Student's t)."""

    deviation: float
    """Standard deviation over seeds."""

    p: float
    """Of no difference, two-sided."""

    pairs: int
    low_rows: float | None = None
    high_rows: float | None = None
    """95% interval by bootstrap over held-out rows, for these seeds."""

    p_holm: float | None = None
    """Corrected for all contrasts in loss but the primary one, and accuracies for all contrasts in accuracy; None for the
    primary one in loss."""


def paired(differences_K: Sequence[float] | Floats) -> Difference:
    """The mean of differences over K >= 2 seeds, with Student's interval. Raises DataError for one seed: it has no interval."""
    values = np.asarray(differences_K, np.float64)
    if len(values) < 2:
        raise DataError("one seed has no interval: nobody could say whether a difference is one. Compare two or more.")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    error, freedom = deviation / np.sqrt(len(values)), len(values) - 1
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, deviation, p, len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = np.argsort(p_values, kind="stable")
    raised = np.maximum.accumulate(np.asarray(p_values)[order] * (len(p_values) - np.arange(len(p_values))))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(raised, 1.0)
    return [float(value) for value in corrected]


@dataclass(frozen=True)
class GapClosed:
    """The share of the way from random to all data: (random - arm) / (random - all data)."""

    share: float
    low: float | None
    high: float | None
    """95% interval by Fieller's theorem; None where the gap itself is not clearly above 0, so that any share may be true."""


def gap_closed(random_K: Floats, arm_K: Floats, full: Floats) -> GapClosed | None:
    """From losses of the pairs (K,) and of all data (F,), F >= 1; None where all data is no better than random.

    With one target on all data its variance is taken to be that of random's.
    """
    number, gains_K = len(random_K), random_K - arm_K
    gain, gap = float(gains_K.mean()), float(random_K.mean() - full.mean())
    if gap <= 0:
        return None
    covariance = np.cov(random_K, gains_K) / number
    of_full = float((full if len(full) > 1 else random_K).var(ddof=1)) / len(full)
    var_gap, var_gain, both = float(covariance[0, 0]) + of_full, float(covariance[1, 1]), float(covariance[0, 1])
    return ratio_of_means(gain, gap, var_gain, var_gap, both, number)


def ratio_of_means(gain: float, gap: float, var_gain: float, var_gap: float, both: float, number: int) -> GapClosed:
    """gain / gap with its interval. `var_gain`, `var_gap`, `both`: variances and covariance of the two means, over a `number`
    of pairs; `gap` is not 0."""
    squared = float(stats.t.ppf(1 - LEVEL / 2, number - 1)) ** 2
    a, b, c = gap**2 - squared * var_gap, gain * gap - squared * both, gain**2 - squared * var_gain
    if a <= 0 or b**2 < a * c:
        return GapClosed(gain / gap, None, None)
    root = np.sqrt(b**2 - a * c)
    return GapClosed(gain / gap, float((b - root) / a), float((b + root) / a))


def detectable_difference(deviation: float, seeds: int) -> float:
    """The smallest true difference that a paired t-test at the 5% level sees in 8 of 10 comparisons of so many seeds.

    `deviation`: of the paired difference from seed to seed; the result is in its unit.
    """
    # The noncentral t as a mean over the estimated variance: scipy's own gives NaN for few seeds.
    scales = np.sqrt(stats.chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, seeds - 1) / (seeds - 1))
    bounds = stats.t.ppf(1 - LEVEL / 2, seeds - 1) * scales

    def missing(size: float) -> float:
        shift = size * np.sqrt(seeds)
        return float((stats.norm.sf(bounds - shift) + stats.norm.cdf(-bounds - shift)).mean()) - POWER

    return deviation * float(optimize.brentq(missing, 1e-6, 100.0))


@dataclass(frozen=True)
class Row:
    """An arm at a budget. Differences are to random; None for random itself and for all data."""

    arm: str
    budget: int
    seeds: int
    """Pairs with finite losses."""

    diverged: int
    """Cells whose loss was not finite: they are in no mean."""

    steps: int
    supervised_tokens: float
    """Response tokens seen in training, the mean over seeds."""

    means: dict[str, float | None]
    """`loss_per_token`, `loss_macro` (nats) and `accuracy`, over seeds."""

    differences: dict[str, Difference] = field(default_factory=dict)
    gap_closed: dict[str, GapClosed | None] = field(default_factory=dict)
