"""What of a trajectory k-means sees: the losses themselves, or how they fell, or their shape, or their directions.

    raw        the losses (the paper)
    reduction  how much the loss has fallen since the first point: T - 1 features
    shape      the losses minus their mean: what is left when the level is taken away
    whitened   the principal components, each with variance 1

All are linear in the losses and lie on a grid of 2**-20 around a center, so that sums of them in float64 are exact: the
same centroids for any order of the rows and any number of threads. The center matters: faiss computes squared distances as
|x|^2 - 2xc + |c|^2, and 10 nats away from zero gave 47 of 100,000 rows another centroid than the nearest, around it none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats
from s2l_ray.errors import ConfigError

GRID = np.float32(2**20)
# Components with less of the variance than this are rounding errors, and whitening would blow them up.
MIN_SHARE = 1e-6

Kind = Literal["raw", "reduction", "shape", "whitened"]


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
        covariance_TT = np.array([[float((left * right).sum()) for left in columns] for right in columns]) / len(losses_NT)
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


@dataclass(frozen=True, eq=False)
class Features:
    """The map from losses to what k-means sees."""

    kind: Kind
    center_T: Floats
    weights_TF: NDArray[np.float64] | None
    """For `whitened`: the directions over the standard deviations."""

    @classmethod
    def of(cls, kind: Kind, sample_ST: Floats, spectrum: Spectrum) -> Features:
        """The map for a corpus from a sample of it, shape (S, T) and on the grid: the center is the median, which one outlier
        does not move away from all others. Raises ConfigError where the trajectories are too short for the features."""
        center_T = on_grid(np.median(sample_ST, axis=0))
        if kind != "raw" and len(center_T) < 2:
            raise ConfigError(
                f"clustering.features: '{kind}' needs trajectories of two points at least, these have one. Use 'raw'."
            )
        if kind != "whitened":
            return cls(kind, center_T, None)
        kept = spectrum.shares_T > MIN_SHARE
        if not kept.any():
            kept[0] = True
        deviations = np.sqrt(np.maximum(spectrum.variances_T[kept], np.finfo(np.float64).tiny))
        return cls(kind, center_T, spectrum.directions_TT[:, kept] / (deviations if spectrum.variances_T.any() else 1.0))

    @property
    def num_features(self) -> int:
        """F."""
        if self.weights_TF is not None:
            return int(self.weights_TF.shape[1])
        return len(self.center_T) - (self.kind == "reduction")

    def __call__(self, losses_NT: Floats) -> Floats:
        """Features of some rows of losses in nats: float32, shape (N, F), on the grid; each row's depend on that row alone."""
        values_NT = on_grid(losses_NT)
        values_NT -= self.center_T
        if self.kind == "raw":
            features = values_NT
        elif self.kind == "reduction":
            features = values_NT[:, :1] - values_NT[:, 1:]
        elif self.kind == "shape":
            mean_N = _sum_of_columns(values_NT, np.full(values_NT.shape[1], 1 / values_NT.shape[1]))
            features = on_grid(values_NT - mean_N[:, None])
        else:
            assert self.weights_TF is not None
            columns = [_sum_of_columns(values_NT, weights_T) for weights_T in self.weights_TF.T]
            features = on_grid(np.stack(columns, axis=1))
        # Minus zero becomes zero: equal rows have equal bytes.
        return np.ascontiguousarray(features, np.float32) + np.float32(0)


def on_grid(values: NDArray[np.floating[Any]]) -> Floats:
    """Values of any shape rounded to multiples of 2**-20, as float32."""
    return np.asarray(np.rint(values * GRID) / GRID, np.float32)


def _sum_of_columns(values_NT: Floats, weights_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted sum of each row, one column after the other: a matrix product may add in another order in another block."""
    total_N = np.zeros(len(values_NT))
    for column, weight in zip(values_NT.T, weights_T, strict=True):
        total_N += column * weight
    return total_N
