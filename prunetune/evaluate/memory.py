"""Peak memory of loading a model and reading one prompt, measured in a fresh process of its own.

Run as ``python -m prunetune.evaluate.memory <folder> <dtype> <device> <prompt tokens>``, it prints one JSON
line; ``peak_memory`` starts that process. On a CPU the number is the highest resident set, which includes the
libraries (``idle_bytes`` says how much) and the mapped weights file; on a GPU the allocator's maximum.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prunetune.core.errors import PrunetuneError
from prunetune.model.resolve import STOCK


@dataclass(frozen=True)
class PeakMemory:
    """``peak_bytes`` of the whole process; ``idle_bytes`` of them were taken before the model was loaded."""

    peak_bytes: int
    idle_bytes: int


def peak_memory(folder: Path, dtype: str, device: str = "cpu", prompt_tokens: int = 512) -> PeakMemory:
    """Loads the model in a new process, runs one prefill at batch 1, and reads off the peak.

    Raises:
        PrunetuneError: the process failed; the text ends with its last words.
    """
    root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), dtype, device, str(prompt_tokens)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
        check=False,
    )
    if done.returncode != 0:
        last_words = (done.stderr.strip().splitlines() or ["it was killed, most likely for lack of memory"])[-1]
        raise PrunetuneError(
            f"measuring the peak memory of {folder} failed with exit status {done.returncode}: {last_words}. "
            "Set evaluate.speed=false to leave speed and memory out."
        )
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return PeakMemory(int(measured["peak_bytes"]), int(measured["idle_bytes"]))


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far.

    On Linux from /proc: ``ru_maxrss`` would start at the parent's size, because it survives exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(folder: str, dtype: str, device: str, prompt_tokens: int) -> PeakMemory:
    import torch
    from transformers import AutoModelForCausalLM

    idle = torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **STOCK)
    model = model.to(device).eval()
    ids = torch.arange(prompt_tokens, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return PeakMemory(torch.cuda.max_memory_allocated(), idle)
    return PeakMemory(peak_resident_bytes(), idle)


if __name__ == "__main__":
    found = _measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    print(json.dumps({"peak_bytes": found.peak_bytes, "idle_bytes": found.idle_bytes}))
