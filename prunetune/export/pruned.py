"""Writing a pruned model straight from the base's shards: one tensor and the shard being filled are in memory.

The check is the export's own, with the masked dense model as the reference: gates closed as zeros in the consumers'
columns, run layer by layer, so that it too never holds the dense model.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from prunetune.core.console import note
from prunetune.core.errors import ExportError
from prunetune.core.files import new_folder, write_json
from prunetune.core.records import ExportedModel
from prunetune.core.sizes import format_bytes
from prunetune.export.live import largest_difference
from prunetune.export.verify import NOISE_FACTOR, TOLERANCE, fresh_process, prompts_for
from prunetune.export.write import (
    METADATA_FILE,
    PLAN_FILE,
    export_facts,
    probe,
    refuse_existing,
    require_space,
    weights_dtype,
    writing,
)
from prunetune.model.layer_stream import EMBEDDING, HEAD, LayerStream, Weights
from prunetune.model.shards import ShardReader, ShardWriter
from prunetune.model.surgery import Surgery

SCORES_FILE = "scores.safetensors"

# (module path in the dense model, (out, in) float32 weight, inputs that stay) -> (out, kept) weight, (out,) change of
# the bias or None.
Compensate = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class PrunedExport:
    """A plan and a base folder, ready to be written as a smaller folder.

    Args:
        base: folder of the dense model. surgery: the plan made ready for it. compensate: see Compensate.
        bias_fields: config fields that are switched on because the compensation gives consumers a bias.
        dtype: of the weights: float32, bfloat16 or float16. shard_size: bytes of a weights file at most.
        device: where the check computes.
    """

    base: Path
    surgery: Surgery
    compensate: Compensate
    bias_fields: Mapping[str, bool] = field(default_factory=dict)
    dtype: str = "bfloat16"
    shard_size: int = 10**9
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def write(
        self,
        folder: Path,
        tokenizer: Any,
        scores: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        replace: bool = False,
        verify: bool = True,
    ) -> ExportedModel:
        """Writes weights, config, tokenizer, plan.json and the scores, and proves that the masked model is the same.

        Args:
            tokenizer: saved beside the weights; gives the prompts of the check.
            scores: site -> (U,), kept for another size.
            metadata: anything JSON, kept in prunetune.json.
            replace: an earlier export at ``folder`` is replaced.
            verify: compare with the masked dense model in a fresh process.

        Raises:
            ExportError: the folder exists, no space, or the check failed; what stood there is untouched.
        """
        kind, reader = weights_dtype(self.dtype), ShardReader(self.base)
        refuse_existing(folder, replace)
        config = self.config(kind)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors(reader, config, shapes_only=True)}
        probe(config, shapes)
        needed = sum(math.prod(shape) for shape in shapes.values()) * kind.itemsize
        require_space(folder, needed)
        verification: dict[str, Any] = {}
        with writing(folder), new_folder(folder, replace=replace) as temporary:
            tensors = ((name, tensor.to(kind)) for name, tensor in self._tensors(reader, config))
            ShardWriter(temporary, self.shard_size).write(tensors)
            config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in (*self.base.glob("generation_config.json"), *self.base.glob("LICEN*")):
                shutil.copyfile(file, temporary / file.name)
            self.surgery.plan.save(temporary / PLAN_FILE)
            save_file({name: score.contiguous() for name, score in scores.items()}, temporary / SCORES_FILE)
            if verify:
                verification = self._verify(temporary, tokenizer, kind)
            facts = export_facts(temporary, config, kind, metadata, verification)
            write_json(temporary / METADATA_FILE, facts)
        note(f"wrote {format_bytes(needed)} of weights to {folder}")
        return ExportedModel(folder, verification)

    def config(self, dtype: torch.dtype) -> Any:
        """The pruned model's config: the base's with the new widths."""
        config = AutoConfig.from_pretrained(self.base, trust_remote_code=False, local_files_only=True)
        for name, value in {**self.surgery.config_values(), **self.bias_fields}.items():
            setattr(config, name, value)
        config._name_or_path, config.dtype, config.use_cache = "", dtype, True
        return config

    def _tensors(self, reader: ShardReader, config: Any, *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the pruned model under its name, or empty ones of the right shapes on the meta device."""
        for name, entry in reader.entries.items():
            new = self.surgery.rename(name)
            if new is None or (name == HEAD and EMBEDDING in reader.entries and config.tie_word_embeddings):
                continue
            path, _, leaf = name.rpartition(".")
            if self._loses_inputs(path):
                if leaf == "weight":
                    yield from self._consumer(reader, path, shapes_only)
                continue  # its bias comes with its weight
            tensor = torch.empty(entry.shape, device="meta") if shapes_only else reader.read(name)
            sliced = self.surgery.slice_parameter(name, tensor)
            assert sliced is not None
            yield new, sliced
        for path in self._new_biases(reader):
            yield str(self.surgery.rename(f"{path}.bias")), torch.zeros(self._rows(reader, path))

    def _loses_inputs(self, path: str) -> bool:
        cut = self.surgery.cuts.get(path)
        return cut is not None and cut.columns is not None

    def _consumer(self, reader: ShardReader, path: str, shapes_only: bool) -> Iterator[tuple[str, Tensor]]:
        """Weight, and bias if it has one now, of a linear that loses inputs."""
        kept, bias = self.surgery.cuts[path].columns, f"{path}.bias"
        assert kept is not None
        rows = self._rows(reader, path)
        has_bias = bias in reader.entries or path in self._biased_paths()
        if shapes_only:
            weight, change = torch.empty(rows, len(kept), device="meta"), None
        else:
            weight, change = self.compensate(path, reader.read(f"{path}.weight").float(), kept)
        yield str(self.surgery.rename(f"{path}.weight")), weight
        if has_bias:
            value = reader.read(bias).float() if bias in reader.entries else torch.zeros(rows)
            yield str(self.surgery.rename(bias)), value if change is None else value + change.cpu()

    def _biased_paths(self) -> set[str]:
        """Linears of layers that stay which have a bias because of ``bias_fields``."""
        family = self.surgery.arch.family
        roles = {family.attention_bias: ("q", "k", "v", "o"), family.mlp_bias: ("gate", "up", "down")}
        modules = [family.modules[role] for name in self.bias_fields for role in roles[name]]
        return {path for path in self.surgery.cuts if any(path.endswith(f".{module}") for module in modules)}

    def _new_biases(self, reader: ShardReader) -> list[str]:
        """Linears whose bias is all zeros: the config's field gives one to them too."""
        paths = (path for path in self._biased_paths() if f"{path}.bias" not in reader.entries)
        return sorted(path for path in paths if not self._loses_inputs(path))

    def _rows(self, reader: ShardReader, path: str) -> int:
        rows = self.surgery.cuts[path].rows
        return reader.entries[f"{path}.weight"].shape[0] if rows is None else len(rows)

    def _verify(self, folder: Path, tokenizer: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Stock transformers in a fresh process against the masked dense model, logits and greedy text."""
        start = time.monotonic()
        config = AutoConfig.from_pretrained(self.base, trust_remote_code=False, local_files_only=True)
        for name, value in self.bias_fields.items():
            setattr(config, name, value)
        weights = _MaskedWeights(ShardReader(self.base), ShardReader(folder), self.surgery, dtype)

        def logits(sequences: list[list[int]], precision: torch.dtype = torch.float32) -> list[Tensor]:
            stream = LayerStream(config, weights, self.device, precision, self.surgery.arch.family.layers)
            return stream.logits(sequences, self.surgery.layers)

        skeleton = LayerStream(config, weights, self.device, torch.float32, self.surgery.arch.family.layers).model
        prompts, texts = prompts_for(skeleton, tokenizer)
        expected = logits(prompts)
        answer = fresh_process(skeleton, folder, prompts, texts, expected, self.device)
        sequences = [prompt + more for prompt, more in zip(prompts, answer["continuations"])]
        again = logits(sequences)
        found = {
            "reload_difference": answer["logit_difference"],
            "cache_difference": answer["cache_difference"],
            "padding_difference": answer["padding_difference"],
            "continuation_gap": _gap(prompts, answer["continuations"], again),
        }
        allowed = TOLERANCE
        # A token may be chosen that is not the best where both are within the tolerance of each other.
        worst = max(found["continuation_gap"] / 2, *(found[name] for name in found if name != "continuation_gap"))
        if not worst <= allowed:
            noise = largest_difference(again, [one.float() for one in logits(sequences, torch.float64)])
            allowed = max(allowed, NOISE_FACTOR * noise)
        if not worst <= allowed:
            raise ExportError(
                f"the export did not verify: it differs from the masked dense model by {worst:.3g}, allowed "
                f"{allowed:.3g} ({', '.join(f'{name} {value:.1e}' for name, value in found.items())}). It was "
                "discarded; please report this with the command"
            )
        seconds = round(time.monotonic() - start, 1)
        note(
            f"verified in a fresh process: logits within {found['reload_difference']:.1e} of the masked dense model, "
            f"{len(answer['continuations'][0])} greedy tokens equal with and without cache and left-padded "
            f"[{seconds:.0f} s]"
        )
        facts = {"tolerance": allowed, "dtype": str(dtype).removeprefix("torch."), "device": self.device.type}
        facts |= {"generated_tokens": len(answer["continuations"][0]), "near_ties": answer["near_ties"]}
        return {**facts, **found, "class": answer["class"], "seconds": seconds}


def _gap(prompts: list[list[int]], continuations: list[list[int]], logits: list[Tensor]) -> float:
    """How far any generated token is below the best one in the reference's logits."""
    gaps = []
    for prompt, more, logits_SV in zip(prompts, continuations, logits):
        steps_NV = logits_SV[len(prompt) - 1 : -1]
        chosen_N = steps_NV.gather(1, torch.tensor(more)[:, None]).flatten()
        gaps.append(float((steps_NV.max(dim=1).values - chosen_N).max()))
    return max(gaps)


class _MaskedWeights(Weights):
    """The dense model with gates closed: what leaves has zeros in the consumer's columns, everything else is there.

    Columns that stay are the exported ones, so that a compensation is part of what is compared; all are rounded as in
    the export.
    """

    def __init__(self, base: ShardReader, pruned: ShardReader, surgery: Surgery, dtype: torch.dtype):
        super().__init__(base)
        self._pruned, self._surgery, self._dtype = pruned, surgery, dtype

    def read(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        cut = self._surgery.cuts.get(path)
        if cut is not None and cut.columns is not None:
            stays = self._pruned.read(str(self._surgery.rename(name)))
            if leaf == "bias":
                return stays
            weight = torch.zeros(self.reader.entries[name].shape, dtype=stays.dtype)
            weight[:, cut.columns] = stays
            return weight
        if leaf == "bias" and name not in self.reader.entries:
            return torch.zeros(self.reader.entries[f"{path}.weight"].shape[0])
        return self._rounded(super().read(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._rounded(super().rows(name, start, stop))

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
