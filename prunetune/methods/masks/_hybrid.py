"""PAT's hybrid sparsification modules: low-rank maps behind the linears that write to the residual stream.

Legend: D hidden size, e rank of a map, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.core.streams import stream
from prunetune.model.adapters import AdaptedLinear
from prunetune.model.fold import Fold

_NAMES = ("left", "scale", "right")


class HybridModules:
    """y -> y + L diag(v) R y behind each linear, with v 0 at first: then nothing is changed.

    L and R begin orthonormal, where the identity loss is 0, and v carries all scale (arXiv 2408.14721, the form of its
    text: the released code has the scale outside the map and forgets it in the export).

    Args:
        linears: what writes to the stream.
        rank: e.
        seed: of the run.
    """

    def __init__(self, linears: Iterable[AdaptedLinear], rank: int, seed: int):
        self.maps: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for linear in linears:
            weight = next(linear.module.parameters())
            width = linear.module.out_features
            sides = []
            for side in ("left", "right"):
                draw = stream(seed, "mask.pat", linear.path, side).standard_normal((width, rank))
                sides.append(torch.linalg.qr(torch.from_numpy(draw))[0].float())
            starts = (sides[0], torch.zeros(rank), sides[1].T)
            left, scale, right = (t.contiguous().to(weight.device).requires_grad_() for t in starts)
            self.maps[linear.path] = left, scale, right
            self._handles.append(linear.module.register_forward_hook(self._hook(linear.path)))
        tensors = [tensor for of in self.maps.values() for tensor in of]
        self.adam = torch.optim.Adam(tensors, lr=0.0) if tensors else None

    def _hook(self, path: str) -> Any:
        def transform(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            left, scale, right = (tensor.to(output.dtype) for tensor in self.maps[path])
            return output + ((output @ right.T) * scale) @ left.T

        return transform

    def detach(self) -> None:
        """Takes the maps off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def named(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own."""
        return {f"hybrid.{path}.{name}": tensor for path, of in self.maps.items() for name, tensor in zip(_NAMES, of)}

    def take_gradients(self) -> dict[str, Tensor]:
        """What the passes since the last call left, by name; zeros where none came through."""
        found = {}
        for name, tensor in self.named().items():
            found[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.grad = None
        return found

    def identity_loss(self) -> Tensor:
        """Mean squares of L^T L - I and R R^T - I, added up over all maps."""
        total = torch.zeros(())
        for left, _, right in self.maps.values():
            one = torch.eye(left.shape[1], device=left.device)
            total = total + ((left.T @ left - one).square().mean() + (right @ right.T - one).square().mean()).cpu()
        return total

    def learn(self, gradients: Mapping[str, Tensor], learning_rate: float, identity: float) -> None:
        """One step of Adam on the loss whose gradients are given, plus ``identity`` times the identity loss."""
        if self.adam is None:
            return
        self.adam.zero_grad()
        (identity * self.identity_loss()).backward()
        for name, tensor in self.named().items():
            own = gradients[name].to(tensor.device)
            tensor.grad = own if tensor.grad is None else tensor.grad + own
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        self.adam.zero_grad()

    @torch.no_grad()
    def folds(self) -> dict[str, Fold]:
        """The maps as they are now, the scale in the left side."""
        return {
            path: Fold((left * scale).detach().clone(), right.detach().clone())
            for path, (left, scale, right) in self.maps.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The maps and what Adam knows of them."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.named().items()}
        for name, tensor in self.named().items():
            if self.adam is not None:
                for key, value in self.adam.state[tensor].items():
                    state[f"adam.{key}.{name}"] = value.cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores ``state_dict()``."""
        for name, tensor in self.named().items():
            tensor.copy_(state[name])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in state]
            if self.adam is not None:
                self.adam.state[tensor] = {
                    key: state[f"adam.{key}.{name}"].clone().to(tensor.device if key != "step" else "cpu")
                    for key in keys
                }
