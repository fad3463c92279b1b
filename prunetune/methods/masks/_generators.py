"""Networks that make the gate logits of all layers from nothing but the layers' places (ATP).

Legend: L layers, D logits of a layer, E width of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallGenerator(nn.Module):
    """Fixed orthogonal inputs, a two-layer encoder over the layers, and a linear head for every layer.

    Args:
        layers: L. logits: D.
    """

    places: Tensor

    def __init__(self, layers: int, logits: int):
        super().__init__()
        width = 64
        self.register_buffer("places", nn.init.orthogonal_(torch.empty(layers, width)))
        self.encoder = _encoder(width, heads=4, inner=256, layers=2)
        self.norm = nn.LayerNorm(width)
        bound = width**-0.5
        self.heads_LDE = nn.Parameter(torch.empty(layers, logits, width).uniform_(-bound, bound))

    def forward(self) -> Tensor:
        """(L, D) logits."""
        hidden_LE = self.norm(self.encoder(self.places[None])[0])
        return torch.einsum("lde,le->ld", self.heads_LDE, hidden_LE)


class LargeGenerator(nn.Module):
    """Trained inputs, a four-layer encoder over the layers, and a mixture of four MLPs of which each layer takes two.

    Args:
        layers: L. logits: D.
    """

    def __init__(self, layers: int, logits: int):
        super().__init__()
        width, experts, inner = 128, 4, 256
        self.places = nn.Parameter(torch.randn(layers, width) + 0.1 * torch.randn(layers, width))
        self.encoder = _encoder(width, heads=1, inner=512, layers=4)
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, logits)) for _ in range(experts)
        )

    def forward(self) -> Tensor:
        """(L, D) logits."""
        hidden_LE = self.norm(self.encoder(self.places[None])[0])
        best_L2, which_L2 = self.router(hidden_LE).topk(2, dim=-1)
        weight_LX = torch.zeros(len(hidden_LE), len(self.experts)).scatter(1, which_L2, best_L2.softmax(-1))
        outputs_LXD = torch.stack([expert(hidden_LE) for expert in self.experts], dim=1)
        return (weight_LX[..., None] * outputs_LXD).sum(1)


def _encoder(width: int, heads: int, inner: int, layers: int) -> nn.TransformerEncoder:
    # Without the published dropout: its noise would come from the global generator, and gates have noise of their own.
    layer = nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
