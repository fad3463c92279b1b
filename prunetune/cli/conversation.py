"""A conversation with a causal model, answer by answer, streamed; used by `prunetune chat`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from rich.prompt import Prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from prunetune.core.console import console
from prunetune.model.resolve import STOCK, resolve_model


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, hub id or short name, on the GPU if there is one."""
    folder = resolve_model(name).folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console().status(f"loading {name}"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **STOCK)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return model.to(device).eval(), tokenizer


def questions() -> Iterator[str]:
    """What the person types, or the lines that are piped in; blank ones are skipped."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            text = Prompt.ask("[bold cyan]you[/bold cyan]", console=console()).strip()
        except EOFError:
            return
        if text:
            yield text


class Conversation:
    """Turns so far, and the next answer.

    Args:
        model: a causal model. tokenizer: its tokenizer.
        system: system message, or None.
        max_new_tokens: longest answer in tokens.
        temperature: 0 for greedy.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.remembers = bool(tokenizer.chat_template)
        self._opening = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    def forget(self) -> None:
        """Drops all turns; the system message stays."""
        self._turns.clear()

    def answer(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece and remembers the turn when it is complete."""
        inputs = self._inputs(question)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[Exception] = []
        worker = threading.Thread(target=self._generate, args=(inputs, streamer, failure), daemon=True)
        worker.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        worker.join()
        if failure:
            raise failure[0]
        if self.remembers:
            self._turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "".join(pieces)},
            ]

    def _inputs(self, question: str) -> dict[str, torch.Tensor]:
        """(1, S) token ids and mask that fit the context together with the answer; the oldest turns give way."""
        room = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        while True:
            encoded = self._encode(question)
            if encoded["input_ids"].shape[1] + self.max_new_tokens <= room or not self._turns:
                return {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
            del self._turns[:2]

    def _encode(self, question: str) -> dict[str, torch.Tensor]:
        if not self.remembers:
            encoded = self.tokenizer(question, return_tensors="pt")
        else:
            turns = [*self._opening, *self._turns, {"role": "user", "content": question}]
            encoded = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _generate(self, inputs: dict[str, torch.Tensor], streamer: Any, failure: list[Exception]) -> None:
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        try:
            self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, streamer=streamer, **sampling)
        except Exception as error:  # handed to the reading thread, which would otherwise wait for ever
            failure.append(error)
            streamer.end()
