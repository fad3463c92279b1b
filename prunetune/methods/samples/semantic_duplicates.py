"""Rows that mean nearly the same as another one, by their embeddings."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.core.streams import stream
from prunetune.methods.options import MethodOptions
from prunetune.methods.ranking import best_first
from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._embeddings import unit_rows
from prunetune.methods.samples._repeats import RepeatFilter
from prunetune.model.score_table import ScoreTable

# Rows compared with all earlier ones at once.
_BLOCK = 1024


class SemanticDuplicatesOptions(MethodOptions):
    """Options of semantic_duplicates."""

    epsilon: float = Field(0.05, gt=0, lt=2, description="rows repeat each other with a cosine above 1 - epsilon")
    clusters: int = Field(0, ge=0, description="rows are compared inside them; 0: the square root of the rows")
    keep: Literal["hard", "easy", "first"] = Field(
        "hard", description="which stay: far from the cluster's centre (hard), near it (easy), or first by id"
    )
    center: bool = Field(True, description="subtract the mean direction first, as all hidden states point one way")


@SAMPLES.register("semantic_duplicates")
class SemanticDuplicates(RepeatFilter):
    """Drops rows whose embedding is nearly that of another row of its cluster (SemDeDup).

    Of arXiv 2303.09540: spherical k-means; inside a cluster the rows are sorted by ``keep``, and one whose largest
    cosine with an earlier one, dropped or not, is above 1 - epsilon is dropped. Unlike in the paper the mean is
    subtracted first. If fewer are asked for than are left, lots decide.
    """

    Options = SemanticDuplicatesOptions
    paper = "arXiv 2303.09540"
    needs = frozenset({"embedding"})
    reason = "semantic_duplicate"
    options: SemanticDuplicatesOptions

    def border(self) -> float:
        return 1.0 - self.options.epsilon

    def judged(self, table: ScoreTable) -> np.ndarray:
        found = np.zeros(len(table), dtype=bool)
        found[unit_rows(table, self.options.center).rows] = True
        return found

    def repeats(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        repeated, similarity = np.full(len(table), -1), np.full(len(table), np.nan)
        units = unit_rows(table, self.options.center)
        labels_M, closeness_M = self._clusters(units.directions)
        for label in np.unique(labels_M):
            members = self._sorted(np.flatnonzero(labels_M == label), closeness_M)
            for start in range(0, len(members), _BLOCK):
                block, earlier = members[start : start + _BLOCK], members[: start + _BLOCK]
                alike = units.similarity(block, earlier)
                alike[np.arange(len(earlier))[None, :] >= start + np.arange(len(block))[:, None]] = -np.inf
                nearest = alike.argmax(axis=1)
                largest = alike[np.arange(len(block)), nearest]
                drop = largest > self.border()
                similarity[units.rows[block]] = np.where(np.isfinite(largest), largest, np.nan)
                repeated[units.rows[block[drop]]] = units.rows[earlier[nearest[drop]]]
        return repeated, similarity

    def _sorted(self, members: np.ndarray, closeness_M: np.ndarray) -> np.ndarray:
        if self.options.keep == "first":
            return members
        far = closeness_M[members] if self.options.keep == "easy" else -closeness_M[members]
        return members[best_first(far, members)]  # they are numbered by id

    def _clusters(self, x_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M,) cluster of each row and (M,) cosine to its centre."""
        count = self.options.clusters or round(math.sqrt(len(x_MD)))
        count = min(count, len(np.unique(x_MD, axis=0)))
        if count == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        from sklearn.cluster import KMeans  # more than a second to import

        seed = int(stream(self.seed, "samples.semantic_duplicates").integers(2**31))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows that are nearly equal may leave a cluster empty
            centres_CD = KMeans(count, n_init=1, random_state=seed, copy_x=True).fit(x_MD).cluster_centers_
        length_C = np.linalg.norm(centres_CD, axis=1)
        cosine_MC = x_MD @ (centres_CD / np.where(length_C > 0, length_C, 1.0)[:, None]).T
        labels_M = cosine_MC.argmax(axis=1)
        return labels_M, cosine_MC[np.arange(len(x_MD)), labels_M].astype(np.float64)
