"""First-order saliency of the model's output instead of its loss, with a balance between attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import INNER, SCORES, ModelFacts, ModelScore, ScoreContext, owned
from prunetune.methods.scores._gradients import prunable_weights
from prunetune.model.token_rows import TokenRow


class NirvanaOptions(MethodOptions):
    """Options of nirvana."""

    balance: float = Field(
        3.36, gt=0, description="fraction removed from MLPs over that from attention; 3.36 for 8B, 3.0 for 3B models"
    )
    draws: int = Field(1, ge=1, description="samples of calibration rows that are tried; the best at the budget stays")


@SCORES.register("nirvana")
class Nirvana(ModelScore):
    """|w df/dw| summed over what a unit owns; f is the mean over rows and vocabulary of the highest logit of a row.

    Needs no labels. With several draws, the sample whose cut leaves the output nearest to the dense one is taken.
    """

    Options = NirvanaOptions
    paper = "arXiv 2509.14230"
    needs = frozenset({"weights", "gradients"})
    cost = "loads the whole model, forward and backward; twice the weights' memory in float32"
    kinds = INNER
    measure = "loss"

    def __init__(self, context: ScoreContext, options: NirvanaOptions):
        super().__init__(context, options)
        self.options: NirvanaOptions = options

    @property
    def balance(self) -> float:
        return self.options.balance

    @property
    def priced(self) -> bool:
        return self.options.draws > 1

    def collect(self, facts: ModelFacts) -> None:
        draws = [self._of_rows(facts, facts.rows(number)) for number in range(self.options.draws)]
        if len(draws) == 1:
            self._found = draws[0]
            return
        prices = [facts.price(scores) for scores in draws]
        self._found = draws[prices.index(min(prices))]

    def _of_rows(self, facts: ModelFacts, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        arch = self.context.arch
        weights = prunable_weights(facts.model, arch)
        device = next(facts.model.parameters()).device
        for weight in weights.values():
            weight.requires_grad_(True)
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            logits_SV = facts.model(input_ids=ids, use_cache=False).logits[0].float()
            (logits_SV.amax(0).mean() / len(rows)).backward()
        found: dict[str, Tensor] = {}
        for site in self.context.sites:

            def salience(role: str, layer: int = site.layer) -> Tensor:
                weight = weights[layer, role]
                assert weight.grad is not None
                return (weight.detach().float() * weight.grad.float()).abs()

            found[site.name] = owned(arch, site.kind, salience).cpu()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
        return found
