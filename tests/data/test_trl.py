"""What TRL really makes of the rows: the same tokens that were counted, and two training steps."""

from __future__ import annotations

import pytest
from trl import SFTConfig, SFTTrainer

from prunetune.config.schema import DataConfig
from prunetune.data.load import load_bundle
from prunetune.data.tokenise import ends_with_stop, tokenise

TURNS = [{"role": "user", "content": "Hello there?"}, {"role": "assistant", "content": "Yes, hello."}]
LAYOUTS = {
    "prompt_completion": lambda i: {"prompt": f"What is {i}?", "completion": f"It is {i}."},
    "alpaca": lambda i: {"instruction": "Double it.", "input": str(i), "output": str(2 * i)},
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": f"{i}!"}]
    },
    "several_turns": lambda i: {"messages": [*TURNS, {"role": "user", "content": f"Say {i}"}, TURNS[1]]},
    "text": lambda i: {"text": f"The number {i} is a number."},
}
CHAT_ONLY = {"sharegpt", "several_turns"}
CASES = [(name, chat) for name in LAYOUTS for chat in (True, False) if chat or name not in CHAT_ONLY]


@pytest.fixture
def trained(request, tmp_path, write_rows, chat_tokenizer, raw_tokenizer, tiny_llama, monkeypatch):
    """The bundle of one layout, and a trainer that has made two steps with it."""
    name, chat = request.param
    monkeypatch.setattr("prunetune.data.prose.general_text", lambda avoid: "")
    tokenizer = chat_tokenizer if chat else raw_tokenizer
    config = DataConfig(train=write_rows([LAYOUTS[name](i) for i in range(12)]), validation_fraction=0.2)
    bundle = load_bundle(config, tokenizer=tokenizer, max_length=128)
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        max_length=128, report_to="none", save_strategy="no", disable_tqdm=True, activation_checkpointing=False,
        logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=tiny_llama, args=args, train_dataset=bundle.train, eval_dataset=bundle.validation,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return name, bundle, trainer, tokenizer


@pytest.mark.parametrize("trained", CASES, indirect=True, ids=[f"{n}-{'chat' if c else 'raw'}" for n, c in CASES])
def test_trl_takes_every_layout_and_sees_the_tokens_that_were_counted(trained):
    name, bundle, trainer, tokenizer = trained
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(3 < loss < 9 for loss in losses)
    assert 3 < trainer.evaluate()["eval_loss"] < 9
    counted = list(tokenise(bundle.train.to_list(), tokenizer))
    assert len(counted) == len(trainer.train_dataset)
    for mine, row in zip(counted, trainer.train_dataset):
        assert mine.ids == row["input_ids"]
        assert [i for i, label in enumerate(row["labels"]) if label != -100] == list(
            range(mine.target_start, len(row["labels"]))
        )
        assert ends_with_stop(mine, tokenizer)
        assert tokenizer.eos_token_id in row["labels"][-2:]
        assert (mine.target_start == 0) == (name in {"text", "several_turns"})
    targets = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert bundle.facts["target_tokens"] == targets


def test_the_loss_begins_with_the_answer(chat_tokenizer):
    row = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    (tokens,) = tokenise([row], chat_tokenizer)
    assert chat_tokenizer.decode(tokens.ids[tokens.target_start :]) == "Yes, hello.<|im_end|>\n"
    assert tokens.targets(None) == len(tokens.ids) - tokens.target_start
    assert tokens.targets(tokens.target_start + 2) == 2
    assert tokens.targets(tokens.target_start) == 0


def test_rows_cut_to_nothing_are_the_ones_that_trl_drops(chat_tokenizer, tiny_llama, tmp_path, write_rows, monkeypatch):
    monkeypatch.setattr("prunetune.data.prose.general_text", lambda avoid: "")
    rows = [{"prompt": "word " * (3 * i), "completion": "yes " * 9} for i in range(1, 13)]
    other = write_rows(rows[:1], "validation.jsonl")
    tokenizer, length = chat_tokenizer, 48
    bundle = load_bundle(DataConfig(train=write_rows(rows), validation=other), tokenizer=tokenizer, max_length=length)
    whole = load_bundle(DataConfig(train=write_rows(rows), validation=other), tokenizer=tokenizer, max_length=None)
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_length=length, report_to="none")
    trainer = SFTTrainer(model=tiny_llama, args=args, train_dataset=whole.train, processing_class=tokenizer)
    assert len(whole.train) == 12
    assert 0 < len(bundle.train) == len(trainer.train_dataset) < 12
