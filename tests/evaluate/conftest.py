"""A tiny random model and a byte-level tokenizer, built here so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<end>", "<|user|>", "<|assistant|>"]
SENTENCES = [
    "What does the word pruning mean to a gardener in winter?",
    "It means cutting away what the tree can spare so that the rest grows.",
    "How many channels does a small model need to answer a short question?",
    "Fewer than it has, as long as somebody measures what was lost on the way.",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens and a chat template that marks the assistant's tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A two-layer Llama with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    widths = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(widths | changes))).eval()


def build_folder(path: Path, seed: int = 0, **changes) -> Path:
    """A model folder that stock transformers opens."""
    build_model(seed, **changes).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture(scope="session")
def make_model():
    return build_model


@pytest.fixture(scope="session")
def make_folder():
    return build_folder


@pytest.fixture(scope="session")
def sentences():
    return list(SENTENCES)
