"""What removing units does to the model's output: gates closed, next-token distributions compared with the dense ones.

Legend: B batch, S sequence, T tokens, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunetune.model.gates import GateSet
from prunetune.model.layer_stream import SkippedLayer
from prunetune.model.token_stats import evaluating, hidden_states, logit_softcap, output_head
from prunetune.model.units import Site

_BLOCK_BYTES = 48 * 2**20
_KEPT_BYTES = 2 * 2**30


class OutputJudge:
    """Runs a model with units removed on fixed rows.

    Args:
        model: a transformers causal LM. sites: those whose units may be removed.
        batches: token ids (B, S), no padding.
        layers: path of the list of decoder layers.
    """

    def __init__(self, model: Any, sites: Sequence[Site], batches: Sequence[Tensor], layers: str = "model.layers"):
        self.model, self._sites = model, tuple(sites)
        device = next(model.parameters()).device
        self._batches = [ids.to(device) for ids in batches]
        self._path = layers
        self._layers = list(model.get_submodule(layers))
        # Layers before the first that loses anything need not be run again, where their outputs fit in memory.
        hidden_bytes = sum(ids.numel() for ids in self._batches) * model.config.hidden_size * 4
        fits = hidden_bytes * len(self._layers) <= _KEPT_BYTES
        # Every layer's inputs of each batch.
        self._inputs: list[list[Tensor]] | None = [[] for _ in self._layers] if fits else None
        self._dense = self._dense_pass(self._inputs or [])
        self._head, self._softcap = output_head(model), logit_softcap(model.config)

    def divergence(self, kept: Mapping[str, Sequence[int]], share: float = 1.0, *, symmetric: bool = False) -> float:
        """Mean over tokens of KL(dense || cut) in nats; ``symmetric``: of their Jensen-Shannon divergence.

        Args:
            kept: site -> indices that stay; an absent site keeps all.
            share: of the batches that are used, spread evenly over their lengths.
        """
        step = max(1, round(1 / share))
        used = list(range(len(self._batches)))[step // 2 :: step] or [len(self._batches) // 2]
        total, tokens = 0.0, 0
        for cut_BSD, place in zip(self._hidden(kept, used), used):
            dense_BSD = self._dense[place]
            dense_TD, cut_TD = dense_BSD.flatten(0, 1), cut_BSD.flatten(0, 1)
            rows = max(1, _BLOCK_BYTES // (4 * self._head.weight.shape[0]))
            for dense_tD, cut_tD in zip(dense_TD.split(rows), cut_TD.split(rows)):
                total += float(self._compare(dense_tD, cut_tD, symmetric))
            tokens += dense_TD.shape[0]
        return total / tokens

    @torch.no_grad()
    def _compare(self, dense_TD: Tensor, cut_TD: Tensor, symmetric: bool) -> Tensor:
        dense_TV, cut_TV = self._log_probabilities(dense_TD), self._log_probabilities(cut_TD)
        if not symmetric:
            return _kl(dense_TV, cut_TV)
        middle_TV = torch.logaddexp(dense_TV, cut_TV) - math.log(2.0)
        return (_kl(dense_TV, middle_TV) + _kl(cut_TV, middle_TV)) / 2

    def _log_probabilities(self, hidden_TD: Tensor) -> Tensor:
        logits_TV = self._head(hidden_TD).float()
        if self._softcap is not None:
            logits_TV = self._softcap * torch.tanh(logits_TV / self._softcap)
        return logits_TV.log_softmax(-1)

    def block_change(self, kept: Mapping[str, Sequence[int]]) -> NDArray[np.float64]:
        """(L,): 1 - mean cosine between each layer's input and output, with units removed."""
        sums, tokens = np.zeros(len(self._layers)), sum(ids.numel() for ids in self._batches)

        def watch(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                before_BSD = args[0] if args else kwargs["hidden_states"]
                cosine_BS = torch.cosine_similarity(before_BSD.float(), output.float(), dim=-1)
                sums[index] += float(cosine_BS.double().sum())

            return hook

        handles = [
            layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(self._layers)
        ]
        try:
            with self._gated(kept):
                for ids_BS in self._batches:
                    hidden_states(self.model, ids_BS)
        finally:
            for handle in handles:
                handle.remove()
        change: NDArray[np.float64] = 1.0 - sums / tokens
        return change

    @torch.no_grad()
    def _dense_pass(self, inputs: Sequence[list[Tensor]]) -> list[Tensor]:
        """Final hidden states of each batch, nothing removed; adds the layers' inputs to ``inputs``, if there."""

        def keep(found: list[Tensor]) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found.append(args[0] if args else kwargs["hidden_states"])

            return hook

        handles = [
            layer.register_forward_pre_hook(keep(found), with_kwargs=True) for layer, found in zip(self._layers, inputs)
        ]
        try:
            with evaluating(self.model):
                return [hidden_states(self.model, ids_BS)[1] for ids_BS in self._batches]
        finally:
            for handle in handles:
                handle.remove()

    def _hidden(self, kept: Mapping[str, Sequence[int]], places: Sequence[int]) -> Iterator[Tensor]:
        """Final hidden states (B, S, D) of some batches, one at a time."""
        first = self._first(kept)
        decoder, parent = self.model.base_model, self.model.get_submodule(self._path.rpartition(".")[0])
        with self._gated(kept):
            for place in places:
                if self._inputs is None or first == 0:
                    yield hidden_states(self.model, self._batches[place])[1]
                elif first == len(self._layers):
                    yield self._dense[place]
                else:
                    whole = parent.layers
                    parent.layers = nn.ModuleList([SkippedLayer() for _ in range(first)] + self._layers[first:])
                    try:
                        yield decoder(inputs_embeds=self._inputs[first][place], use_cache=False).last_hidden_state
                    finally:
                        parent.layers = whole

    def _first(self, kept: Mapping[str, Sequence[int]]) -> int:
        """The first layer that loses anything; the number of layers if none does."""
        found = [len(self._layers)]
        for site in self._sites:
            gone = set(range(site.size)) - set(kept.get(site.name, range(site.size)))
            found += ([min(gone)] if site.layer < 0 else [site.layer]) if gone else []
        return min(found)

    @contextlib.contextmanager
    def _gated(self, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """The model with gates closed where units are removed; no gradients."""
        closed = [site for site in self._sites if site.name in kept]
        gates = GateSet(self.model, closed)
        gates.attach()
        try:
            values = {site.name: torch.zeros(site.size) for site in closed}
            for site in closed:
                values[site.name][list(kept[site.name])] = 1.0
            gates.set(values)
            with evaluating(self.model), torch.no_grad():
                yield
        finally:
            gates.detach()


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q), both log-probabilities."""
    return (p_TV.exp() * (p_TV - q_TV)).sum()
