"""The two calls of Trainer.train, before and after the freeze, reported as the one run they are."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.trainer_utils import TrainOutput


def joined(legs: Sequence[TrainOutput]) -> TrainOutput:
    """One result: times added, losses and rates averaged over the steps of both legs."""
    metrics = dict(legs[-1].metrics)
    if len(legs) == 2:
        before, after = legs
        steps = after.global_step
        share = before.global_step / steps
        seconds = before.metrics["train_runtime"] + after.metrics["train_runtime"]
        samples = sum(leg.metrics["train_samples_per_second"] * leg.metrics["train_runtime"] for leg in legs)
        metrics |= {
            "train_runtime": seconds,
            "train_loss": share * before.training_loss + (1 - share) * after.training_loss,
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": samples / seconds,
        }
    return TrainOutput(legs[-1].global_step, metrics["train_loss"], metrics)
