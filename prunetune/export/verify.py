"""The proof that an exported folder is the model that was trained; a failed check is an ExportError.

Three links, each measured in float32: the live model with its adapters = the merged weights; the files = the
merged weights rounded to their dtype, bit by bit; a fresh process with stock transformers = those weights,
in logits and in greedy text with cache, without cache and left-padded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunetune.core.console import note
from prunetune.core.errors import ExportError
from prunetune.core.files import read_json, write_json
from prunetune.core.streams import stream
from prunetune.export.live import float32_noise, in_float32, largest_difference, logits, undecorated
from prunetune.export.merge import merged_tensors
from prunetune.export.merge_base import describe_difference, difference_to_trained
from prunetune.model.quantized import count_parameters
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import base_model

TOLERANCE = 1e-4
NOISE_FACTOR = 4.0
NEW_TOKENS = 64
_TEXTS = (
    "Water boils at",
    "def add(a, b):\n    return a + b\n\n\ndef",
    "Question: What does this function return, and when does it raise an error?\nAnswer: It returns the number "
    "of items that were read. If the file is empty, the result is 0; if it cannot be opened, an exception",
)
# Prompts of random tokens where there is no tokenizer, or one that knows none of these words.
_RANDOM_LENGTHS = (3, 7, 30)
_LEAST_DISTINCT = 8
# How the launcher of a distributed run would make the fresh process believe that it is one of its ranks.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def verify_export(
    model: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype, trained: list[Tensor] | None = None
) -> dict[str, Any]:
    """Compares a folder with the live model that it was written from.

    Args:
        model: the live model, adapters unmerged; evaluated in float32 and handed back as it was.
        tokenizer: gives the prompts; None takes random token ids.
        folder: what ``export_model`` wrote.
        dtype: of its weights.
        trained: logits of the quantised model that ``model`` stands for, for the same prompts.

    Returns:
        Measurements: ``merge_difference``, ``rounding_difference`` (the derived bound of a 16-bit export: what
        rounding the weights alone does to the logits), ``reload_difference``, ``cache_difference``,
        ``padding_difference``, ``near_ties``, the tolerance that the others had to meet, and for a quantised model
        ``from_trained`` (see merge_base.py).

    Raises:
        ExportError: a check failed or the fresh process did not finish.

    Two ways of decoding may choose different tokens only where their logits agree within the tolerance, so that
    the two tokens are closer than twice that; each such place is reported in ``near_ties``. The tolerance is 1e-4,
    or 4 times what float32 arithmetic itself does to these logits (measured against float64) if that is more.
    """
    start = time.monotonic()
    device = _device(model)
    prompts, texts = prompts_for(model, tokenizer)
    merged = _merged_model(model, folder, device)
    with in_float32(model, dict(merged.named_buffers()), device):
        live = logits(undecorated(model), prompts, device)
    judge = _Judge(merged, prompts, device)
    merge_difference = largest_difference(live, logits(merged, prompts, device))
    judge.require("the merged weights differ from the live model with its adapters", merge_difference)
    _require_equal_files(merged, folder, dtype)
    _round(merged, dtype)
    expected = live if dtype == torch.float32 else logits(merged, prompts, device)
    from_trained = {} if trained is None else {"from_trained": difference_to_trained(trained, expected)}
    answer = fresh_process(model, folder, prompts, texts, expected, device)
    judge.sequences = [prompt + more for prompt, more in zip(prompts, answer["continuations"])]
    judge.require("the reloaded model differs from the live one", answer["logit_difference"])
    judge.require("decoding without cache differs from decoding with it", answer["cache_difference"])
    judge.require("a left-padded batch differs from single prompts", answer["padding_difference"])
    gap = _continuation_gap(merged, prompts, answer["continuations"], device)
    judge.require("the reloaded model's greedy text is not the live model's", gap / 2)
    result = {
        "tolerance": judge.allowed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "merge_difference": merge_difference,
        "rounding_difference": largest_difference(live, expected),
        "reload_difference": answer["logit_difference"],
        "cache_difference": answer["cache_difference"],
        "padding_difference": answer["padding_difference"],
        "generated_tokens": len(answer["continuations"][0]),
        "near_ties": answer["near_ties"],
        "class": answer["class"],
        "seconds": round(time.monotonic() - start, 1),
        **from_trained,
    }
    _say(result)
    return result


def _say(result: dict[str, Any]) -> None:
    rounding = result["rounding_difference"]
    bound = f"; rounding to {result['dtype']} moves logits by at most {rounding:.3g}" if rounding else ""
    note(
        f"verified in a fresh process: logits within {result['reload_difference']:.1e} "
        f"(merge {result['merge_difference']:.1e}), {result['generated_tokens']} greedy tokens equal with and "
        f"without cache and left-padded{bound} [{result['seconds']:.0f} s]"
    )
    if "from_trained" in result:
        note(describe_difference(result["from_trained"]))
    for tie in result["near_ties"]:
        note(
            f"near-tie {tie['way']}, prompt {tie['prompt']}, token {tie['position']}: the two best logits are "
            f"{tie['gap']:.1e} apart, the numerical difference there is {tie['difference']:.1e}"
        )


class _Judge:
    """Decides whether a difference is arithmetic or a fault.

    A difference of at most TOLERANCE passes. A deep or badly cut model can amplify the rounding of float32 itself
    beyond that: then it is measured, and NOISE_FACTOR times it is allowed. A wrong weight moves logits by far more.
    """

    def __init__(self, merged: nn.Module, sequences: list[list[int]], device: torch.device):
        self.merged, self.sequences, self.device = merged, sequences, device
        self.allowed = TOLERANCE

    def require(self, fault: str, difference: float) -> None:
        """Raises ExportError if ``difference`` is more than arithmetic."""
        if difference <= self.allowed:
            return
        noise = float32_noise(self.merged, self.sequences, self.device)
        self.allowed = max(self.allowed, NOISE_FACTOR * noise)
        if not difference <= self.allowed:
            raise ExportError(
                f"the export did not verify: {fault} (by {difference:.3g}, allowed {self.allowed:.3g}). It was "
                "discarded; please report this with the run's resolved.yaml, or set export.verify=false to keep "
                "the folder unproven"
            )


def _device(model: nn.Module) -> torch.device:
    """The live model's device if three float32 copies fit beside it, else the CPU, for both sides."""
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return torch.device("cpu")
    needed = 3 * 4 * count_parameters(model)
    free, _ = torch.cuda.mem_get_info(parameter.device)
    return parameter.device if free > needed else torch.device("cpu")


def prompts_for(model: nn.Module, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Token ids of different lengths, and the texts that the first of them came from."""
    config = base_model(model).config
    room = max(1, (getattr(config, "max_position_embeddings", None) or 4096) - NEW_TOKENS)
    texts = list(_TEXTS) if tokenizer is not None else []
    prompts = [list(tokenizer(text)["input_ids"])[:room] for text in texts]
    if len({token for prompt in prompts for token in prompt}) >= _LEAST_DISTINCT and all(prompts):
        return prompts, texts
    draw = stream(0, "verification prompts")
    lengths = [min(length, room) for length in _RANDOM_LENGTHS]
    return [draw.integers(config.vocab_size, size=length).tolist() for length in lengths], []


def _merged_model(model: nn.Module, folder: Path, device: torch.device) -> Any:
    """A plain float32 model of the merged weights, made from the live tensors, not from the files."""
    from transformers import AutoConfig

    base = base_model(model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    state = {name: tensor.float().cpu() for name, tensor in merged_tensors(model, torch.float32)}
    plain = type(base).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return plain.to(device).eval()


def _require_equal_files(merged: Any, folder: Path, dtype: torch.dtype) -> None:
    """Every tensor in the files is bit for bit the merged one, cast once."""
    reader, state = ShardReader(folder), merged.state_dict()
    for name in reader.names():
        expected = state[name].cpu()
        expected = expected.to(dtype) if expected.is_floating_point() else expected
        if not torch.equal(reader.read(name), expected):
            raise ExportError(
                f"the export did not verify: {name} in {reader.entries[name].file} is not the tensor that was "
                "written. It was discarded; check the disk, then export again"
            )


@torch.no_grad()
def _round(plain: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the parameters to ``dtype`` and keeps computing in float32."""
    for parameter in plain.parameters():
        parameter.copy_(parameter.to(dtype).float())


def fresh_process(
    model: nn.Module,
    folder: Path,
    prompts: list[list[int]],
    texts: list[str],
    expected: list[Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """What stock transformers makes of the folder in a process of its own; see _verify_process.py."""
    config = base_model(model).config
    room = (getattr(config, "max_position_embeddings", None) or 4096) - max(map(len, prompts))
    with tempfile.TemporaryDirectory(prefix="prunetune-verify-") as name:
        scratch = Path(name)
        save_file(
            {str(i): logits.contiguous() for i, logits in enumerate(expected)},
            scratch / "expected.safetensors",
        )
        request = {
            "folder": str(folder.resolve()),
            "prompts": prompts,
            "texts": texts,
            "expected": str(scratch / "expected.safetensors"),
            "new_tokens": max(1, min(NEW_TOKENS, room)),
            "pad": _pad_token(config),
            "device": str(device),
            "answer": str(scratch / "answer.json"),
        }
        write_json(scratch / "request.json", request)
        _run(scratch, limit_s=600 + count_parameters(model) / 1e6)
        answer: dict[str, Any] = read_json(scratch / "answer.json")
    if answer["faults"]:
        raise ExportError("the export did not verify, it was discarded: " + "; ".join(answer["faults"]))
    if not answer["class"].startswith("transformers."):
        raise ExportError(f"the export did not verify: it opened as {answer['class']}, which is not a stock class")
    return answer


def _pad_token(config: Any) -> int:
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0


def _run(scratch: Path, limit_s: float) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCH_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Decoding waits for memory; threads that spin meanwhile slow each other down several times on a busy machine.
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    script = Path(__file__).with_name("_verify_process.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(scratch / "request.json")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"the export did not verify: the fresh process was not done after {limit_s:.0f} s. It was discarded; "
            "free the machine and export again, or set export.verify=false to keep the folder unproven"
        ) from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise ExportError(f"the export did not verify: stock transformers could not use it. It was discarded.\n{tail}")


def _continuation_gap(
    plain: Any, prompts: list[list[int]], continuations: list[list[int]], device: torch.device
) -> float:
    """How far, in the model made from the live tensors, any generated token is below the best one; 0 if none is."""
    sequences = [prompt + more for prompt, more in zip(prompts, continuations)]
    gaps = []
    for prompt, more, logits_SV in zip(prompts, continuations, logits(plain, sequences, device)):
        steps_NV = logits_SV[len(prompt) - 1 : -1]
        chosen_N = steps_NV.gather(1, torch.tensor(more)[:, None]).flatten()
        gaps.append(float((steps_NV.max(dim=1).values - chosen_N).max()))
    return max(gaps)
