"""Searches for the nearest centroid, and Hamerly's bounds that save most of them, exactly (2010, "Making k-means even faster").

A row stays with its centroid while an upper bound of the distance to it is below a lower bound of the distance to any other.
When centroids move, the upper bound rises by the move of the row's own centroid and the lower bound falls by the largest
move of the others. The sum of the two is the *drift* of a centroid. Only the difference of the bounds matters, so that one
number a row is enough: its *gap*, the lower bound minus the upper bound when the row was last searched, plus its centroid's
total drift of then. The row is settled while its gap is above the drift of now. What is skipped is what a search would not
have changed.
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


def drift_of(moved_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much the bounds of the rows of each centroid approach each other when all centroids move, shape (K,).

    `moved_K`: the distance that each centroid moved, in the units of the features.
    """
    largest = int(np.argmax(moved_K))
    others_K = np.full(len(moved_K), moved_K[largest])
    others_K[largest] = np.delete(moved_K, largest).max(initial=0.0)
    return np.asarray(moved_K + others_K)


def is_unsettled(gaps_N: Floats, labels_N: Ints, drift_K: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a row may have another nearest centroid than its own, shape (N,)."""
    return np.asarray(gaps_N <= _rounded_up(drift_K)[labels_N])


def nearest_centroids(
    features_NF: Floats, labels_N: Ints, gaps_N: Floats, centroids_KF: Floats, drift_K: NDArray[np.float64], search: Search
) -> Ints:
    """The nearest centroid of each row of a block, shape (N,). `gaps_N` is updated in place.

    `labels_N` are the centroids of before, -1 where there are none; `drift_K` is the total drift up to now.
    """
    if search == "two" or len(centroids_KF) == 1:
        new_N, gaps_N[:] = _nearest_of_two(features_NF, centroids_KF, drift_K)
    elif search == "nearest":
        new_N = faiss.knn(features_NF, centroids_KF, 1)[1][:, 0].astype(np.int32)
        # Where another centroid is nearest now, all that is known of the others is that they are no nearer.
        changed = np.flatnonzero(new_N != labels_N)
        gaps_N[changed] = _rounded_down(drift_K)[new_N[changed]]
    else:
        new_N, unsettled = labels_N.copy(), np.flatnonzero(is_unsettled(gaps_N, labels_N, drift_K))
        if len(unsettled):
            new_N[unsettled], gaps_N[unsettled] = _nearest_of_two(features_NF[unsettled], centroids_KF, drift_K)
    return new_N


def squares_to_nearest(features_NF: Floats, centroids_KF: Floats) -> NDArray[np.float64]:
    """Squared distances to the nearest centroids, shape (N,), never zero."""
    squares_N: NDArray[Any] = faiss.knn(features_NF, centroids_KF, 1)[0][:, 0]
    return np.maximum(squares_N.astype(np.float64), 1e-30)


def _nearest_of_two(features_NF: Floats, centroids_KF: Floats, drift_K: NDArray[np.float64]) -> tuple[Ints, Floats]:
    """The nearest centroids and the rows' gaps."""
    if len(centroids_KF) == 1:
        return np.zeros(len(features_NF), np.int32), np.full(len(features_NF), np.inf, np.float32)
    squares_N2, labels_N2 = faiss.knn(features_NF, centroids_KF, 2)
    new_N = labels_N2[:, 0].astype(np.int32)
    # How far faiss's squared distances may be off: it computes |x|^2 - 2xc + |c|^2 in float32.
    largest = np.einsum("nf,nf->n", features_NF, features_NF).max() + np.einsum("kf,kf->k", centroids_KF, centroids_KF).max()
    error = np.float32(largest * (features_NF.shape[1] + 8) * 2.0**-23)
    lower_N = np.sqrt(np.maximum(squares_N2[:, 1] - error, 0))
    upper_N = np.sqrt(np.maximum(squares_N2[:, 0], 0) + error)
    return new_N, (lower_N - upper_N) * np.float32(1 - 1e-6) + _rounded_down(drift_K)[new_N]


def _rounded_up(drift_K: NDArray[np.float64]) -> Floats:
    """The drift in float32, larger by more than a gap in float32 may have lost."""
    return (drift_K * (1 + 1e-6) + 1e-30).astype(np.float32)


def _rounded_down(drift_K: NDArray[np.float64]) -> Floats:
    return (drift_K * (1 - 1e-6)).astype(np.float32)
