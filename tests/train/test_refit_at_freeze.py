"""The refit at the freeze aims at what the linears gave before anything was removed."""

from __future__ import annotations

from pathlib import Path

import torch

from prunetune.methods.compensation import build_compensation
from prunetune.model.statistics import SecondMoments
from prunetune.model.surgery import base_model
from prunetune.train.calibration import calibration_batches
from tests.support import random_plan, tiny_arch
from tests.train.joint_runs import UNITS, joint_trainer, prune_config

REFIT = {"method": "refit", "tokens": 256}


def test_refit_is_that_of_the_open_models_inputs(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path, prune=prune_config(compensation=REFIT))
    model, compensation = base_model(trainer.model), build_compensation("refit", {"tokens": 256})
    plan = random_plan(tiny_arch(), UNITS, seed=3)
    last = tiny_arch().layers - 1
    # The first linear of the first layer would see the same inputs either way; the last one of the last does not.
    path = f"model.layers.{last}.mlp.down_proj"
    weight = model.get_submodule(path).base_layer.weight.detach().clone()
    moments = SecondMoments(model, [path])
    model.eval()
    batches = calibration_batches(trainer, compensation.tokens, trainer.prune.seed)
    moments.run(lambda batch: model(batch["input_ids"], batch["attention_mask"]), list(batches))
    kept = torch.tensor(plan.kept[f"layers.{last}.mlp_channels"])
    _, updates = trainer.cut(plan)
    # Fresh adapters add nothing, so the update is the refitted weight.
    torch.testing.assert_close(updates[path], compensation.weight(weight, kept, moments.sums[path]))
