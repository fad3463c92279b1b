"""What a rank method sees of the adapters while the search runs, and its decision at the freeze.

Legend: O output and I input features of a linear, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.config.presets import PhaseSteps
from prunetune.config.schema import PruneConfig
from prunetune.core.errors import DataError, Problem
from prunetune.methods.ranks import RANKS, SeenAdapter, build_ranks, check_ranks
from prunetune.model.adapters import AdaptedLinear, AdapterView
from prunetune.model.architecture import Architecture
from prunetune.model.ranks import Ranks, names_layers
from prunetune.model.sharded import whole, whole_shape
from prunetune.model.surgery import Surgery
from prunetune.model.units import sites
from prunetune.train.launched import engine_problems

_STATE = "ranks"


class RankSearch:
    """Adds up, in the second half of the search, what the method wants to know; nothing if it wants nothing.

    Args:
        model: the dense PeftModel. arch: its architecture.
        prune: the user's settings. phases: of the run.
    """

    def __init__(self, model: nn.Module, arch: Architecture, prune: PruneConfig, phases: PhaseSteps):
        self.method = build_ranks(prune.ranks.method, prune.ranks.options())
        self._seed = prune.seed
        # B starts at 0, and so do all importances: the first half says little.
        self._steps = (phases.search + 1) // 2
        self._begins, self._on = phases.freeze - self._steps, False
        self._linears = adapted_linears(model, arch) if self.method.observes else {}
        self._importance = {path: torch.zeros(whole_shape(of.factors()[0])[0]) for path, of in self._linears.items()}
        # Sum of |s B A x| / |W x|, and tokens: of all steps, and of this one on this process.
        self._outputs = {path: torch.zeros(2) for path in self._linears if self.method.reads_outputs}
        self._heard: dict[str, Tensor] = {}
        self._handles = [handle for path in self._outputs for handle in self._listen(path)]

    def begin_step(self, step: int) -> None:
        """Opens or closes the ears for optimizer step ``step``."""
        self._on = step >= self._begins

    def _listen(self, path: str) -> list[Any]:
        module = self._linears[path].module
        [name] = module.active_adapters
        norms: list[Tensor] = []

        def on_base(_: nn.Module, args: Any, output: Tensor) -> None:
            norms[:] = []
            # Not to evaluations nor the teacher. Passes that are done again for their activations change no mean.
            if self._on and torch.is_grad_enabled():
                norms.append(torch.linalg.vector_norm(output.detach(), dim=-1, dtype=torch.float32))

        def on_adapter(_: nn.Module, args: Any, output: Tensor) -> None:
            if norms:
                moved = torch.linalg.vector_norm(output.detach(), dim=-1, dtype=torch.float32)
                ratio = module.scaling[name] * moved / norms.pop().clamp(min=1e-30)
                found = torch.stack([ratio.sum(), ratio.new_full((), ratio.numel())])
                self._heard[path] = self._heard[path] + found if path in self._heard else found

        return [
            module.base_layer.register_forward_hook(on_base),
            module.lora_B[name].register_forward_hook(on_adapter),
        ]

    def collect(self) -> dict[str, Tensor]:
        """What was heard since the last call, by path; to be averaged over processes, the same on all of them then."""
        if not self._on:
            return {}
        heard, self._heard = self._heard, {}
        nothing = {path: torch.zeros(2, device=self._linears[path].factors()[1].device) for path in self._outputs}
        return nothing | heard

    def learn(self, outputs: Mapping[str, Tensor]) -> None:
        """Takes the step's outputs, as ``collect`` gave them, and the adapters' gradients."""
        if not self._on:
            return
        for path, heard in outputs.items():
            self._outputs[path] = _sum(self._outputs[path], heard)
        for path, linear in self._linears.items():
            a, b, _ = linear.factors()
            if a.grad is not None and b.grad is not None:
                parts = [whole(tensor.detach()).float() for tensor in (a, b, a.grad, b.grad)]
                self._importance[path] = _sum(self._importance[path], self.method.importance(*parts))

    def detach(self) -> None:
        """Takes the ears off."""
        for handle in self._handles:
            handle.remove()

    def decide(self, model: nn.Module, surgery: Surgery) -> Ranks | None:
        """The ranks from the freeze on; None if nothing changes, and no adapter is known by a number that does.

        Args:
            model: the sliced model. surgery: by which it was.
        """
        if not self.method.observes:
            moved = len(surgery.layers) < surgery.arch.layers
            return Ranks.of(model, {}, self._seed) if moved and names_layers(model) else None
        seen = []
        for path, importance_r in self._importance.items():
            if surgery.rename(f"{path}.") is None:
                continue
            a_rI, b_Or, _ = self._linears[path].factors()
            features = a_rI.shape[1] + b_Or.shape[0]
            ratios, tokens = self._outputs.get(path, torch.zeros(2)).tolist()
            mean_r, ratio = importance_r.cpu() / self._steps, ratios / (tokens or 1.0)
            seen.append(SeenAdapter(surgery.sliced_path(path), features, mean_r, ratio))
        return Ranks.of(model, self.method.ranks(seen), self._seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        parts = {"importance": self._importance, "outputs": self._outputs}
        return {f"{_STATE}.{part}.{path}": t.cpu().clone() for part, of in parts.items() for path, t in of.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores ``state_dict()`` exactly; raises DataError where the search was run without this method."""
        if not self.state_dict().keys() <= state.keys():
            raise DataError(
                "the checkpoint knows nothing of what lora.ranks asks for: its run had another method there. Set that "
                "one, or start anew"
            )
        self._importance = {path: state[f"{_STATE}.importance.{path}"].clone() for path in self._importance}
        self._outputs = {path: state[f"{_STATE}.outputs.{path}"].clone() for path in self._outputs}


def _sum(before: Tensor, found: Tensor) -> Tensor:
    """Both together, where ``found`` is; a step whose loss scale overflowed says nothing."""
    return before.to(found.device) + torch.nan_to_num(found, 0.0, 0.0, 0.0)


def adapted_linears(model: nn.Module, arch: Architecture) -> dict[str, AdaptedLinear]:
    """Path -> every decoder linear of the dense model that an adapter learns on."""
    view = AdapterView(model, arch, sites(arch, ("mlp_channels", "kv_groups")))  # they own parts of all linears
    return {linear.path: linear for linear in view.linears if linear.adapted}


def rank_refusals(trainer: Any, prune: PruneConfig) -> list[Problem]:
    """What is wrong with the settings of the ranks for this trainer, each with what to set instead."""
    method, field = prune.ranks.method, "lora.ranks"
    found = check_ranks(method, prune.ranks.options())
    if found or not RANKS.get(method).observes:
        return found
    configs: Mapping[str, Any] = getattr(trainer.model, "peft_config", {})
    if any(config.lora_bias for config in configs.values() if hasattr(config, "lora_bias")):
        why = f"{method} takes adapters out, and the biases trained with them; set lora_bias to False, or ranks to keep"
        found.append(Problem(why, field))
    return found + engine_problems(trainer, "adapter ranks", field)
