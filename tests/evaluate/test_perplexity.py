"""Domain perplexity against TRL's own evaluation loop; text perplexity against full logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from prunetune.core.errors import DataError
from prunetune.evaluate.perplexity import domain_perplexity, text_perplexity
from prunetune.model.token_rows import is_conversational, token_rows


def rows_of(form, sentences):
    pairs = [*zip(sentences[::2], sentences[1::2]), ("Why?", "Because."), ("One more question", "its answer")]
    if form == "prompt_completion":
        return [{"prompt": q, "completion": " " + a} for q, a in pairs]
    if form == "conversational":
        return [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in pairs
        ]
    if form == "messages":
        return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    return [{"text": f"{q} {a}"} for q, a in pairs]


def trainer_for(model, tokenizer, rows, tmp_path, max_length, batch_size, **changes):
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        gradient_checkpointing=False,
        max_length=max_length,
        per_device_eval_batch_size=batch_size,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )


CASES = [
    ("prompt_completion", {}),
    ("prompt_completion", {"completion_only": False}),
    ("conversational", {}),
    ("conversational", {"assistant_only": True}),
    ("messages", {}),
    ("messages", {"assistant_only": True}),
    ("text", {}),
]


@pytest.mark.parametrize(("form", "choice"), CASES)
@pytest.mark.parametrize("max_length", [512, 24])
def test_equals_eval_loss_of_sft_trainer(form, choice, max_length, model, tokenizer, sentences, tmp_path):
    rows = rows_of(form, sentences)
    trl_names = {"completion_only": "completion_only_loss", "assistant_only": "assistant_only_loss"}
    changes = {trl_names[key]: value for key, value in choice.items()}
    trainer = trainer_for(model, tokenizer, rows, tmp_path, max_length, len(rows), **changes)
    mine = token_rows(tokenizer, rows, max_length, **choice)
    theirs = trainer.eval_dataset
    assert [row.input_ids for row in mine] == [list(ids) for ids in theirs["input_ids"]]
    assert [row.labels for row in mine] == [list(labels) for labels in theirs["labels"]]
    found = domain_perplexity(model, tokenizer, rows, max_length, batch_size=3, **choice)
    logs = trainer.evaluate()
    assert found.nll == pytest.approx(logs["eval_loss"], abs=2e-6)
    assert found.top1 == pytest.approx(logs["eval_mean_token_accuracy"], abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.tokens == sum(row.targets for row in mine)


def test_over_several_batches_trl_averages_batch_means(model, tokenizer, sentences, tmp_path):
    """The difference that the docstring of domain_perplexity tells of, in numbers."""
    rows = rows_of("prompt_completion", sentences)
    loss = trainer_for(model, tokenizer, rows, tmp_path, 512, 2).evaluate()["eval_loss"]
    halves = [domain_perplexity(model, tokenizer, rows[i : i + 2]) for i in (0, 2)]
    assert loss == pytest.approx(sum(half.nll for half in halves) / 2, abs=2e-6)
    whole = domain_perplexity(model, tokenizer, rows)
    assert whole.nll == pytest.approx(sum(h.nll * h.tokens for h in halves) / whole.tokens, abs=1e-6)
    assert abs(whole.nll - loss) > 1e-3


def test_batch_size_and_order_change_nothing(model, tokenizer, sentences):
    rows = rows_of("text", sentences)
    one = domain_perplexity(model, tokenizer, rows, batch_size=1)
    many = domain_perplexity(model, tokenizer, rows[::-1], batch_size=4)
    assert one.nll == pytest.approx(many.nll, abs=1e-6)
    assert one.tokens == many.tokens


def test_rows_cut_down_to_their_prompt_are_left_out(model, tokenizer):
    rows = [{"prompt": "long " * 40, "completion": "gone"}, {"prompt": "a", "completion": "bc"}]
    assert domain_perplexity(model, tokenizer, rows, max_length=16).tokens == len(tokenizer("bc").input_ids) + 1
    with pytest.raises(DataError, match="raise max_length"):
        domain_perplexity(model, tokenizer, rows[:1], max_length=16)


@pytest.mark.parametrize(
    ("rows", "message"), [([], "no rows"), ([{"question": "a"}], "row 1 has the columns question")]
)
def test_unusable_rows_are_refused(rows, message, model, tokenizer):
    with pytest.raises(DataError, match=message):
        domain_perplexity(model, tokenizer, rows)


def test_conversational_is_recognised_by_messages():
    assert is_conversational({"messages": [{"role": "user", "content": "x"}]})
    assert not is_conversational({"prompt": "x", "completion": "y"})
    assert not is_conversational({"text": "x"})


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_perplexity_scores_contiguous_windows(adds_bos, model, tokenizer, sentences, tmp_path):
    if adds_bos:
        tokenizer = with_bos(tokenizer, tmp_path)
    text = " ".join(sentences)
    plain = tokenizer(text, add_special_tokens=False).input_ids
    found = text_perplexity(model, tokenizer, text, max_tokens=50, window=20, batch_size=2)
    size = 19 if adds_bos else 20
    losses = []
    for start in range(0, 50, size):
        part = ([1] if adds_bos else []) + plain[start : min(start + size, 50)]
        ids = torch.tensor([part])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    assert found.tokens == len(losses) == (50 if adds_bos else 47)
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def with_bos(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", changed.bos_token_id)]
    )
    changed.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_text_of_one_token_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="few hundred"):
        text_perplexity(model, tokenizer, "a")


def test_training_mode_is_put_back(model, tokenizer):
    model.train()
    text_perplexity(model, tokenizer, "some words to read")
    assert model.training
