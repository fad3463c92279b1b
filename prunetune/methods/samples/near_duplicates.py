"""Rows that say nearly the same as another one, by MinHash."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES
from prunetune.methods.samples._repeats import Keep, RepeatFilter, precedence, texts
from prunetune.model.score_table import ScoreTable

_WORD = re.compile(r"\w+")
# Candidates are verified afterwards, so bands are cut to miss little rather than to find little.
_ERROR_WEIGHTS = (0.1, 0.9)
# Of the hash functions, not of the run: one row's signature is the same in every run.
_HASH_SEED = 1


class NearDuplicatesOptions(MethodOptions):
    """Options of near_duplicates."""

    of: Literal["both", "prompt", "answer", "joined"] = Field(
        "both", description="what must be alike; both: prompt and answer each; joined: the two as one text"
    )
    threshold: float = Field(0.7, gt=0, le=1, description="Jaccard similarity of the sets of n-grams")
    ngram: int = Field(5, ge=1, description="words in a row that are compared as one")
    permutations: int = Field(128, ge=16, le=1024, description="hash functions; more miss less and take longer")
    keep: Keep = Field("longest", description="which of two stays: longest (most target tokens) or first (by id)")


@SAMPLES.register("near_duplicates")
class NearDuplicates(RepeatFilter):
    """Drops rows whose words are nearly those of another row (MinHash).

    As for pretraining text in arXiv 2107.06499, by word n-grams. Rows are taken in the order of ``keep``; one is
    dropped if a row that stayed has at least ``threshold`` of the n-grams in common (intersection over union). MinHash
    finds the candidates, the sets themselves decide. Prompt and answer are compared by themselves, because the same
    question with another answer, and the same short answer to another question, are not repeats. If fewer are asked for
    than are left, lots decide.
    """

    Options = NearDuplicatesOptions
    paper = "arXiv 2107.06499"
    needs = frozenset({"prompt", "answer"})
    reason = "near_duplicate"
    options: NearDuplicatesOptions

    def border(self) -> float:
        return self.options.threshold

    def repeats(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        repeated, similarity = np.full(len(table), -1), np.full(len(table), np.nan)
        parts = self._parts(table)
        shingles = lru_cache(maxsize=4096)(lambda text: _shingles(text, self.options.ngram))
        indexes = [_Index(self.options, shingles) for _ in range(len(parts[0]) if parts else 0)]
        for row in precedence(table, self.options.keep).tolist():
            alike: set[int] | None = None
            for index, text in zip(indexes, parts[row], strict=True):
                if alike is None or alike:
                    found = index.candidates(text)
                    alike = found if alike is None else alike & found
            best = (-1.0, -1)
            for earlier in sorted(alike or ()):
                shared = min(_jaccard(shingles(a), shingles(b)) for a, b in zip(parts[row], parts[earlier]))
                # Of equally similar ones the smallest id: row numbers must not decide.
                if shared > best[0] or (shared == best[0] and table.ids[earlier] < table.ids[best[1]]):
                    best = (shared, earlier)
            if best[0] >= self.options.threshold:
                similarity[row], repeated[row] = best
            else:
                for index, text in zip(indexes, parts[row], strict=True):
                    index.add(row, text)
        return repeated, similarity

    def _parts(self, table: ScoreTable) -> list[tuple[str, ...]]:
        if self.options.of == "joined":
            return [(" ".join(pair),) for pair in zip(table.rows["prompt"], table.rows["answer"], strict=True)]
        return texts(table, ("prompt", "answer") if self.options.of == "both" else (self.options.of,))


class _Index:
    """Texts of rows that stayed, found again by a few bands of their MinHash signatures."""

    def __init__(self, options: NearDuplicatesOptions, shingles: Callable[[str], frozenset[str]]):
        from datasketch import MinHash, MinHashLSH  # most of a second to import, and only this method needs it

        self._shingles = shingles
        self._empty = MinHash(num_perm=options.permutations, seed=_HASH_SEED)
        # Bands for a threshold of 1 would be as long as the signature.
        self._lsh = MinHashLSH(
            threshold=min(options.threshold, 0.95), num_perm=options.permutations, weights=_ERROR_WEIGHTS
        )
        self._last: tuple[str, Any] = ("", None)

    def candidates(self, text: str) -> set[int]:
        return set(self._lsh.query(self._signature(text)))

    def add(self, row: int, text: str) -> None:
        self._lsh.insert(row, self._signature(text))

    def _signature(self, text: str) -> Any:
        if self._last[1] is None or self._last[0] != text:
            signature = self._empty.copy()
            signature.update_batch([shingle.encode() for shingle in sorted(self._shingles(text))])
            self._last = (text, signature)
        return self._last[1]


def _shingles(text: str, size: int) -> frozenset[str]:
    """Every ``size`` words in a row; all words as one where they are fewer, also where there is none."""
    words = _WORD.findall(text.casefold())
    return frozenset(" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1)))


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
