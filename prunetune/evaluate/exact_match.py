"""Exact match: how often the final answer of a generated completion is the one that the row gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from prunetune.core.errors import DataError
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow, encode_rows
from prunetune.model.token_stats import evaluating


def exact_match(
    model: Any, tokenizer: Any, rows: Iterable[Mapping[str, Any]], answer: str, max_new_tokens: int, batch_size: int = 8
) -> float:
    """Fraction of rows whose greedily generated completion ends in the right answer.

    Args:
        rows: prompt-completion rows, plain or conversational; rows whose completion holds no answer are left out.
        answer: regular expression; the last match's first group (or the whole match) is the answer. Commas, spaces
            and a closing full stop do not count, so ``1,000.`` is ``1000``.
        max_new_tokens: a completion is cut there.

    Returns:
        In [0, 1].

    Raises:
        DataError: no row has a prompt, or no completion holds an answer.
    """
    pattern = re.compile(answer)
    asked = []
    for row in encode_rows(tokenizer, list(rows)):
        prompt = _prompt(row)
        wanted = final_answer(pattern, tokenizer.decode(row.input_ids[len(prompt) :], skip_special_tokens=True))
        if prompt and wanted is not None:
            asked.append((prompt, wanted))
    if not asked:
        raise DataError(
            f"no held-out row has a prompt and a completion that matches {answer!r}; set evaluate.answer anew"
        )
    asked.sort(key=lambda pair: len(pair[0]))
    right = 0
    with evaluating(model):
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            texts = _generate(model, tokenizer, [prompt for prompt, _ in batch], max_new_tokens)
            right += sum(final_answer(pattern, text) == wanted for text, (_, wanted) in zip(texts, batch, strict=True))
    return right / len(asked)


def final_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """The last answer in ``text`` in comparable form; None if there is none."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1) if pattern.groups else matches[-1].group()
    return re.sub(r"[,\s]", "", found or "").rstrip(".")


def _prompt(row: TokenRow) -> list[int]:
    first = next((i for i, label in enumerate(row.labels) if label != IGNORED_LABEL), 0)
    return row.input_ids[:first]


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    longest = max(map(len, prompts))
    # Any id will do under the mask; the padding is on the left, so that all completions begin at one place.
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts
