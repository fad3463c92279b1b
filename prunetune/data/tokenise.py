"""What TRL will make of an example: its tokens and which of them the loss sees.

Mirrors SFTTrainer's dataset preparation (trl 1.16), so that rows can be judged before a model is loaded; a
test compares the two token by token. Training itself uses TRL's own preparation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from prunetune.data.formats import BadRowError
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow

Messages = list[dict[str, str]]
_CHUNK = 512


@dataclass(frozen=True)
class Tokens:
    """Token ids of one example, before truncation; the loss sees those from ``target_start`` on.

    ``labels`` are given if the example came with its own: then some of those are left out too.
    """

    ids: list[int]
    target_start: int
    labels: list[int] | None = None

    def targets(self, max_length: int | None) -> int:
        """How many target tokens are left in the first ``max_length`` tokens."""
        if self.labels is not None:
            return TokenRow(self.ids, self.labels).cut(max_length).targets
        kept = len(self.ids) if max_length is None else min(len(self.ids), max_length)
        return max(0, kept - self.target_start)


def tokenise(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, *, completion_only: bool | None = None
) -> Iterator[Tokens | BadRowError]:
    """Tokens of each example in turn, or why the chat template refuses it.

    Args:
        examples: prompt + completion, messages or text, as ``formats.converter`` makes them.
        tokenizer: a transformers tokenizer.
        completion_only: whether the loss sees completions only; None: if the example has a completion.
    """
    if examples and "input_ids" in examples[0]:
        yield from (_as_given(example) for example in examples)
        return
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        texts: list[tuple[str, str] | BadRowError] = [_render(example, tokenizer) for example in chunk]
        good = [text for text in texts if not isinstance(text, BadRowError)]
        # A rendered template already has its special tokens; plain text gets the tokenizer's.
        plain = not _is_chat(chunk[0])
        prompts = iter(_ids([prompt for prompt, _ in good], tokenizer, plain))
        wholes = iter(_ids([whole for _, whole in good], tokenizer, plain))
        for example, text in zip(chunk, texts):
            if isinstance(text, BadRowError):
                yield text
                continue
            prompt, whole = next(prompts), next(wholes)
            masked = "completion" in example and completion_only is not False
            yield Tokens(whole, _common_prefix(prompt, whole) if masked else 0)


def _as_given(example: Mapping[str, Any]) -> Tokens:
    """An example that is tokens already."""
    ids, labels = example["input_ids"], example["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(ids))
    return Tokens(ids, start, labels)


def _is_chat(example: Mapping[str, Any]) -> bool:
    return "messages" in example or isinstance(example.get("prompt"), list)


def _render(example: Mapping[str, Any], tokenizer: Any) -> tuple[str, str] | BadRowError:
    """The prompt's text (empty if none) and the whole text, with the end-of-text token as TRL adds it."""
    if not _is_chat(example):
        prompt = example.get("prompt", "")
        answer = example["completion"] if "completion" in example else example["text"]
        end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return prompt, prompt + answer + end
    try:
        if "messages" in example:
            return "", tokenizer.apply_chat_template(example["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
        return prompt, tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
    except TemplateError as error:
        return BadRowError(f"the model's chat template refuses it: {error}")


def _ids(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _common_prefix(first: list[int], second: list[int]) -> int:
    for length, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return length
    return min(len(first), len(second))


def ends_with_stop(tokens: Tokens, tokenizer: Any) -> bool:
    """Whether the loss sees an end-of-turn token after the answer, so that the model learns to stop."""
    tail = tokens.ids[tokens.target_start :][-3:]  # a template may write a line break after the token
    return tokenizer.eos_token_id in tail


@dataclass(frozen=True)
class Measure:
    """Lengths of a set of examples, in tokens. ``targets`` counts after truncation to ``max_length``."""

    lengths: np.ndarray
    prompts: np.ndarray
    targets: np.ndarray
    max_length: int | None

    @property
    def truncated(self) -> int:
        """Rows that are longer than ``max_length``."""
        return 0 if self.max_length is None else int((self.lengths > self.max_length).sum())

    def length_for(self, share: float) -> int:
        """Tokens that this share of the rows fit into."""
        return int(np.quantile(self.lengths, share, method="higher"))

    def facts(self) -> dict[str, Any]:
        """Numbers for people and for the run folder."""
        kept = self.lengths if self.max_length is None else np.minimum(self.lengths, self.max_length)
        quantiles = {"min": 0.0, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        return {
            "length_tokens": {name: self.length_for(share) for name, share in quantiles.items()},
            "tokens": int(kept.sum()),
            "target_tokens": int(self.targets.sum()),
            "target_share": round(float(self.targets.sum() / max(1, kept.sum())), 4),
        }


def measure(tokens: Sequence[Tokens], max_length: int | None) -> Measure:
    """Lengths, prompt lengths and remaining target tokens of each example."""
    return Measure(
        lengths=np.array([len(item.ids) for item in tokens], dtype=np.int64),
        prompts=np.array([item.target_start for item in tokens], dtype=np.int64),
        targets=np.array([item.targets(max_length) for item in tokens], dtype=np.int64),
        max_length=max_length,
    )
