"""The other ways to choose a subset, over the same trajectories: what S2L has to beat, and what explains it.

Each is one small function that puts all rows into one order; a subset is the first B of it, so that budgets nest. Nothing but
a row's numbers and the seed decides its place. To add one: write such a function under `@selector`, with what it needs of the
trajectories and the paper it comes from, and put its name into `config.methods.Method`; `s2l select --method`, `s2l compare`
and the tests find it there.

All rows' numbers are in memory (S2L itself streams): a few dozen bytes a row and the losses, for `rds_plus` the
embeddings, too.

Weights: of a sample from strata the size of a row's stratum over the number taken from it, so that the weighted subset
estimates the pool; of an order by scores 1, since it estimates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from s2l_ray.errors import ConfigError

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]

S2L = "s2l"
SOURCES, TOKENS, GROUPS = "source", "num_response_tokens", "groups"
NO_PROMPT, EMBEDDING, VALIDATION = "loss_without_prompt", "embedding", "validation_embedding"
_REMEDIES = {
    SOURCES: "the corpus must name several sources (examples.source_field; for files of trajectories a column source)",
    TOKENS: "the trajectories need the column num_response_tokens",
    NO_PROMPT: "record it with trajectories.without_prompt=true",
    EMBEDDING: "record it with trajectories.embeddings=true",
    VALIDATION: "record it with trajectories.embeddings=true and an examples.validation_fraction above 0",
}
DECILES = 10


@dataclass(frozen=True, eq=False)
class Pool:
    """What a selector sees of N rows, in ascending order of ids."""

    losses_NT: Floats
    """Nats per response token."""

    priorities_N: NDArray[np.uint64]
    """Random numbers of the rows, as the random control has them: what is equal is taken in their order."""

    shared: Callable[[Integers, float], Integers]
    """All rows in an order that takes from groups (one number a row) shares that grow with their size to a power; inside a
    group by priority."""

    s2l: Callable[[], Integers]
    """All rows in the order in which S2L takes them."""

    num_clusters: int
    sources_N: Integers | None = None
    """The source of each row, as a number; None where there are not two."""

    columns: Mapping[str, Floats] = field(default_factory=dict)
    """Other measurements: `num_response_tokens` (N,), `loss_without_prompt` (N,), `embedding` (N, H), `validation_embedding`
    (V, H)."""

    def by_score(self, scores_N: Floats) -> Integers:
        """All rows, the highest score first."""
        return np.lexsort((self.priorities_N, -np.asarray(scores_N, np.float64)))

    @cached_property
    def final_N(self) -> NDArray[np.float64]:
        """The last loss of each row."""
        return self.losses_NT[:, -1].astype(np.float64)


@dataclass(frozen=True)
class Selector:
    """A way to choose."""

    name: str
    order: Callable[[Pool], Integers]
    """All rows (N,), the first taken first."""

    needs: tuple[str, ...] = ()
    min_points: int = 1
    paper: str = ""
    is_target_aware: bool = False
    """Whether it looks at rows of the kind that the target is evaluated on."""

    strata: Callable[[Pool], Integers] | None = None
    """The strata that it samples from, one number a row, where its weights are their sizes over their quotas; None where the
    order goes by scores, which estimate nothing."""

    def check(self, found: Collection[str], num_points: int) -> None:
        """Raise ConfigError where trajectories lack what it needs, saying how to record it.

        `found`: `SOURCES` where there are two sources or more, and the names of the other columns.
        """
        for name in self.needs:
            if name != GROUPS and name not in found:
                raise ConfigError(f"selection.method={self.name} needs {name}: {_REMEDIES[name]}.")
        if num_points < self.min_points:
            raise ConfigError(
                f"selection.method={self.name} needs trajectories of {self.min_points} points or more, these have "
                f"{num_points}: record more checkpoints (proxy.num_checkpoints)."
            )

    @property
    def reads_groups(self) -> bool:
        """Whether groups, or how many there are, decide what it takes."""
        return GROUPS in self.needs or self.strata is _loss_bands

    @property
    def about(self) -> str:
        """What it does, in one line."""
        return (self.order.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ")


SELECTORS: dict[str, Selector] = {}


def selector(
    *needs: str,
    min_points: int = 1,
    paper: str = "",
    is_target_aware: bool = False,
    strata: Callable[[Pool], Integers] | None = None,
) -> Callable[[Callable[[Pool], Integers]], Callable[[Pool], Integers]]:
    """Make a function known by its name."""

    def known(order: Callable[[Pool], Integers]) -> Callable[[Pool], Integers]:
        name = order.__name__
        SELECTORS[name] = Selector(name, order, needs, min_points, paper, is_target_aware, strata)
        return order

    return known


# --- samples -------------------------------------------------------------------------------------------------------


def _one(pool: Pool) -> Integers:
    return np.zeros(len(pool.losses_NT), np.int64)


def _sources(pool: Pool) -> Integers:
    assert pool.sources_N is not None
    return pool.sources_N


def _sources_and_deciles(pool: Pool) -> Integers:
    tokens_N = pool.columns[TOKENS]
    edges = np.quantile(tokens_N, np.arange(1, DECILES) / DECILES)
    return np.asarray(_sources(pool) * DECILES + np.searchsorted(edges, tokens_N, side="right"))


def _loss_bands(pool: Pool) -> Integers:
    ranks_N = np.empty(len(pool.final_N), np.int64)
    ranks_N[np.lexsort((pool.priorities_N, pool.final_N))] = np.arange(len(ranks_N))
    return ranks_N * pool.num_clusters // len(ranks_N)


@selector(strata=_one)
def random(pool: Pool) -> Integers:
    """A random sample: the rival of all others."""
    return np.argsort(pool.priorities_N, kind="stable")


@selector(SOURCES, strata=_sources)
def source_proportional(pool: Pool) -> Integers:
    """Of each source its share of the pool, at random."""
    return pool.shared(_sources(pool), 1.0)


@selector(SOURCES, strata=_sources)
def source_balanced(pool: Pool) -> Integers:
    """Of each source equally much, at random, as far as it goes."""
    return pool.shared(_sources(pool), 0.0)


@selector(SOURCES, GROUPS, strata=_sources)
def source_matched(pool: Pool) -> Integers:
    """Random rows with the source counts of S2L's own subset: what is left to the groups is the difference."""
    return _matched(pool, _sources(pool))


@selector(SOURCES, TOKENS, GROUPS, strata=_sources_and_deciles)
def source_and_length_matched(pool: Pool) -> Integers:
    """Random rows with the counts of S2L's own subset by source and decile of response length.

    Deciles of the whole pool; equally long responses are in one, so that few lengths give fewer of them.
    """
    return _matched(pool, _sources_and_deciles(pool))


@selector(GROUPS, paper="2403.07384")
def s2l(pool: Pool) -> Integers:
    """SmallToLarge: equal shares of groups of examples that a small model learns alike."""
    return pool.s2l()


@selector(strata=_loss_bands)
def final_loss_strata(pool: Pool) -> Integers:
    """As many bands of the final loss as S2L has groups, each of equally many rows, in equal shares: S2L without
    trajectories."""
    return pool.shared(_loss_bands(pool), 0.0)


def _matched(pool: Pool, cells_N: Integers) -> Integers:
    """Random rows in S2L's order of cells: at each place the next row of the cell that S2L takes a row of there. No cell runs
    out, since S2L takes a row of it no more often than it has one."""
    wanted_M, random_M = cells_N[pool.s2l()], np.argsort(pool.priorities_N, kind="stable")
    places = np.argsort(wanted_M, kind="stable")
    order_N = np.empty(len(wanted_M), np.int64)
    order_N[places] = random_M[np.argsort(cells_N[random_M], kind="stable")]
    return order_N


# --- scores --------------------------------------------------------------------------------------------------------


@selector(paper="2309.04564")
def middle_perplexity(pool: Pool) -> Integers:
    """Rows whose final loss is nearest to the median."""
    return pool.by_score(-np.abs(pool.final_N - np.median(pool.final_N)))


@selector(paper="1906.11829")
def least_confidence(pool: Pool) -> Integers:
    """Rows of the highest final loss."""
    return pool.by_score(pool.final_N)


@selector(min_points=2, paper="2310.13008")
def high_learnability(pool: Pool) -> Integers:
    """Rows whose loss falls most from the first point to the last."""
    return pool.by_score(pool.losses_NT[:, 0].astype(np.float64) - pool.final_N)


@selector(min_points=2, paper="2009.10795")
def ambiguous(pool: Pool) -> Integers:
    """Rows whose probability per token varies most over the points (dataset cartography)."""
    return pool.by_score(np.exp(-pool.losses_NT.astype(np.float64)).std(axis=1))


@selector(TOKENS, paper="2402.04833")
def longest(pool: Pool) -> Integers:
    """Rows of the longest responses."""
    return pool.by_score(pool.columns[TOKENS])


@selector(NO_PROMPT, paper="2308.12032")
def ifd(pool: Pool) -> Integers:
    """Instruction-following difficulty: the loss with the prompt over that without, the highest ratio below 1 first.

    Rows to which the prompt is of no help (a ratio of 1 or more) come last.
    """
    ratios_N = pool.final_N / np.maximum(pool.columns[NO_PROMPT].astype(np.float64), 1e-9)
    return pool.by_score(np.where(ratios_N < 1, ratios_N, -ratios_N))


@selector(EMBEDDING, VALIDATION, paper="2503.01807", is_target_aware=True)
def rds_plus(pool: Pool) -> Integers:
    """Rows most alike to the validation rows, by the cosine of weighted mean hidden states, one for each of these in turn.

    A validation row whose turn comes to a row that another has already taken goes without, as in the paper's code.
    """
    rows_NH, wanted_VH = (_unit(pool.columns[name]) for name in (EMBEDDING, VALIDATION))
    turns_N = np.full(len(rows_NH), np.iinfo(np.int64).max)
    for number, wanted_H in enumerate(wanted_VH):
        best_first = pool.by_score(rows_NH @ wanted_H)
        turns_N[best_first] = np.minimum(turns_N[best_first], np.arange(len(rows_NH)) * len(wanted_VH) + number)
    return np.argsort(turns_N)


def _unit(rows: Floats) -> Floats:
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
