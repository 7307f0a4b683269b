"""Searches for the nearest centroid, and Hamerly's bounds that save most of them, exactly (2010, "Making k-means even faster").

A row stays with its centroid while an upper bound of the distance to it is below a lower bound of the distance to any other.
When centroids move, the upper bound rises by the move of the row's own centroid and the lower bound falls by the largest
move of the others. The sum of the two is the *drift* of a centroid. Only the difference of the bounds matters, so that one
number a row is enough: its *gap*, the lower bound minus the upper bound when the row was last searched, plus its centroid's
total drift of then. The row is settled while its gap is above the drift of now. What is skipped is what a search would not
have changed.

Of the others only neighbours count. Let no row of a centroid lie farther from it than r, its *radius*, and the nearest other
centroid at distance s. A centroid at s + 2r or farther is farther from every row than the row's own by s at least, the nearest
other one by s at most: whichever is far, and however it moved there, it does not decide the difference of the bounds. So a
centroid that wanders costs searches along its way alone.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from s2l_ray.clustering.columns import Floats, Ints
from s2l_ray.clustering.threads import faiss

Search = Literal["nearest", "two", "bounded"]
"""How a pass finds the nearest centroids: all rows for one neighbour; all for two, which sets the bounds; or for two only
the rows that the bounds do not settle."""

# Distances of so many centroids to all are in memory at once.
_CENTROIDS_AT_ONCE = 256


def drift_of(moved_K: NDArray[np.float64], centroids_KF: Floats, radii_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much the bounds of the rows of each centroid approach each other when all centroids move, shape (K,).

    `moved_K`: the distance that each centroid moved, in the units of the features; `centroids_KF`: where they are now;
    `radii_K`: how far from there the rows of each may lie.
    """
    centroids_KF = centroids_KF.astype(np.float64)
    squares_K = (centroids_KF**2).sum(axis=1)
    largest_K = np.zeros(len(moved_K))
    for start in range(0, len(moved_K), _CENTROIDS_AT_ONCE):
        some = slice(start, start + _CENTROIDS_AT_ONCE)
        squares_MK = squares_K[some, None] - 2 * centroids_KF[some] @ centroids_KF.T + squares_K
        distances_MK = np.sqrt(np.maximum(squares_MK, 0))
        own = np.arange(len(distances_MK)), np.arange(len(moved_K))[some]
        distances_MK[own] = np.inf
        reach_M = (distances_MK.min(axis=1) + 2 * radii_K[some]) * (1 + 1e-6)
        largest_K[some] = np.where(distances_MK <= reach_M[:, None], moved_K, 0).max(axis=1)
    return np.asarray(moved_K + largest_K)


def is_unsettled(gaps_N: Floats, labels_N: Ints, drift_K: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a row may have another nearest centroid than its own, shape (N,)."""
    return np.asarray(gaps_N <= _rounded_up(drift_K).take(labels_N))


def nearest_centroids(
    features_NF: Floats, labels_N: Ints, gaps_N: Floats, centroids_KF: Floats, drift_K: NDArray[np.float64], search: Search
) -> tuple[Ints, Floats, NDArray[np.float64]]:
    """Searches all of these rows: the nearest centroid and the new gap of each, shape (N,) both, and the radius of each
    centroid over them, shape (K,).

    `labels_N` are the centroids of before, -1 where there are none, and `gaps_N` the gaps: read only where one neighbour is
    looked for. `drift_K` is the total drift up to now.
    """
    # Of the same type as the bounds: else numpy takes thirty times as long for the largest of each.
    radii_K = np.zeros(len(centroids_KF), np.float32)
    if search == "nearest" and len(centroids_KF) > 1:
        squares_N1, labels_N1 = faiss.knn(features_NF, centroids_KF, 1)
        new_N = labels_N1[:, 0].astype(np.int32)
        uppers_N = _upper_bounds(squares_N1[:, 0], _error_of_squares(features_NF, centroids_KF))
        # Where another centroid is nearest now, all that is known of the others is that they are no nearer.
        gaps_N = np.where(new_N == labels_N, gaps_N, _rounded_down(drift_K)[new_N])
    else:
        new_N, gaps_N, uppers_N = _nearest_of_two(features_NF, centroids_KF, drift_K)
    np.maximum.at(radii_K, new_N, uppers_N)
    return new_N, gaps_N, radii_K.astype(np.float64)


def squares_to_nearest(features_NF: Floats, centroids_KF: Floats) -> NDArray[np.float64]:
    """Squared distances to the nearest centroids, shape (N,), never zero."""
    squares_N: NDArray[Any] = faiss.knn(features_NF, centroids_KF, 1)[0][:, 0]
    return np.maximum(squares_N.astype(np.float64), 1e-30)


def _nearest_of_two(features_NF: Floats, centroids_KF: Floats, drift_K: NDArray[np.float64]) -> tuple[Ints, Floats, Floats]:
    """The nearest centroids, the rows' gaps, and upper bounds of the distances to the nearest."""
    if len(centroids_KF) == 1:
        none_N = np.zeros(len(features_NF), np.float32)
        return none_N.astype(np.int32), np.full(len(features_NF), np.inf, np.float32), none_N
    squares_N2, labels_N2 = faiss.knn(features_NF, centroids_KF, 2)
    new_N = labels_N2[:, 0].astype(np.int32)
    error = _error_of_squares(features_NF, centroids_KF)
    lower_N = np.sqrt(np.maximum(squares_N2[:, 1] - error, 0))
    upper_N = _upper_bounds(squares_N2[:, 0], error)
    return new_N, (lower_N - upper_N) * np.float32(1 - 1e-6) + _rounded_down(drift_K)[new_N], upper_N


def _error_of_squares(features_NF: Floats, centroids_KF: Floats) -> np.float32:
    """How far faiss's squared distances may be off: it computes |x|^2 - 2xc + |c|^2 in float32."""
    largest = np.einsum("nf,nf->n", features_NF, features_NF).max() + np.einsum("kf,kf->k", centroids_KF, centroids_KF).max()
    return np.float32(largest * (features_NF.shape[1] + 8) * 2.0**-23)


def _upper_bounds(squares_N: Floats, error: np.float32) -> Floats:
    """Of distances, by their squares."""
    return np.asarray(np.sqrt(np.maximum(squares_N, 0) + error))


def _rounded_up(drift_K: NDArray[np.float64]) -> Floats:
    """The drift in float32, larger by more than a gap in float32 may have lost."""
    return (drift_K * (1 + 1e-6) + 1e-30).astype(np.float32)


def _rounded_down(drift_K: NDArray[np.float64]) -> Floats:
    return (drift_K * (1 - 1e-6)).astype(np.float32)
