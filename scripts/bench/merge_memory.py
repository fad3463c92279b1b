"""What merging costs: peak memory and seconds for bases of growing size, beside mergekit and PEFT on the same inputs.

    python scripts/bench/merge_memory.py --sizes 0.5,1,2,4 --out merge_memory.json

Bases are Llamas of one width and growing depth in bfloat16 shards, written without a model in memory. Two jobs: one
adapter into the base, and DARE-TIES of three tuned models. Every tool runs alone in a fresh process; the sides take
turns. Peaks are given whole and above what the imports alone take. mergekit is installed from its package into an
environment of its own, which borrows this one's torch; where that fails, it is said and left out. The disk holds five
times the largest size at once, and nothing afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
import yaml
from _common import report
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from prunetune.core.files import write_json
from prunetune.model.shards import ShardReader, ShardWriter

HERE = Path(__file__).parent
SHARD_BYTES = 200 * 10**6
WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
DROP, WEIGHTS = 0.5, (0.5, 0.3, 0.2)
# A row block of the merge, in bytes: what a peak may have beside two shards.
BLOCK_BYTES = 64 * 2**20
Measured = dict[str, float]


def main() -> None:
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="merge-memory-", dir=options.scratch))
    try:
        tools = Tools(work, options)
        result: dict[str, Any] = {
            "widths": WIDTHS,
            "shard_bytes": SHARD_BYTES,
            "threads": torch.get_num_threads(),
            "mergekit": tools.mergekit_version,
            "equality": equality(work, tools),
            "sizes": [],
        }
        for size in (float(part) for part in options.sizes.split(",")):
            result["sizes"].append(measure(size, work / "size", tools, options.turns))
            shutil.rmtree(work / "size")
            if options.out:
                write_json(options.out, result)
        result["flat"] = {job: flatness(result["sizes"], job) for job in ("adapter", "dare_ties")}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(result, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5,1,2,4", help="GB of the bases")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room; default: the system's")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--mergekit", help="interpreter of an environment that has it; default: one is made")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Tools:
    """The commands that are compared.

    Args:
        work: scratch folder. options: of the command line.
    """

    def __init__(self, work: Path, options: argparse.Namespace):
        self._work = work
        self.mergekit = None
        if not options.without_mergekit:
            self.mergekit = options.mergekit or install_mergekit(work / "mergekit")
        self.mergekit_version = "left out"
        if self.mergekit is not None:
            asked = [self.mergekit, "-c", "from importlib.metadata import version; print(version('mergekit'))"]
            self.mergekit_version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    def run(self, tool: str, job: str, folder: Path, **changes: Any) -> Measured:
        """Runs one tool on a folder's models; its output is ``folder/out``, left for the caller to remove."""
        interpreter, imports, module, arguments = {
            "prunetune": self._prunetune,
            "peft": self._peft,
            "mergekit": self._with_mergekit,
        }[tool](job, folder, **changes)
        answer = folder / "answer.json"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"}
        done = subprocess.run(
            [interpreter, str(HERE / "_peak.py"), str(answer), imports, module, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tool} failed on {job}: {(done.stderr or done.stdout)[-3000:]}")
        measured: Measured = json.loads(answer.read_text())
        return measured

    def _prunetune(self, job: str, folder: Path, how: str = "dare_ties", drop: float = DROP) -> Any:
        models = ["adapter"] if job == "adapter" else ["t0", "t1", "t2"]
        how_words = ["--how", how, "--weights", ",".join(map(str, WEIGHTS))] if job != "adapter" else []
        how_words += ["--drop", str(drop)] if job != "adapter" and how != "linear" else []
        sources = [str(folder / name) for name in models]
        words = [
            "merge",
            *sources,
            "--base",
            str(folder / "base"),
            *how_words,
            "--shard-size",
            f"{SHARD_BYTES // 10**6}MB",
        ]
        return sys.executable, "torch,transformers", "prunetune", [*words, "--out", str(folder / "out")]

    def _peft(self, job: str, folder: Path) -> Any:
        paths = [str(folder / name) for name in ("base", "adapter", "out")]
        return sys.executable, "torch,transformers,peft", "_peft_merge", paths

    def _with_mergekit(self, job: str, folder: Path, how: str = "dare_ties", drop: float = DROP) -> Any:
        base = str(folder / "base")
        if job == "adapter":
            recipe: dict[str, Any] = {
                "merge_method": "passthrough",
                "models": [{"model": f"{base}+{folder / 'adapter'}"}],
            }
        else:
            parameters = [{"weight": weight} | ({} if how == "linear" else {"density": 1 - drop}) for weight in WEIGHTS]
            models = [{"model": str(folder / f"t{i}"), "parameters": parameters[i]} for i in range(3)]
            recipe = {"merge_method": how, "models": models}
            recipe |= {} if how == "linear" else {"base_model": base}
        recipe["dtype"] = str(ShardReader(folder / "base").read("model.norm.weight").dtype).removeprefix("torch.")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        shard = str(SHARD_BYTES // 2)  # counted in parameters there
        words = [str(folder / "recipe.yaml"), str(folder / "out"), "--no-copy-tokenizer", "--no-write-model-card"]
        words += ["--out-shard-size", shard, "--lora-merge-cache", str(folder / "cache")]
        return self.mergekit, "torch,transformers,peft", "mergekit.scripts.run_yaml", words


def install_mergekit(folder: Path) -> str | None:
    """An interpreter that has mergekit; None if its package cannot be had, which is said."""
    venv.create(folder, with_pip=True)
    interpreter = str(folder / "bin" / "python")
    own = subprocess.run(
        [interpreter, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # What is here already (torch above all) is taken from here; only what is missing is installed.
    (Path(own) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done = subprocess.run([interpreter, "-m", "pip", "install", "-q", "mergekit"], capture_output=True, text=True)
    if done.returncode == 0:
        return interpreter
    print(f"mergekit could not be installed, so it is left out: {done.stderr.strip()[-500:]}", file=sys.stderr)
    return None


# ---- the inputs


def config_of(layers: int, **changes: Any) -> LlamaConfig:
    values = dict(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=layers,
        vocab_size=8192,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **WIDTHS,
    )
    return LlamaConfig(**values | changes)


def layers_for(size_bytes: float) -> int:
    """As many as make a bfloat16 model of about that size."""
    one, two = (sum(math.prod(shape) for shape in shapes(count).values()) for count in (1, 2))
    return max(1, round((size_bytes / 2 - one) / (two - one)) + 1)


def shapes(layers: int, **changes: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(layers, **changes))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Numbers:
    """Random tensors of any size, cheaply: one drawn block, read from another place for every tensor."""

    def __init__(self, seed: int):
        self._block = torch.randn(2**21, generator=torch.Generator().manual_seed(seed))
        self._draw = torch.Generator().manual_seed(seed + 1)

    def tensor(self, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        count, start = math.prod(shape), int(torch.randint(2**21, (), generator=self._draw))
        repeats = -(-(start + count) // len(self._block))
        return (self._block.to(dtype).repeat(repeats)[start : start + count] * scale).reshape(shape)


def write_models(folder: Path, layers: int, dtype: torch.dtype, tuned: int, **changes: Any) -> None:
    """``base`` and ``t0`` ...: the base's weights with small changes."""
    for number in range(tuned + 1):
        target = folder / ("base" if number == 0 else f"t{number - 1}")
        target.mkdir(parents=True)
        base, change = Numbers(0), Numbers(number)

        def tensors(
            number: int = number, base: Numbers = base, change: Numbers = change
        ) -> Iterator[tuple[str, Tensor]]:
            for name, shape in shapes(layers, **changes).items():
                tensor = torch.ones(shape, dtype=dtype) if len(shape) == 1 else base.tensor(shape, 0.02, dtype)
                if number and len(shape) > 1:
                    tensor = tensor + change.tensor(shape, 1e-3, dtype)
                yield name, tensor

        ShardWriter(target, SHARD_BYTES).write(tensors())
        config_of(layers, **changes).save_pretrained(target)


def write_adapter(folder: Path, layers: int, rank: int = 16) -> None:
    """A LoRA adapter on every linear, as PEFT lays it out."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    numbers, tensors = Numbers(9), {}
    for name, shape in shapes(layers).items():
        if ".layers." in name and len(shape) == 2:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = numbers.tensor((rank, shape[1]), 0.02, torch.float32)
            tensors[f"{path}.lora_B.weight"] = numbers.tensor((shape[0], rank), 0.02, torch.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(folder.parent / "base")
    config.save_pretrained(folder)


# ---- the measurements


def measure(size: float, folder: Path, tools: Tools, turns: int) -> dict[str, Any]:
    """Both jobs at one size, the tools taking turns."""
    layers = layers_for(size * 1e9)
    write_models(folder, layers, torch.bfloat16, 3)
    write_adapter(folder / "adapter", layers)
    found: dict[str, Any] = {"gigabytes": size, "base_bytes": ShardReader(folder / "base").size_bytes()}
    for job, others in (("adapter", ("peft", "mergekit")), ("dare_ties", ("mergekit",))):
        names = ["prunetune", *(name for name in others if name != "mergekit" or tools.mergekit)]
        runs: dict[str, list[Measured]] = {name: [] for name in names}
        for _ in range(turns):
            for name in names:
                runs[name].append(tools.run(name, job, folder))
                for left in ("out", "cache"):
                    shutil.rmtree(folder / left, ignore_errors=True)
                print(f"{size} GB {job} {name}: {json.dumps(runs[name][-1])}", file=sys.stderr)
        found[job] = {name: summary(part) for name, part in runs.items()}
        found[job] |= {f"over_{name}": ratios(runs["prunetune"], runs[name]) for name in names[1:]}
    return found


def summary(runs: list[Measured]) -> Measured:
    peak, idle = max(run["peak_bytes"] for run in runs), min(run["idle_bytes"] for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    return {"peak_bytes": peak, "above_imports_bytes": peak - idle, "seconds": round(seconds, 2)}


def ratios(ours: list[Measured], theirs: list[Measured]) -> Measured:
    """Ours over theirs: below 1 is less."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "seconds": round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3),
        "peak": round(statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs), 3),
    }


def flatness(sizes: list[dict[str, Any]], job: str) -> dict[str, Any]:
    """How the peak grows with the base, and whether it is two shards and a block at most."""
    peaks = [size[job]["prunetune"]["peak_bytes"] for size in sizes]
    above = max(size[job]["prunetune"]["above_imports_bytes"] for size in sizes)
    return {
        "largest_over_smallest": round(max(peaks) / min(peaks), 3),
        "above_imports_bytes": above,
        "two_shards_and_a_block_bytes": 2 * SHARD_BYTES + BLOCK_BYTES,
    }


def equality(work: Path, tools: Tools) -> dict[str, Any]:
    """Largest difference to mergekit on a float32 model, where both mean the same; aim: 1e-5."""
    if not tools.mergekit:
        return {"left out": "mergekit is not there"}
    folder, found = work / "equality", {}
    # Small tensors: in large ones several changes equal the trimming bound to the bit. Which of them stay is chance in
    # mergekit, and here the first ones; every other entry is the same.
    write_models(folder, 2, torch.float32, 3, hidden_size=64, intermediate_size=176, vocab_size=256)
    for how, drop in (("ties", 0.5), ("ties", 0.8), ("linear", 0.0)):
        merged = {}
        for tool in ("prunetune", "mergekit"):
            tools.run(tool, "several", folder, how=how, drop=drop)
            reader = ShardReader(folder / "out")
            merged[tool] = {name: reader.read(name).float() for name in reader.names()}
            shutil.rmtree(folder / "out")
        ours, theirs = merged["prunetune"], merged["mergekit"]
        assert ours.keys() == theirs.keys()
        found[f"{how} {drop:.0%}"] = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    main()
