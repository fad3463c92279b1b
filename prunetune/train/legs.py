"""The two calls of Trainer.train, before and after the freeze, reported as the one run they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def joined(legs: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """One summary: times added, the loss averaged over the steps, rates anew.

    Args:
        legs: for every call its optimizer steps and its summary; the last one's other entries are kept.
    """
    if not legs:
        return {}
    summary = dict(legs[-1][1])
    if len(legs) > 1:
        steps = sum(count for count, _ in legs)
        seconds = sum(leg["train_runtime"] for _, leg in legs)
        samples = sum(leg["train_samples_per_second"] * leg["train_runtime"] for _, leg in legs)
        summary |= {
            "train_runtime": seconds,
            "train_loss": sum(count * leg["train_loss"] for count, leg in legs) / max(1, steps),
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": samples / seconds,
        }
    return summary
