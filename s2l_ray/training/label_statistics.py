"""From the losses of labels to numbers of an example: their mean, which is its loss, and what their mean leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class LossStatistics(NamedTuple):
    """What is recorded of each example's labels, float32 (N,) each, in nats.

    An example of several rows (a conversation that is split) is one sequence of labels, row after row. Its thirds have
    ceil(n / 3) of its n labels each: the one label of one, the first and the second of two, the first and the third of three,
    the first two and the last two of four.
    """

    losses: NDArray[np.float32]
    """The mean."""

    deviations: NDArray[np.float32]
    """The standard deviation of the labels themselves (divided by n); 0 for one label."""

    first_thirds: NDArray[np.float32]
    """The mean of the first third."""

    last_thirds: NDArray[np.float32]
    """The mean of the last third."""


@dataclass(frozen=True, eq=False)
class ExampleLabels:
    """Which example each of P labels is of, in whatever order batches have them. Sums are in float64."""

    rows_P: NDArray[np.int64]
    """The row number of every label; the labels of a row are in order."""

    owners_R: NDArray[np.int64]
    """The number of each row's example."""

    num_labels_N: NDArray[np.float64]
    """Labels of each example, none without."""

    def means(self, losses_P: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mean loss of each example's labels, float32 (N,)."""
        return self._means(losses_P).astype(np.float32)

    def statistics(self, losses_P: NDArray[np.float32]) -> LossStatistics:
        """All that is recorded of the labels' losses; the mean is that of `means`, to the byte."""
        means_N, losses_P = self._means(losses_P), losses_P.astype(np.float64)
        deviations_N = np.sqrt(self._sums((losses_P - means_N[self._owners_P]) ** 2) / self.num_labels_N)
        thirds = (self._sums(np.where(is_in_P, losses_P, 0.0)) / self._third_N for is_in_P in self._is_in_thirds_P)
        return LossStatistics(*(values_N.astype(np.float32) for values_N in (means_N, deviations_N, *thirds)))

    def _means(self, losses_P: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._sums(losses_P.astype(np.float64)) / self.num_labels_N

    def _sums(self, values_P: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(self._owners_P, weights=values_P), np.float64)

    @cached_property
    def _owners_P(self) -> NDArray[np.int64]:
        return self.owners_R[self.rows_P]

    @property
    def _third_N(self) -> NDArray[np.float64]:
        """Labels in a third of each example."""
        return np.asarray(np.ceil(self.num_labels_N / 3))

    @cached_property
    def _is_in_thirds_P(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether each label is in the first, and in the last third of its example."""
        order_P = np.lexsort((self.rows_P, self._owners_P))
        counts_N = self.num_labels_N.astype(np.int64)
        places_P = np.empty(len(order_P), np.int64)
        places_P[order_P] = np.arange(len(order_P)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        third_P, counts_P = self._third_N[self._owners_P], self.num_labels_N[self._owners_P]
        return places_P < third_P, places_P >= counts_P - third_P
