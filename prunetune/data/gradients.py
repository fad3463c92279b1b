"""Gradient features of rows: LoRA gradients, hashed to a few thousand numbers, against those of validation rows.

After LESS (arXiv 2402.04333): a row is worth training on if its gradient points where the validation rows' do. Two
things differ from the paper, both said in the docstring below: no optimizer moments, and a count sketch for the dense
random projection, which would be larger than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prunetune.core.errors import DataError
from prunetune.core.streams import stream
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow

DIMENSIONS = 8192
_RANK = 8


class GradientFeatures:
    """Similarity of rows' LoRA gradients to those of validation rows.

    A row's feature is the gradient of its mean target loss with respect to the adapters, projected by a count sketch
    (every coordinate gets a bucket and a sign; inner products are kept in expectation) and normalised, because raw
    norms favour short rows. The influence is the mean cosine with the validation rows' features. The paper divides
    training gradients by Adam's moments of a warm-up run; plain gradients are used here on both sides.

    Args:
        model: a PeftModel, ideally lightly trained. With fresh adapters (``with_adapters``) the gradient is a random
            projection of the weights' own.
        validation: rows that the influence is about.
        dimensions: numbers in a feature.
        seed: of the projection, and of fresh adapters.
    """

    def __init__(self, model: Any, validation: Sequence[TokenRow], *, dimensions: int = DIMENSIONS, seed: int = 0):
        if not isinstance(model, PeftModel):
            raise DataError("gradient features are gradients of LoRA adapters, and the model has none")
        self._model, self._seed, self._dimensions = model, seed, dimensions
        self._buckets: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        usable = [row for row in validation if row.targets]
        self._wanted = np.mean([self.feature(row) for row in usable], axis=0)

    def influence(self, row: TokenRow) -> float:
        """Mean cosine of the row's gradient with the validation rows'; NaN for a row without targets."""
        return float(self.feature(row) @ self._wanted) if row.targets else float("nan")

    def feature(self, row: TokenRow) -> np.ndarray:
        """(dimensions,) float32 normalised sketch of the row's gradient."""
        model = self._model
        trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
        was = {name: p.requires_grad for name, p in trained.items()}
        was_training = model.training
        model.eval()
        try:
            for parameter in trained.values():
                parameter.requires_grad_(True)
            ids = torch.tensor([row.input_ids], device=model.device)
            labels = torch.tensor([row.labels], device=model.device)
            with torch.enable_grad():
                logits = model(input_ids=ids).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED_LABEL)
                grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        finally:
            model.train(was_training)
            for name, parameter in trained.items():
                parameter.requires_grad_(was[name])
        feature = torch.zeros(self._dimensions, device=model.device)
        for name, grad in zip(trained, grads, strict=True):
            if grad is not None:
                bucket, sign = self._projection(name, grad)
                feature.index_add_(0, bucket, grad.float().flatten() * sign)
        norm = torch.linalg.vector_norm(feature)
        sketch: np.ndarray = (feature / norm.clamp_min(1e-30)).cpu().numpy()
        return sketch

    def _projection(self, name: str, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bucket and sign of every coordinate, drawn once by the tensor's name."""
        if name not in self._buckets:
            lot = stream(self._seed, "gradient sketch", name)
            bucket = torch.from_numpy(lot.integers(self._dimensions, size=grad.numel(), dtype=np.int32))
            sign = torch.from_numpy(lot.integers(2, size=grad.numel(), dtype=np.int8) * 2 - 1)
            self._buckets[name] = (bucket.to(grad.device), sign.to(grad.device))
        return self._buckets[name]


def with_adapters(model: Any, seed: int = 0) -> Any:
    """A plain model with seeded fresh adapters. B is zero: it computes what it did, and only B has a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "gradient adapters").integers(2**31)))
        return get_peft_model(model, LoraConfig(r=_RANK, target_modules="all-linear"))
