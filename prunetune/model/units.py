"""Sites: all units of one kind at one place. A score, a gate or a kept list is one vector of a site."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prunetune.model.architecture import Architecture
from prunetune.model.families import Columns, Rows, Writers

KINDS = ("mlp_channels", "kv_groups", "query_heads", "layers")
LAYERS_SITE = "layers"
# The dimensions of the residual stream: one site for the whole model, as the layers are.
HIDDEN = "hidden"
_SITE_NAME = re.compile(r"^layers\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Site:
    """All units of one kind at one place.

    Args:
        name: ``layers.7.mlp_channels``; the one site of whole layers is called ``layers``.
        kind: one of KINDS, or HIDDEN.
        layer: its layer in the dense model; -1 for ``layers`` and ``hidden``.
        size: number of units U.
        gated: module paths the gate acts on: the consumer's input, or for ``layers`` unit u's outputs at
            ``gated[u * n : (u + 1) * n]`` with n writers a layer, or for ``hidden`` the outputs of all of them.
        block: consecutive input features of the consumer that one unit spans.
        norms: for ``hidden``, the norms that see the gated stream.
    """

    name: str
    kind: str
    layer: int
    size: int
    gated: tuple[str, ...]
    block: int
    norms: tuple[str, ...] = ()


def site_name(layer: int, kind: str) -> str:
    """``layers.7.mlp_channels``."""
    return f"layers.{layer}.{kind}"


def parse_site(name: str) -> tuple[int, str]:
    """(layer, kind) of a site's name; (-1, name) for the sites of whole layers and of the hidden width."""
    if name in (LAYERS_SITE, HIDDEN):
        return -1, name
    match = _SITE_NAME.match(name)
    if match and match.group(2) in KINDS and match.group(2) != LAYERS_SITE:
        layer, kind = int(match.group(1)), match.group(2)
        # Another spelling of the number ("layers.01.") would pass here and be overlooked by every look-up.
        if site_name(layer, kind) == name:
            return layer, kind
    raise ValueError(f"{name!r} is not the name of a site")


def kind_size(arch: Architecture, kind: str) -> int:
    """Units of a kind at one of its sites."""
    return {
        "mlp_channels": arch.mlp_channels,
        "kv_groups": arch.kv_groups,
        "query_heads": arch.query_heads,
        "layers": arch.layers,
        HIDDEN: arch.hidden_size,
    }[kind]


def span_features(arch: Architecture, span: str) -> int:
    """Consecutive features of one unit with this span."""
    return {"channel": 1, "head": arch.head_dim, "group": arch.queries_per_group * arch.head_dim}[span]


def sites(arch: Architecture, kinds: Iterable[str]) -> tuple[Site, ...]:
    """All sites of the given kinds, layer by layer, in a fixed order."""
    wanted = set(kinds)
    found = [
        _inner_site(arch, layer, kind)
        for layer in range(arch.layers)
        for kind in KINDS
        if kind in wanted and kind != LAYERS_SITE
    ]
    if LAYERS_SITE in wanted:
        found.append(_layers_site(arch))
    if HIDDEN in wanted:
        found.append(_hidden_site(arch))
    return tuple(found)


def _inner_site(arch: Architecture, layer: int, kind: str) -> Site:
    family = arch.family
    [exit_] = [part for part in family.units[kind] if isinstance(part, Columns)]
    consumer = f"{family.layers}.{layer}.{family.modules[exit_.role]}"
    return Site(
        site_name(layer, kind), kind, layer, kind_size(arch, kind), (consumer,), span_features(arch, exit_.span)
    )


def _layers_site(arch: Architecture) -> Site:
    family = arch.family
    [writers] = [part for part in family.units[LAYERS_SITE] if isinstance(part, Writers)]
    gated = tuple(f"{family.layers}.{layer}.{module}" for layer in range(arch.layers) for module in writers.modules)
    return Site(LAYERS_SITE, LAYERS_SITE, -1, arch.layers, gated, 1)


def _hidden_site(arch: Architecture) -> Site:
    """Whatever is added to the residual stream is gated where it is made; a norm behind that keeps zeros zero."""
    family, layers = arch.family, [f"{arch.family.layers}.{layer}" for layer in range(arch.layers)]
    writers = [family.modules[part.role] for part in family.hidden if isinstance(part, Rows)]
    gated = (family.embedding, *(f"{layer}.{module}" for layer in layers for module in writers))
    norms = (*(f"{layer}.{norm}" for layer in layers for norm in family.norms), family.final_norm)
    return Site(HIDDEN, HIDDEN, -1, arch.hidden_size, gated, 1, norms)
