"""Tiny tuned models for the export's tests."""

import torch
from peft import LoraConfig, get_peft_model

from tests.support import tiny_model

FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied_mha": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3_text": ("gemma3_text", {"tie_word_embeddings": True}),
}


def base_of(family, **changes):
    model_type, more = FAMILIES[family]
    return tiny_model(model_type, **{**more, **changes})


def adapt(model, seed=1, **options):
    """Adds LoRA with factors that are not zero, and gives every trained tensor a move of its own."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return tuned.eval()
