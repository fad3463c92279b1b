"""The one scoring operation: rows in, a table of per-row and per-token statistics out, from one forward pass.

Rows share a batch only if they are equally long, so nothing is padded and a row's scores do not depend on its
neighbours. Dropout is off; sums are float32.
Legend: B batch, S sequence, D hidden, N rows, T target tokens of all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from prunetune.core.console import warn
from prunetune.core.errors import ConfigError, DataError, Problem, suggest
from prunetune.data.gradients import AdamMoments, GradientFeatures
from prunetune.model.marks import Protection, paragraphs
from prunetune.model.score_table import ScoreTable
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow
from prunetune.model.token_stats import (
    TokenStats,
    evaluating,
    head_statistics,
    hidden_states,
    logit_softcap,
    output_head,
)

# What a pass can add beside the token statistics, and what it costs.
EXTRAS = {
    "last_layer": "norm of the gradient on the output layer (DONOD, last-layer gradient); T x T a row",
    "embedding": "mean last hidden state (diversity, semantic duplicates); free",
    "ifd": "loss of the answer without its prompt (IFD); a second, shorter forward pass",
    "influence": "similarity of LoRA gradients to the validation rows' (LESS); forward and backward",
}
DEFAULT_EXTRAS = ("last_layer", "embedding")


@dataclass(frozen=True)
class ScoringOptions:
    """What is found beside the token statistics.

    Args:
        extras: names from EXTRAS.
        batch_tokens: tokens of a forward pass at most.
        final_answer: regular expression of the beginning of a final answer, which is protected.
    """

    extras: tuple[str, ...] = DEFAULT_EXTRAS
    batch_tokens: int = 4096
    final_answer: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.extras if name not in EXTRAS]
        if unknown:
            raise ConfigError(
                [Problem(f"no such statistic: {name}; {suggest(name, EXTRAS)}", "--with") for name in unknown]
            )


class Scorer:
    """Finds the statistics of rows with one model, and with a reference model if there is one.

    Args:
        model: a ``*ForCausalLM`` or a PeftModel around one.
        tokenizer: its tokenizer.
        options: what to find.
        reference: another model of the same tokenizer, or ``"base"``: the PeftModel with its adapters off.
        validation: rows that the influence is about.
        moments: Adam's moments of the run that trained the adapters, for the influence.

    Raises:
        DataError: the reference has another vocabulary, or ``influence`` has no validation rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: ScoringOptions,
        *,
        reference: Any = None,
        validation: Sequence[TokenRow] = (),
        moments: AdamMoments | None = None,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.options, self.reference = model, tokenizer, options, reference
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        self.head, self.softcap = output_head(causal), logit_softcap(causal.config)
        if reference == "base" and not isinstance(model, PeftModel):
            raise DataError("the reference is the model with its adapters off, but the model has no adapters")
        if reference is not None and reference != "base" and reference.config.vocab_size != causal.config.vocab_size:
            raise DataError(
                f"the reference has {reference.config.vocab_size} tokens in its vocabulary and the model "
                f"{causal.config.vocab_size}: their losses are about different tokens. Take one of the same tokenizer"
            )
        self._last_layer = "last_layer" in options.extras and self.softcap is None and self.head.bias is None
        if "last_layer" in options.extras and not self._last_layer:
            warn("the output layer has a bias or capped logits: no last-layer statistics (DONOD, gradient norms)")
        self._protection = Protection(tokenizer, options.final_answer)
        self._features: GradientFeatures | None = None
        if "influence" in options.extras:
            if not validation:
                raise DataError("influence is about validation rows: give them with --validation")
            self._features = GradientFeatures(model, validation, moments=moments, seed=seed)

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers about the whole pass that methods need."""
        return {"weight_norm": float(torch.linalg.vector_norm(self.head.weight.detach().float()))}

    def table(
        self,
        ids: Sequence[str],
        rows: Sequence[TokenRow],
        columns: Mapping[str, np.ndarray],
        opening: Sequence[int] = (),
    ) -> ScoreTable:
        """Statistics of rows that are cut to length already.

        Args:
            ids: their content ids.
            rows: their tokens and labels.
            columns: row columns that are known already (texts, source, label, truncated).
            opening: tokens that an answer begins behind when it has no prompt (``ifd``); at least one.
        """
        positions = [_target_positions(row) for row in rows]
        found: list[dict[str, Any]] = [{} for _ in rows]
        for batch in equal_lengths([len(row.input_ids) for row in rows], self.options.batch_tokens):
            self._score(batch, rows, positions, found)
        if "ifd" in self.options.extras:
            self._direct(rows, positions, found, list(opening))
        if self._features is not None:
            for row, place in zip(rows, found):
                place["influence"] = self._features.influence(row)
        return self._assemble(ids, rows, positions, found, columns)

    def _score(
        self, batch: list[int], rows: Sequence[TokenRow], positions: list[np.ndarray], found: list[dict[str, Any]]
    ) -> None:
        """One batch of equally long rows, through the model and the reference."""
        stats, hidden_BSD, sizes = self._forward(self.model, [rows[i] for i in batch], [positions[i] for i in batch])
        parts = [_split(getattr(stats, name), sizes) for name in ("nll", "entropy", "top1", "el2n", "residual")]
        reference = self._reference_nll([rows[i] for i in batch], [positions[i] for i in batch])
        means = hidden_BSD.float().mean(1).cpu().numpy() if "embedding" in self.options.extras else None
        for place, index in enumerate(batch):
            nll, entropy, top1, el2n, residual = (part[place] for part in parts)
            found[index] |= {"nll": nll, "entropy": entropy, "top1": top1, "el2n": el2n}
            if reference is not None:
                found[index]["reference_nll"] = reference[place]
            if means is not None:
                found[index]["embedding"] = means[place]
            if stats.grad_norm is not None:
                found[index]["grad_norm"] = float(stats.grad_norm[place])
                found[index]["residual"] = float(residual.mean()) if len(residual) else 0.0

    @torch.no_grad()
    def _forward(
        self, model: Any, rows: Sequence[TokenRow], positions: Sequence[np.ndarray], last_layer: bool = True
    ) -> tuple[TokenStats, torch.Tensor, list[int]]:
        """(statistics of the batch's targets row after row, hidden states, targets of each row)."""
        ids_BS = torch.tensor([row.input_ids for row in rows], device=model.device)
        with evaluating(model):
            causal, hidden_BSD = hidden_states(model, ids_BS)
        row_index = np.repeat(np.arange(len(rows)), [len(part) for part in positions])
        column = np.concatenate([*positions, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        sizes = [len(part) for part in positions]
        stats = head_statistics(
            output_head(causal),
            hidden_BSD[row_index, column - 1],
            ids_BS[row_index, column],
            softcap=logit_softcap(causal.config),
            row_sizes=sizes if last_layer and self._last_layer else None,
        )
        return stats, hidden_BSD, sizes

    def _reference_nll(self, rows: Sequence[TokenRow], positions: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        if self.reference is None:
            return None
        model = self.model if self.reference == "base" else self.reference
        with self.model.disable_adapter() if self.reference == "base" else contextlib.nullcontext():
            stats, _, sizes = self._forward(model, rows, positions, last_layer=False)
        return _split(stats.nll, sizes)

    def _direct(
        self,
        rows: Sequence[TokenRow],
        positions: list[np.ndarray],
        found: list[dict[str, Any]],
        opening: list[int],
    ) -> None:
        """Mean loss of each answer behind the opening of an answer alone; NaN unless the answer is one piece."""
        alone: list[TokenRow] = []
        for row, part in zip(rows, positions):
            one_piece = len(part) and part[-1] - part[0] + 1 == len(part)
            answer = row.input_ids[part[0] : part[-1] + 1] if one_piece else []
            alone.append(TokenRow(opening + answer, [IGNORED_LABEL] * len(opening) + answer))
        places = [_target_positions(row) for row in alone]
        for batch in equal_lengths([len(row.input_ids) for row in alone], self.options.batch_tokens):
            stats, _, sizes = self._forward(
                self.model, [alone[i] for i in batch], [places[i] for i in batch], last_layer=False
            )
            for index, nll in zip(batch, _split(stats.nll, sizes)):
                found[index]["direct_nll"] = float(nll.mean()) if len(nll) else float("nan")

    def _assemble(
        self,
        ids: Sequence[str],
        rows: Sequence[TokenRow],
        positions: list[np.ndarray],
        found: list[dict[str, Any]],
        columns: Mapping[str, np.ndarray],
    ) -> ScoreTable:
        """The table of what was found."""
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in positions])]).astype(np.int64)
        targets = [[row.input_ids[i] for i in part] for row, part in zip(rows, positions)]
        tokens = {
            "token": _flat(targets, np.int32),
            "position": _flat(positions, np.int32),
            "protected": _flat([self._protection(part) for part in targets], bool),
            "paragraph": _flat([paragraphs(self.tokenizer, part) for part in targets], np.int32),
        }
        kinds = {"nll": np.float32, "entropy": np.float32, "top1": bool, "el2n": np.float32}
        kinds |= {"reference_nll": np.float32} if self.reference is not None else {}
        tokens |= {name: _flat([place[name] for place in found], kind) for name, kind in kinds.items()}
        given = dict(columns)
        given["length"] = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        for name in ("grad_norm", "residual", "direct_nll", "influence"):
            if found and name in found[0]:
                given[name] = np.array([place[name] for place in found], dtype=np.float64)
        if found and "embedding" in found[0]:
            given["embedding"] = np.stack([place["embedding"] for place in found])
        return ScoreTable(ids, offsets, given, tokens, self.facts)


def _target_positions(row: TokenRow) -> np.ndarray:
    """Indices of the row's target tokens; the first token is predicted from nothing and never counts."""
    return np.flatnonzero(np.asarray(row.labels[1:], dtype=np.int64) != IGNORED_LABEL) + 1


def equal_lengths(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices of equally long rows, at most ``most_tokens`` tokens together; rows without tokens are left out."""
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and (lengths[index] != lengths[batch[0]] or (len(batch) + 1) * lengths[index] > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _split(values_T: torch.Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(values_T.cpu().numpy(), np.cumsum(sizes)[:-1])


def _flat(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    arrays = [np.asarray(part, dtype=dtype) for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
