"""What of a trajectory k-means sees: the losses themselves, or how they fell, or their shape, or their directions.

    raw        the losses (the paper)
    reduction  how much the loss has fallen since the first point: T - 1 features
    shape      the losses minus their mean: what is left when the level is taken away
    whitened   the principal components, each with variance 1
    profile    the losses beside the statistics of an example's labels (`trajectories.statistics`): 4 T features. Each of the
               four blocks is divided by one number, the root of its variance averaged over its points: so the four weigh
               the same, and inside a block the curve keeps its shape

Of all points, or of the `points` that are asked for; the scales and components are those of a sample of the rows. All are
linear in what is recorded and lie on a grid of 2**-20 around a center, so that sums of them in float64 are exact: the
same centroids for any order of the rows and any number of threads. The center matters: faiss computes squared distances as
|x|^2 - 2xc + |c|^2, and 10 nats away from zero gave 47 of 100,000 rows another centroid than the nearest, around it none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats
from s2l_ray.errors import ConfigError
from s2l_ray.trajectories.loss_columns import LOSSES, STATISTICS, losses_matrix

GRID = np.float32(2**20)
# Components with less of the variance than this are rounding errors, and whitening would blow them up.
MIN_SHARE = 1e-6

Kind = Literal["raw", "reduction", "shape", "whitened", "profile"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The principal components of trajectories, largest first."""

    variances_T: NDArray[np.float64]
    """In squared nats."""

    directions_TT: NDArray[np.float64]
    """One per column, unit length, the largest entry positive."""

    @classmethod
    def of(cls, losses_NT: Floats) -> Spectrum:
        """The components of some trajectories, losses in nats of shape (N, T).

        Sums run over columns one pair after the other and not through a matrix product, whose order of additions may
        depend on the number of threads.
        """
        columns = [column - column.mean() for column in losses_NT.T.astype(np.float64, order="C")]
        covariance_TT = np.zeros((len(columns), len(columns)))
        for row, left in enumerate(columns):
            for column, right in enumerate(columns[: row + 1]):
                covariance_TT[row, column] = covariance_TT[column, row] = float((left * right).sum()) / len(losses_NT)
        variances_T, directions_TT = np.linalg.eigh(covariance_TT)
        variances_T, directions_TT = np.maximum(variances_T[::-1], 0), directions_TT[:, ::-1]
        largest_T = directions_TT[np.abs(directions_TT).argmax(axis=0), np.arange(len(variances_T))]
        return cls(variances_T, directions_TT * np.where(largest_T < 0, -1.0, 1.0))

    @property
    def shares_T(self) -> NDArray[np.float64]:
        """Share of the variance in each component; zeros where trajectories do not differ."""
        total = self.variances_T.sum()
        return self.variances_T / total if total else np.zeros_like(self.variances_T)

    @property
    def effective_dimension(self) -> float:
        """Participation ratio (sum of variances)^2 / sum of squares: T where all are equal, 1 where one holds everything."""
        squares = float((self.variances_T**2).sum())
        return float(self.variances_T.sum()) ** 2 / squares if squares else 0.0


@dataclass(frozen=True)
class Measured:
    """Which columns of a store k-means sees, and which of their points."""

    columns: tuple[str, ...]
    points: tuple[int, ...] | None = None
    """Ascending, from 0; None for all."""

    num_points: int = 0
    """Of the trajectories."""

    @classmethod
    def of(cls, kind: Kind, num_points: int, points: Sequence[int] | None = None) -> Measured:
        """What features of a kind need of trajectories of so many points. Raises ConfigError for points that they lack."""
        columns = (LOSSES, *STATISTICS) if kind == "profile" else (LOSSES,)
        if points is None:
            return cls(columns, None, num_points)
        beyond = [point for point in points if not -num_points <= point < num_points]
        if beyond:
            raise ConfigError(
                f"clustering.points: no point {beyond[0]} in trajectories of {num_points} points. Give 0 to {num_points - 1}, "
                "or -1 for the last and so on."
            )
        found = sorted(point % num_points for point in points)
        twice = [point for point, after in itertools.pairwise(found) if point == after]
        if twice:
            raise ConfigError(
                f"clustering.points: {twice[0]} and {twice[0] - num_points} are the same point of {num_points}. Give it once."
            )
        return cls(columns, None if len(found) == num_points else tuple(found), num_points)

    @property
    def width(self) -> int:
        """Numbers of each row."""
        return len(self.columns) * (self.num_points if self.points is None else len(self.points))

    def __call__(self, block: pa.Table) -> Floats:
        """What is measured of a block's rows, float32 (M, width): the points of one column after those of another."""
        matrices = [losses_matrix(block, name) for name in self.columns]
        if self.points is not None:
            matrices = [np.ascontiguousarray(values_MT[:, self.points]) for values_MT in matrices]
        return matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)


@dataclass(frozen=True, eq=False)
class Features:
    """The map from what is measured to what k-means sees."""

    kind: Kind
    center_T: Floats
    weights_TF: NDArray[np.float64] | None
    """For `whitened`: the directions over the standard deviations."""

    scales_T: NDArray[np.float64] | None = None
    """For `profile`: what each number is divided by, the same for all points of a statistic."""

    spectrum: Spectrum = field(default_factory=lambda: Spectrum(np.zeros(1), np.ones((1, 1))))
    """The principal components of the features."""

    @classmethod
    def of(cls, kind: Kind, sample_ST: Floats, spectrum: Spectrum) -> Features:
        """The map for a corpus from a sample of what is measured, shape (S, T) and on the grid: the center is the median, which
        one outlier does not move away from all others. `spectrum`: of the losses. Raises ConfigError where the trajectories
        are too short for the features."""
        center_T = on_grid(np.median(sample_ST, axis=0))
        if kind not in ("raw", "profile") and len(center_T) < 2:
            raise ConfigError(
                f"clustering.features: '{kind}' needs trajectories of two points at least, these have one. Use 'raw'."
            )
        weights_TF = scales_T = None
        if kind == "whitened":
            kept = spectrum.shares_T > MIN_SHARE
            if not kept.any():
                kept[0] = True
            deviations = np.sqrt(np.maximum(spectrum.variances_T[kept], np.finfo(np.float64).tiny))
            weights_TF = spectrum.directions_TT[:, kept] / (deviations if spectrum.variances_T.any() else 1.0)
        elif kind == "profile":
            scales_T = _scales(sample_ST)
        features = cls(kind, center_T, weights_TF, scales_T)
        return replace(features, spectrum=spectrum if kind == "raw" else Spectrum.of(features(sample_ST)))

    @property
    def num_features(self) -> int:
        """F."""
        if self.weights_TF is not None:
            return int(self.weights_TF.shape[1])
        return len(self.center_T) - (self.kind == "reduction")

    def __call__(self, losses_NT: Floats) -> Floats:
        """Features of some rows of what is measured, in nats: float32, shape (N, F), on the grid; each row's depend on that row
        alone."""
        values_NT = on_grid(losses_NT)
        values_NT -= self.center_T
        if self.kind == "raw":
            features = values_NT
        elif self.kind == "reduction":
            features = values_NT[:, :1] - values_NT[:, 1:]
        elif self.kind == "shape":
            mean_N = _sum_of_columns(values_NT, np.full(values_NT.shape[1], 1 / values_NT.shape[1]))
            features = on_grid(values_NT - mean_N[:, None])
        elif self.scales_T is not None:
            features = on_grid(values_NT / self.scales_T)
        else:
            assert self.weights_TF is not None
            columns = [_sum_of_columns(values_NT, weights_T) for weights_T in self.weights_TF.T]
            features = on_grid(np.stack(columns, axis=1))
        found = np.ascontiguousarray(features, np.float32)
        found += np.float32(0)  # minus zero becomes zero: equal rows have equal bytes
        return found


def _scales(sample_SI: Floats) -> NDArray[np.float64]:
    """For each number of a profile the root of its statistic's variance, averaged over the points; 1 for a statistic that
    does not vary by more than the grid shows."""
    variances_I = np.array([column.var() for column in sample_SI.T.astype(np.float64, order="C")])
    of_statistics = np.sqrt(variances_I.reshape(1 + len(STATISTICS), -1).mean(axis=1))
    return np.repeat(np.where(of_statistics > 1 / GRID, of_statistics, 1.0), len(variances_I) // (1 + len(STATISTICS)))


def on_grid(values: NDArray[np.floating[Any]]) -> Floats:
    """Values of any shape rounded to multiples of 2**-20, as float32."""
    scaled = np.asarray(values * GRID)
    np.rint(scaled, out=scaled)
    scaled /= GRID
    return np.asarray(scaled, np.float32)


def _sum_of_columns(values_NT: Floats, weights_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted sum of each row, one column after the other: a matrix product may add in another order in another block."""
    total_N = np.zeros(len(values_NT))
    for column, weight in zip(values_NT.T, weights_T, strict=True):
        total_N += column * weight
    return total_N
