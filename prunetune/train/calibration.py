"""Calibration: training rows drawn by lot, run through the decoder while second moments listen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from prunetune.core.streams import stream
from prunetune.model.sharded import is_sharded
from prunetune.model.statistics import SecondMoments
from prunetune.model.surgery import base_model


def shuffled_rows(trainer: Any, seed: int, purpose: str) -> Iterator[Any]:
    """All training rows, as the trainer has prepared them, in an order drawn by lot.

    Args:
        trainer: holds the prepared rows. seed: of the run. purpose: names the lot.
    """
    for index in stream(seed, purpose).permutation(len(trainer.train_dataset)):
        yield trainer.train_dataset[int(index)]


def calibration_batches(trainer: Any, tokens: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """This process's share of the batches; all together are the same rows for any number of processes.

    Args:
        trainer: holds the prepared rows, the collator and the process's rank.
        tokens: stop once the rows of all processes make up so many.
        seed: of the run.
    """
    drawn, done, accelerator = [], 0, trainer.accelerator
    # Row by row, so that where the tokens suffice does not depend on the batch size.
    for row in shuffled_rows(trainer, seed, "calibration"):
        if done >= tokens:
            break
        drawn.append(row)
        done += len(row["input_ids"])
    size = trainer.args.per_device_train_batch_size
    for start in range(0, len(drawn), size):
        if (start // size) % accelerator.num_processes == accelerator.process_index:
            yield trainer._prepare_inputs(trainer.data_collator(drawn[start : start + size]))


def collect_moments(trainer: Any, moments: SecondMoments, batches: Iterable[dict[str, Tensor]]) -> None:
    """Runs the batches through the decoder (not the LM head) and adds the processes' sums together."""
    decoder, accelerator = base_model(trainer.model).base_model, trainer.accelerator

    def forward(batch: dict[str, Tensor]) -> Any:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "seq_lengths")}
        with accelerator.autocast():
            return decoder(**inputs, use_cache=False)

    own, more = list(batches), 0
    if is_sharded(decoder):
        # Every forward pass needs a part of the weights from every process, so all make as many.
        count = torch.tensor([len(own)], device=accelerator.device)
        more = int(accelerator.gather(count).max()) - len(own)
    moments.run(forward, own)
    for _ in range(more):
        forward({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=accelerator.device)})
    for path in moments.modules:
        # A process that had no batch of its own still takes part, with nothing.
        features = base_model(trainer.model).get_submodule(path).in_features
        nothing = torch.zeros(features, features, device=accelerator.device)
        moments.sums[path] = accelerator.reduce(moments.sums.get(path, nothing), "sum")
