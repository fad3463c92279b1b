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

# Decoding without cache recomputes the whole text at every token.
_STEPS_WITHOUT_CACHE = 8


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
    """Greedy continuations of a left-padded batch, compared with single prompts with and without cache.

    Without cache, each prompt is run once with its continuation behind it: attention looks back only, so the
    logits before every token are those that decoding without cache would see at that step, and if every token
    is the largest of them, that decoding gives the same text. The first tokens are also decoded that way.
    """
    ties: list[dict[str, Any]] = []
    tokens_BN, logits_BNV = _greedy(model, prompts, new_tokens, pad, use_cache=True)
    no_cache = []
    for i, prompt in enumerate(prompts):
        forced_NV = _forced(model, prompt, tokens_BN[i])
        forced = forced_NV.argmax(dim=1), forced_NV
        no_cache.append(_compare(forced, (tokens_BN[i], logits_BNV[i]), "left-padded", i, ties))
    shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    start = prompts[shortest]
    tokens, logits = _greedy(model, [start], new_tokens, pad, use_cache=True)
    single = tokens[0], logits[0]
    forced_NV = _forced(model, start, single[0])
    cache = [_compare((forced_NV.argmax(dim=1), forced_NV), single, "with cache", shortest, ties)]
    tokens, logits = _greedy(model, [start], min(new_tokens, _STEPS_WITHOUT_CACHE), pad, use_cache=False)
    cache.append(_compare(single, (tokens[0], logits[0]), "without cache", shortest, ties))
    return {
        "cache_difference": max(cache),
        "padding_difference": max(no_cache),
        "near_ties": ties,
        "continuations": tokens_BN.tolist(),
    }


def _forced(model: Any, prompt: list[int], tokens_N: Tensor) -> Tensor:
    """Logits (N, V) before each of the tokens, from one pass without cache and padding."""
    ids = torch.tensor([prompt + tokens_N.tolist()[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu()


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
    reference: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    way: str,
    prompt: int,
    ties: list[dict[str, Any]],
) -> float:
    """Largest logit difference up to and including the first token that differs; notes that token in ``ties``.

    Both sides are tokens (N,) and logits (N, V). After that token the texts differ, so nothing later can be
    compared; the reference may be longer.
    """
    steps = len(other[0])
    (tokens_N, logits_NV), (other_N, other_NV) = (reference[0][:steps], reference[1][:steps]), other
    differing = (tokens_N != other_N).nonzero().flatten().tolist()
    if differing:
        at = differing[0]
        steps = at + 1
        gap = float(logits_NV[at, tokens_N[at]] - logits_NV[at, other_N[at]])
        here = _difference(logits_NV[at], other_NV[at])
        ties.append({"way": way, "prompt": prompt, "position": at, "gap": gap, "difference": here})
    return _difference(logits_NV[:steps], other_NV[:steps])


if __name__ == "__main__":
    main(sys.argv[1])
