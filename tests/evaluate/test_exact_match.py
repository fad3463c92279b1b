"""Exact match: which answers count as equal, and that greedy completions are what is compared."""

from __future__ import annotations

import re

import pytest
import torch

from prunetune.core.errors import DataError
from prunetune.evaluate.exact_match import exact_match, final_answer
from tests.support import tiny_model, tiny_rows, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a #### 72", "72"), ("#### 1 then #### 1,000.", "1000"), ("#### -3.5\n", "-3.5"), ("none", None)],
)
def test_the_last_answer_counts_in_comparable_form(text: str, answer: str | None) -> None:
    assert final_answer(re.compile(r"#### *(-?[0-9.,]+)"), text) == answer


def test_rows_that_the_model_itself_wrote_are_all_right_in_any_batch() -> None:
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer()
    rows = []
    for row in tiny_rows(6, seed=5):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        if text.strip():
            rows.append({"prompt": row["prompt"], "completion": f" {text}"})
    assert len(rows) >= 3
    answer = r"(w\d+)\W*$"
    assert exact_match(model, tokenizer, rows, answer, 5, batch_size=1) == 1.0
    assert exact_match(model, tokenizer, rows, answer, 5, batch_size=4) == 1.0
    wrong = [{**row, "completion": " w93 w93"} for row in rows]
    assert exact_match(model, tokenizer, wrong, answer, 5) < 1.0


def test_rows_without_an_answer_are_refused() -> None:
    with pytest.raises(DataError, match=r"evaluate\.answer"):
        exact_match(tiny_model(), tiny_tokenizer(), tiny_rows(2), "####", 4)
