"""`prunetune chat` with piped lines, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from prunetune.cli.conversation import Conversation, load
from prunetune.cli.main import app

WORDS = ["<eos>", "<unk>", "user", "assistant", *(f"word{i}" for i in range(28))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=48,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def talk(folder: Path, **options: object) -> Conversation:
    model, tokenizer = load(str(folder))
    return Conversation(model, tokenizer, **{"system": None, "max_new_tokens": 8, "temperature": 0.0, **options})


def test_piped_lines_are_answered_until_quit(folder: Path) -> None:
    lines = "word1 word2\n\n/new\nword3\n/quit\nword4\n"
    arguments = ["chat", str(folder), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0
    assert "Traceback" not in result.output


def test_the_streamed_answer_is_what_generate_gives(folder: Path) -> None:
    conversation = talk(folder)
    inputs = conversation._inputs("word1 word2")
    tokens = conversation.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = conversation.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(conversation.answer("word1 word2")).strip() == expected.strip()


def test_turns_are_remembered_until_the_context_is_full(folder: Path) -> None:
    conversation = talk(folder)
    lengths = []
    for _ in range(6):
        lengths.append(conversation._inputs("word1")["input_ids"].shape[1])
        list(conversation.answer("word1"))
    assert lengths[1] > lengths[0]
    assert max(lengths) + 8 <= 48
    conversation.forget()
    assert conversation._inputs("word1")["input_ids"].shape[1] == lengths[0]


def test_a_failing_generation_is_raised_and_does_not_hang(folder: Path) -> None:
    conversation = talk(folder)

    def broken(**inputs: object) -> None:
        raise RuntimeError("out of memory")

    conversation.model.generate = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        list(conversation.answer("word1"))
