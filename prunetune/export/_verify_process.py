"""Run as a script in a fresh process: opens an exported folder as any user would, and reports what it does.

Imports stock libraries only, nothing of prunetune, so that what it sees is what everyone will see.
Usage: ``python -P _verify_process.py request.json``; the answer is written to the path that the request names.
Legend: B batch, N generated tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main(request_path: str) -> None:
    """Answers one request: {folder, texts, prompts, expected, new_tokens, pad, device, answer}."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_grad_enabled(False)
    folder, prompts = request["folder"], request["prompts"]
    faults = _tokenizer_faults(folder, request["texts"], prompts)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    faults += [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(found, key=str)[:5]))}"
        for kind, found in loading.items()
        if found
    ]
    model = model.to(request["device"]).eval()
    answer: dict[str, Any] = {"class": f"{type(model).__module__}.{type(model).__name__}", "faults": faults}
    if not faults:
        answer["logit_difference"] = _logit_difference(model, prompts, load_file(request["expected"]))
        answer.update(_generation(model, prompts, request["new_tokens"], request["pad"]))
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _tokenizer_faults(folder: str, texts: list[str], prompts: list[list[int]]) -> list[str]:
    if not texts:
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return [
        f"the saved tokenizer splits {text[:40]!r} into other tokens than the live one"
        for text, prompt in zip(texts, prompts)
        if list(tokenizer(text)["input_ids"])[: len(prompt)] != prompt
    ]


def _logit_difference(model: Any, prompts: list[list[int]], expected: dict[str, Tensor]) -> float:
    """Largest absolute difference to the expected logits over all prompts; NaN counts as infinite."""
    largest = 0.0
    for number, prompt in enumerate(prompts):
        logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits[0].float().cpu()
        largest = max(largest, _difference(logits, expected[str(number)]))
    return largest


def _difference(a: Tensor, b: Tensor) -> float:
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).abs().max())


def _generation(model: Any, prompts: list[list[int]], new_tokens: int, pad: int) -> dict[str, Any]:
    """Greedy continuations with cache, compared with those without cache and in a left-padded batch.

    Without cache every step recomputes the whole text, so the shortest prompt has to do for that.
    """
    single = [_greedy(model, [prompt], new_tokens, pad, use_cache=True) for prompt in prompts]
    ties: list[dict[str, Any]] = []
    shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    tokens, logits = _greedy(model, [prompts[shortest]], new_tokens, pad, use_cache=False)
    reference = single[shortest]
    without_cache = _compare(reference[0][0], reference[1][0], tokens[0], logits[0], "without cache", shortest, ties)
    tokens, logits = _greedy(model, prompts, new_tokens, pad, use_cache=True)
    padded = [
        _compare(one[0][0], one[1][0], tokens[i], logits[i], "left-padded", i, ties) for i, one in enumerate(single)
    ]
    return {
        "cache_difference": without_cache,
        "padding_difference": max(padded),
        "near_ties": ties,
        "continuations": [one[0][0].tolist() for one in single],
    }


def _greedy(
    model: Any, prompts: list[list[int]], new_tokens: int, pad: int, *, use_cache: bool
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) and raw logits (B, N, V) of greedy decoding that does not stop at an end token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # A configuration of its own: the saved one may sample, penalise or stop.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    out = model.generate(input_ids=ids, attention_mask=mask)
    return out.sequences[:, longest:].cpu(), torch.stack(out.logits, dim=1).float().cpu()


def _compare(
    tokens_N: Tensor,
    logits_NV: Tensor,
    other_N: Tensor,
    other_NV: Tensor,
    way: str,
    prompt: int,
    ties: list[dict[str, Any]],
) -> float:
    """Largest logit difference up to and including the first token that differs; notes that token in ``ties``.

    After it the two texts differ, so nothing later can be compared.
    """
    differing = (tokens_N != other_N).nonzero().flatten().tolist()
    steps = differing[0] + 1 if differing else len(tokens_N)
    if differing:
        at = differing[0]
        gap = float(logits_NV[at, tokens_N[at]] - logits_NV[at, other_N[at]])
        here = _difference(logits_NV[at], other_NV[at])
        ties.append({"way": way, "prompt": prompt, "position": at, "gap": gap, "difference": here})
    return _difference(logits_NV[:steps], other_NV[:steps])


if __name__ == "__main__":
    main(sys.argv[1])
