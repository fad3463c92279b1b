"""Running a model of which one decoder layer is in memory at a time, its weights read when they are needed.

The model's own class does the work: masks, positions and residual adds are those of its forward, of which all layers
but one are skipped. Nothing is padded: sequences that run together are equally long.
Legend: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prunetune.model.shards import ShardReader

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096


class SkippedLayer(nn.Module):
    """A layer that is not in memory: hands on what it gets."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Weights:
    """A model folder's tensors by name, the tied head found under the embedding's name.

    Args:
        reader: of the folder.
    """

    def __init__(self, reader: ShardReader):
        self.reader = reader

    def _stored(self, name: str) -> str:
        return EMBEDDING if name == HEAD and HEAD not in self.reader.entries else name

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self.reader.read(self._stored(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as stored."""
        return self.reader.rows(self._stored(name), start, stop)

    def height(self, name: str) -> int:
        """Rows that a matrix has."""
        return self.reader.entries[self._stored(name)].shape[0]


class LayerStream:
    """A causal model without weights, into which one decoder layer at a time is read.

    Args:
        config: the transformers config of the model whose tensors are read.
        weights: its tensors; a subclass of Weights may change them on the way.
        device, dtype: of the computation.
        layers: path of the list of decoder layers.

    Example:
        >>> stream = LayerStream(config, Weights(ShardReader(folder)), device, torch.float32)    # doctest: +SKIP
        >>> [hidden_BSD] = stream.embed([ids_BS])                                                # doctest: +SKIP
        >>> with stream.layer(0):                                                                # doctest: +SKIP
        ...     hidden_BSD = stream.forward(hidden_BSD)
    """

    def __init__(
        self, config: Any, weights: Weights, device: torch.device, dtype: torch.dtype, layers: str = "model.layers"
    ):
        self.weights, self.device, self.dtype = weights, device, dtype
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                # Positions are computed in float32 in every dtype, as the class itself does.
                module.register_buffer(name, buffer.to(device), persistent=False)
        self._path, self._parent = layers, self.model.get_submodule(layers.rpartition(".")[0])
        self._layers = list(self.model.get_submodule(layers))
        self._norm = self._parent.norm
        self._install(None)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def _install(self, index: int | None) -> None:
        """Skips all layers but one, and the last norm too unless all are skipped."""
        slots = [SkippedLayer() for _ in self._layers]
        if index is not None:
            slots[index] = self._layers[index]
        self._parent.layers = nn.ModuleList(slots)
        self._parent.norm = nn.Identity() if index is not None else self._norm

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states (B, S, D) before the first layer; of the embedding only the rows in use are held.

        Args:
            batches: token ids (B, S).
        """
        used, places = torch.unique(torch.cat([ids.flatten() for ids in batches]), return_inverse=True)
        name, found = EMBEDDING, []
        for start in range(0, self.weights.height(name), _ROWS):
            here = used[(used >= start) & (used < start + _ROWS)] - start
            if len(here):
                found.append(self.weights.rows(name, start, start + _ROWS)[here])
        embedding = self.model.get_input_embeddings()
        embedding.weight = nn.Parameter(torch.cat(found).to(self.device, self.dtype), requires_grad=False)
        parts = torch.split(places.to(self.device), [ids.numel() for ids in batches])
        hidden = [embedding(part.reshape(ids.shape)) for part, ids in zip(parts, batches)]
        embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
        return hidden

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Holds layer ``index`` in memory, and nothing else of the model."""
        module = self._layers[index]
        with self._held(module, f"{self._path}.{index}."):
            self._install(index)
            try:
                yield module
            finally:
                self._install(None)

    @contextlib.contextmanager
    def _held(self, module: nn.Module, prefix: str) -> Iterator[None]:
        try:
            for name, _ in list(module.named_parameters()):
                tensor = self.weights.read(prefix + name).to(self.device, self.dtype)
                _assign(module, name, tensor)
            yield
        finally:
            for name, parameter in list(module.named_parameters()):
                _assign(module, name, parameter.data.to("meta"))

    @torch.no_grad()
    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """The layer in memory, applied; (B, S, D)."""
        decoder = self.model.base_model
        found: Tensor = decoder(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state
        return found

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]], kept_layers: Sequence[int] | None = None) -> list[Tensor]:
        """Logits (S, V) of token sequences on the CPU, in the stream's dtype: the whole model, layer by layer.

        Args:
            sequences: token ids.
            kept_layers: only these layers are run; None: all.
        """
        hidden = self.embed([torch.tensor([sequence]) for sequence in sequences])
        for index in range(self.depth) if kept_layers is None else kept_layers:
            with self.layer(index):
                hidden = [self.forward(h_BSD) for h_BSD in hidden]
        head = self.model.get_output_embeddings()
        with self._held(self._norm, f"{self._path.rpartition('.')[0]}.norm."), self._held(head, "lm_head."):
            found = [self.model(inputs_embeds=h_BSD, use_cache=False).logits[0].cpu() for h_BSD in hidden]
        return found


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
