"""DistillingTrainer: while gates close, the model also follows what it says itself with all gates open."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prunetune.config.schema import DistillConfig
from prunetune.core.errors import Problem, UnsupportedModelError
from prunetune.model.distillation import token_divergence
from prunetune.model.sharded import readable
from prunetune.model.surgery import base_model
from prunetune.model.token_stats import evaluating, logit_softcap, output_head
from prunetune.train.compat import raise_if_any
from prunetune.train.freezing import FreezingTrainer
from prunetune.train.launched import engine_problems


class DistillingTrainer(FreezingTrainer):
    """FreezingTrainer whose search distils from the same network with all gates open, as ``prune.distill`` says.

    The loss of a target token becomes (1 - weight) * its negative log-likelihood + weight * KL(open || gated). Teacher
    and student share weights and adapters, so there is no second model; the teacher gives no gradient. In warm-up both
    are the same, and after the freeze the removed units are gone and with them the teacher: there the loss is the
    plain one. It costs, in every step of the search, one more forward pass and three more products with the output
    layer; in memory, the teacher's hidden states and a few blocks of logits.

    Raises:
        ConfigError: a loss or engine that it cannot be combined with.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._distill = self.prune.distill if self.prune is not None and self.prune.distill.weight > 0 else None
        if self._distill is not None:
            raise_if_any(list(self._distill_problems()))

    def _distill_problems(self) -> Iterator[Problem]:
        args = self.args
        plain = args.loss_type in ("nll", "chunked_nll") and not args.label_smoothing_factor
        if not plain or self.compute_loss_func is not None:
            why = (
                "is mixed with the plain loss of every token, and another one is set; use loss_type='nll' without "
                "label smoothing and compute_loss_func, or distill.weight 0"
            )
            yield Problem(why, "distill.weight")
        yield from engine_problems(self, "distillation in the search", "distill.weight")
        try:
            output_head(base_model(self.model))
        except UnsupportedModelError as error:
            yield Problem(f"needs the output layer's own weight: {error}", "distill.weight")

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer; in the search, mixed with the divergence from the model with open gates."""
        mixing: Any = contextlib.nullcontext()
        searching = self._search is not None and self._search.phase(self.state.global_step) == "search"
        if self._distill is not None and searching and self.model.training:
            mixing = self._teaching(self._distill)
        with mixing:
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextlib.contextmanager
    def _teaching(self, distill: DistillConfig) -> Iterator[None]:
        """Runs the teacher at the start of the next forward pass, and mixes the losses which that ends with.

        So both are parts of one forward pass, in which engines gather weights; and the teacher comes first, before
        they note down what the student's backward pass will need.
        """
        states: list[Tensor] = []  # the teacher's, then the student's
        decoder, search = base_model(self.model).base_model, self._search
        assert search is not None

        def teach(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad(), evaluating(self.model), search.gate_set.opened(), self.accelerator.autocast():
                    states.append(module(*args, **kwargs).last_hidden_state)

        def listen(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                states.append(output.last_hidden_state)

        def mix(module: Any, inputs: Any, output: Any) -> Any:
            teacher_BSD, student_BSD = states
            return self._mixed(output, teacher_BSD, student_BSD, distill)

        handles = [
            decoder.register_forward_pre_hook(teach, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(listen),
            self.model.register_forward_hook(mix),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mixed(self, output: Any, teacher_BSD: Tensor, student_BSD: Tensor, distill: DistillConfig) -> Any:
        """The output with ``log_probs`` such that TRL's sum over them is the mixed loss."""
        causal, mask = base_model(self.model), output.label_mask
        with readable(output_head(causal)) as head:
            found_T = token_divergence(
                head,
                student_BSD[:, :-1][mask],
                teacher_BSD[:, :-1][mask],
                temperature=distill.temperature,
                softcap=logit_softcap(causal.config),
            )
        self._metrics["train"]["distill_kl"].append(float(found_T.detach().sum() / mask.sum().clamp(min=1)))
        found = output.log_probs.new_zeros(mask.shape).masked_scatter(mask, found_T.to(output.log_probs.dtype))
        mixed = (1 - distill.weight) * output.log_probs - distill.weight * found
        return dataclasses.replace(output, log_probs=mixed)
