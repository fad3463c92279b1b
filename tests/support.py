"""Tiny random models of every family, a word-level tokenizer, random plans: what tests share.

Nothing here needs a download; everything is deterministic. Import as ``from tests.support import ...``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from prunetune.model.architecture import Architecture, describe
from prunetune.model.budget import Shape, full_shape
from prunetune.model.plan import Plan
from prunetune.model.units import KINDS, Site, site_name

# These models are so small that a pool of threads costs more than it gives.
torch.set_num_threads(1)

VOCABULARY = 99
WIDTHS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Windows shorter than the test sequences and layers of different types, so that mixing layers up shows.
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, **_WINDOWS},
    "qwen3": {"head_dim": 10},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, **_WINDOWS},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 12, **_WINDOWS},
}
MODEL_TYPES = tuple(_OWN)

# Every family with tied and untied embeddings, grouped and multi-head attention, biases where its config has them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{kind}-tied": (kind, {"tie_word_embeddings": True}) for kind in MODEL_TYPES},
    **{f"{kind}-untied": (kind, {"tie_word_embeddings": False}) for kind in MODEL_TYPES},
    **{f"{kind}-mha": (kind, {"num_key_value_heads": 6}) for kind in MODEL_TYPES},
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "gemma2-biased": ("gemma2", {"attention_bias": True}),
    "gemma3_text-biased": ("gemma3_text", {"attention_bias": True}),
}


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A transformers config of a three-layer model; see WIDTHS."""
    values = {**WIDTHS, **_OWN[model_type], **changes}
    layers = values["num_hidden_layers"]
    if "layer_types" in values and "layer_types" not in changes:
        values["layer_types"] = [values["layer_types"][i % 3] for i in range(layers)]
    return AutoConfig.for_model(model_type, **values)


def tiny_model(model_type: str = "llama", seed: int = 0, attention: str = "eager", **changes: Any) -> Any:
    """A random model in eval mode whose logits are far from uniform and whose biases and norms are not trivial."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15 if parameter.dim() > 1 else 0.3)
            if "norm" in name and "gemma" not in model_type:
                parameter.add_(1.0)
    model.generation_config.pad_token_id = 0
    return model


def tiny_arch(model_type: str = "llama", **changes: Any) -> Architecture:
    """The facts about ``tiny_model(model_type, **changes)``, without making it."""
    return describe(tiny_config(model_type, **changes))


def empty_model(config: Any) -> Any:
    """A model of this config on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(model: Any) -> int:
    """Parameters of a model; tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]


@functools.cache
def _words() -> Tokenizer:
    names = [*_SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Words w0 .. w93, split at spaces; ids fit the tiny models. ``chat`` adds a template with marked answers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_words().to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def tiny_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt-completion rows of w-words whose completions can be learnt."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        prompt = " ".join(f"w{i}" for i in rng.integers(0, 90, 5))
        answer = " ".join(f"w{(i * 7 + rng.integers(3)) % 90}" for i in range(int(rng.integers(4, 9))))
        rows.append({"prompt": prompt, "completion": f" {answer}"})
    return rows


def tiny_folder(path: Path, model_type: str = "llama", chat: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A model folder with tokenizer that stock transformers opens."""
    tiny_model(model_type, seed, **changes).save_pretrained(path)
    tiny_tokenizer(chat).save_pretrained(path)
    return Path(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSON-lines file of rows."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def batch(rows: int = 2, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids and mask; row i is left-padded by i * ``padding`` tokens."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row * padding] = 0
        mask[row, : row * padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Float32 logits (B, S, V)."""
    return model(**(inputs or batch())).logits.float()


# A legal narrower shape of the tiny models, used wherever the exact widths do not matter.
NARROW = {"layers": 2, "kv_groups": 2, "queries_per_group": 1, "mlp_channels": 40}


def random_plan(
    arch: Architecture, kinds: Iterable[str] = KINDS, seed: int = 0, shape: Shape | None = None, **widths: int
) -> Plan:
    """A uniform plan that keeps units chosen by lot, different ones in every layer.

    Args:
        arch: the dense model.
        kinds: what may leave; widths of the other kinds stay full.
        shape: the widths to reach; default: NARROW (one query head less in multi-head models is impossible, so
            there query heads leave with their groups).
        widths: overrides of single widths of NARROW.
    """
    rng, full, kinds = np.random.default_rng(seed), full_shape(arch), set(kinds)
    if shape is None:
        wanted = {**NARROW, **widths}
        field = {"query_heads": "queries_per_group"}
        names = {field.get(kind, kind) for kind in kinds}
        shape = Shape(
            **{
                name: min(wanted[name], getattr(full, name)) if name in names else getattr(full, name)
                for name in NARROW
            }
        )

    def some(size: int, number: int) -> tuple[int, ...]:
        return tuple(sorted(int(i) for i in rng.choice(size, number, replace=False)))

    kept: dict[str, tuple[int, ...]] = {}
    if "layers" in kinds:
        kept["layers"] = some(arch.layers, shape.layers)
    for layer in range(arch.layers):
        if "mlp_channels" in kinds:
            kept[site_name(layer, "mlp_channels")] = some(arch.mlp_channels, shape.mlp_channels)
        if "kv_groups" in kinds:
            kept[site_name(layer, "kv_groups")] = some(arch.kv_groups, shape.kv_groups)
        if "query_heads" in kinds:
            size = arch.queries_per_group
            kept[site_name(layer, "query_heads")] = tuple(
                group * size + head for group in range(arch.kv_groups) for head in some(size, shape.queries_per_group)
            )
    plan = Plan(kept, arch.fingerprint(), {"method": "test"})
    plan.check(arch)
    return plan


def hard_gates(arch: Architecture, sites: Iterable[Site], plan: Plan) -> dict[str, torch.Tensor]:
    """Gates of 0 and 1 that close what the plan removes."""
    values = {}
    for site in sites:
        values[site.name] = torch.zeros(site.size)
        values[site.name][list(plan.kept_units(arch, site.layer, site.kind))] = 1.0
    return values
