"""Gradient features of rows: LoRA gradients, hashed to a few thousand numbers, against those of validation rows.

After LESS (arXiv 2402.04333): a row is worth training on if the step that it causes points where the validation rows'
gradients do. A count sketch stands for the paper's dense random projection, which would be larger than the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prunetune.core.errors import DataError
from prunetune.core.streams import stream
from prunetune.data.identity import tensors_hash
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow

DIMENSIONS = 8192
_RANK = 8
# Inside the root, and without bias correction: as the paper's authors do it.
_EPSILON = 1e-8


@dataclass(frozen=True)
class AdamMoments:
    """Adam's running means in a checkpoint.

    Args:
        first: parameter name -> mean gradient, of the parameter's shape.
        second: parameter name -> mean squared gradient.
        betas: their decays.
    """

    first: Mapping[str, torch.Tensor]
    second: Mapping[str, torch.Tensor]
    betas: tuple[float, float]

    @property
    def hash(self) -> str:
        """Which moments these are."""
        both = {f"{kind} {name}": t for kind, of in (("1", self.first), ("2", self.second)) for name, t in of.items()}
        return tensors_hash(both, {"betas": list(self.betas)})

    def step(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """Direction (of ``grad``'s shape, float32) of Adam's next step if ``grad`` came now."""
        grad = grad.float()
        first, second = self.first[name].to(grad), self.second[name].to(grad)
        mean = self.betas[0] * first + (1 - self.betas[0]) * grad
        square = self.betas[1] * second + (1 - self.betas[1]) * grad.square()
        return mean / (square + _EPSILON).sqrt()


class GradientFeatures:
    """Similarity of rows' LoRA gradients to those of validation rows.

    A row's feature is the gradient of its mean target loss with respect to the adapters, projected by a count sketch
    (every coordinate gets a bucket and a sign; inner products are kept in expectation) and normalised, because raw
    norms favour short rows. With the moments of a warm-up run, rows that may be trained on give the step that Adam
    would take instead of the gradient, validation rows always the gradient. The influence is the mean cosine.

    Args:
        model: a PeftModel, ideally lightly trained. With fresh adapters (``with_adapters``) the gradient is a random
            projection of the weights' own.
        validation: rows that the influence is about.
        moments: Adam's, of the run that trained the adapters.
        dimensions: numbers in a feature.
        seed: of the projection, and of fresh adapters.

    Raises:
        DataError: the model has no adapters, or the moments are not about them.
    """

    def __init__(
        self,
        model: Any,
        validation: Sequence[TokenRow],
        *,
        moments: AdamMoments | None = None,
        dimensions: int = DIMENSIONS,
        seed: int = 0,
    ):
        if not isinstance(model, PeftModel):
            raise DataError("gradient features are gradients of LoRA adapters, and the model has none")
        if moments is not None:
            _require_about(moments, model)
        self._model, self._moments, self._seed, self._dimensions = model, moments, seed, dimensions
        self._buckets: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        usable = [row for row in validation if row.targets]
        self._wanted = np.mean([self.feature(row) for row in usable], axis=0)

    def influence(self, row: TokenRow) -> float:
        """Mean cosine of the row's step with the validation rows' gradients; NaN for a row without targets."""
        return float(self.feature(row, self._moments) @ self._wanted) if row.targets else float("nan")

    def feature(self, row: TokenRow, moments: AdamMoments | None = None) -> np.ndarray:
        """(dimensions,) float32 normalised sketch of the row's gradient, or of Adam's step with it."""
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
                direction = grad.float() if moments is None else moments.step(name, grad)
                feature.index_add_(0, bucket, direction.flatten() * sign)
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


def _require_about(moments: AdamMoments, model: Any) -> None:
    there = {name: value.shape for name, value in moments.first.items()}
    wrong = [name for name, p in model.named_parameters() if "lora_" in name and there.get(name) != p.shape]
    if wrong:
        raise DataError(f"the optimizer's moments are of other adapters: none that fits {wrong[0]}")


def with_adapters(model: Any, seed: int = 0) -> Any:
    """A plain model with seeded fresh adapters. B is zero: it computes what it did, and only B has a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "gradient adapters").integers(2**31)))
        return get_peft_model(model, LoraConfig(r=_RANK, target_modules="all-linear"))
