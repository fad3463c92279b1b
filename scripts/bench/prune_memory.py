"""Peak memory of `prunetune prune` on a synthetic model that is much larger than what pruning may hold.

    python scripts/bench/prune_memory.py --gigabytes 4 --work /tmp/prune_memory --out prune_memory.json

Random weights are written shard by shard, then the model is pruned in a fresh process without the final check, which
loads the small model whole in a process of its own. ``anonymous`` is memory that the process made, ``resident`` also
counts pages of the shards that the system may drop at any time; ``idle`` is what the imports alone take.
``allowed`` = one layer in float32, the statistics of one layer (two matrices of inputs x inputs), the hidden states of
all calibration tokens, and twice the weights file that is being filled, whose bytes exist once more while they are
written; the refit's float64 copies are beyond it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads distort shared machines

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prunetune.config.schema import TargetConfig
from prunetune.core.files import write_json
from prunetune.core.streams import stream
from prunetune.evaluate.memory import peak_resident_bytes
from prunetune.model.architecture import describe
from prunetune.model.budget import full_shape, layer_decoder_params
from prunetune.model.shards import ShardReader, ShardWriter
from prunetune.pipeline.prune_request import PruneRequest
from prunetune.pipeline.prune_run import prune_once

HIDDEN, CHANNELS, HEADS, GROUPS, VOCABULARY = 2048, 5632, 32, 8, 32000
SHARD_BYTES = 10**9


def main() -> None:
    options = parse()
    base = options.work / "base"
    if options.only:
        print(json.dumps(measure(options, base)))
        return
    if not base.exists():
        write_model(base, options.gigabytes)
    reader, arch = ShardReader(base), describe(json.loads((base / "config.json").read_text()))
    layer = 4 * layer_decoder_params(arch, full_shape(arch))
    statistics = 4 * (arch.mlp_channels**2 + (arch.query_heads * arch.head_dim) ** 2)
    hidden = 4 * options.tokens * arch.hidden_size
    result: dict[str, Any] = {
        "base_bytes": reader.size_bytes(),
        "layers": arch.layers,
        "layer_bytes": layer,
        "statistics_bytes": statistics,
        "hidden_bytes": hidden,
        "shard_bytes": options.shard_bytes,
        "allowed_bytes": layer + statistics + hidden + 2 * options.shard_bytes,
        "tokens": options.tokens,
        "runs": [],
    }
    for score, compensation in pairs(options):
        result["runs"].append(run(options, score, compensation))
        write_json(options.out, result)
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the synthetic base, float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--kept", default="70%")
    parser.add_argument("--shard-bytes", type=int, default=250 * 10**6)
    parser.add_argument("--runs", nargs="+", default=["wanda:none", "wanda:refit"], help="score:compensation")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; 3 times its size is needed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="score:compensation, in this process; what the script starts itself with")
    return parser.parse_args()


def pairs(options: argparse.Namespace) -> list[list[str]]:
    return [pair.split(":") for pair in options.runs]


def write_model(folder: Path, gigabytes: float) -> None:
    """A llama of random weights with so many layers that it is as large as asked for."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HIDDEN // HEADS,
        vocab_size=VOCABULARY,
        num_hidden_layers=1,
        max_position_embeddings=2048,
        pad_token_id=0,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    arch = describe(config)
    layer = 4 * layer_decoder_params(arch, full_shape(arch))
    config.num_hidden_layers = max(2, round((gigabytes * 10**9 - 4 * VOCABULARY * HIDDEN) / layer))
    folder.mkdir(parents=True)
    ShardWriter(folder, SHARD_BYTES).write(random_tensors(config))
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(folder)


def random_tensors(config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    generator, kv = torch.Generator().manual_seed(0), GROUPS * HIDDEN // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (CHANNELS, HIDDEN),
        "mlp.up_proj": (CHANNELS, HIDDEN),
        "mlp.down_proj": (HIDDEN, CHANNELS),
    }
    yield "model.embed_tokens.weight", torch.randn(VOCABULARY, HIDDEN, generator=generator)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", torch.ones(HIDDEN)
    yield "model.norm.weight", torch.ones(HIDDEN)


def run(options: argparse.Namespace, score: str, compensation: str) -> dict[str, Any]:
    """One pruning in a fresh process."""
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name not in ("only", "runs")
    ]
    done = subprocess.run(
        [sys.executable, __file__, *words, f"--only={score}:{compensation}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace, base: Path) -> dict[str, Any]:
    score, compensation = options.only.split(":")
    target = TargetConfig(kept=options.kept)
    out, cache = options.work / "pruned", options.work / f"cache-{compensation}"
    draw = stream(0, "bench rows")
    rows = [{"input_ids": (ids := draw.integers(3, VOCABULARY, 256).tolist()), "labels": ids} for _ in range(40)]
    request = PruneRequest(
        str(base), out, target, score, compensation=compensation, calibration=rows, tokens=options.tokens,
        judge_tokens=256, dtype="float32", shard_size=options.shard_bytes, cache=cache, verify=False,
    )  # fmt: skip
    watch = Watch()
    start = time.perf_counter()
    with watch:
        prune_once(request)
    seconds = time.perf_counter() - start
    out_bytes = ShardReader(out).size_bytes()
    shutil.rmtree(out)
    shutil.rmtree(cache)
    return {
        "score": score,
        "compensation": compensation,
        "seconds": round(seconds, 1),
        "pruned_bytes": out_bytes,
        "idle_bytes": watch.idle,
        "anonymous_peak_bytes": watch.peak,
        "anonymous_beyond_idle_bytes": watch.peak - watch.idle,
        "resident_peak_bytes": peak_resident_bytes(),
    }


class Watch(threading.Thread):
    """Samples this process's anonymous memory while the block runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.idle = self.peak = anonymous_bytes()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this bench needs Linux")


if __name__ == "__main__":
    main()
