"""What a selection wrote is data to train on: tokens and labels arrive at TRL as they were decided."""

from __future__ import annotations

import pytest
from trl import SFTConfig, SFTTrainer

from prunetune.config.schema import DataConfig
from prunetune.core.errors import DataError
from prunetune.data import score, select
from prunetune.data.load import load_bundle
from prunetune.data.selection_folder import write_selection
from tests.data.test_scoring import rows
from tests.support import tiny_model, tiny_tokenizer


def test_a_selection_is_trained_on_as_it_was_decided(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    settings = {"samples_method": "loss", "samples_kept": 0.5, "tokens_method": "entropy", "tokens_kept": 0.5}
    chosen = select(score(rows(24), model, tokenizer), **settings)
    write_selection(chosen, tmp_path / "kept")
    config = DataConfig(train=str(tmp_path / "kept"), validation_fraction=0.25)
    bundle = load_bundle(config, tokenizer=tokenizer, max_length=64)
    assert bundle.facts["format"] == "tokens"
    assert len(bundle.train) + len(bundle.validation) == 12
    wanted = {tuple(row["input_ids"]): row["labels"] for row in chosen.dataset()}
    targets = sum(label != -100 for row in bundle.train for label in row["labels"][1:])
    assert bundle.facts["target_tokens"] == targets
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path / "out"), max_length=64, use_cpu=True, report_to="none", max_steps=1),
        train_dataset=bundle.train,
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == len(bundle.train)
    for row in trainer.train_dataset:
        assert row["labels"] == wanted[tuple(row["input_ids"])]
    trainer.train()


def test_rows_of_tokens_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input_ids": [1, 2], "labels": [-100]}\n{"input_ids": [1, 2], "labels": [1, 2]}\n')
    with pytest.raises(DataError, match="line 1: input_ids and labels are not two lists of one length"):
        load_bundle(DataConfig(train=str(file)), tokenizer=tiny_tokenizer(), max_length=64)
