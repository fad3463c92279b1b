"""What a run of a comparison asks of the methods, and what about it cannot work, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunetune.config.comparison import Cell
from prunetune.config.recipe import JOINT, ONE_SHOT
from prunetune.core.errors import Problem, suggest
from prunetune.model.units import HIDDEN
from prunetune.pipeline.checks import registered_names
from prunetune.pipeline.compare_folder import PRUNED
from prunetune.pipeline.prune_request import PruneRequest, default_units


def one_shot_request(cell: Cell, model: str, calibration: Sequence[Mapping[str, Any]]) -> PruneRequest:
    """How the base of a one_shot cell is pruned.

    Args:
        model: folder of the base. calibration: the training rows.
    """
    config, target = cell.config, cell.config.target
    if "units" not in target.model_fields_set:
        # A score that ranks none of the kinds that the others remove competes with those that it ranks.
        target = target.model_copy(update={"units": default_units(cell.score)})
    compensation = {key: value for key, value in config.compensation.options().items() if key != "tokens"}
    return PruneRequest(
        model=model,
        out=config.folder / PRUNED,
        target=target,
        score=cell.score,
        allocation=cell.allocation,
        compensation=config.compensation.method,
        options={**cell.options, "compensation": compensation},
        calibration=calibration,
        # The same for all compensations, so that they differ in nothing else.
        tokens=PruneRequest.tokens if cell.tokens is None else int(cell.tokens),
        max_length=config.train.max_length,
        dtype=config.model.dtype,
        seed=config.seed,
        # All cells of a seed read the same statistics.
        cache=config.folder.parent / "prune-cache",
        verify=config.export.verify,
    )


def cell_problems(cell: Cell) -> list[Problem]:
    """What cannot work whatever the model and the rows are."""
    if cell.kind == ONE_SHOT:
        found = _unknown(cell) or one_shot_request(cell, "", ()).problems()
    else:
        found = list(_joint_problems(cell)) if cell.kind == JOINT else []
    # What an option of `prunetune prune` says, a setting says here.
    said = [str(problem).replace("--units", "target.units") for problem in found]
    return [Problem(words, f"compare.recipes ({cell.label})") for words in said]


def _unknown(cell: Cell) -> list[Problem]:
    named = (("score", cell.score, "scores"), ("allocation", cell.allocation, "allocation"))
    known = {family: registered_names(f"prunetune.methods.{family}") for _, _, family in named}
    return [
        Problem(f"there is no {section} {name!r}; {suggest(name, known[family])}")
        for section, name, family in named
        if name not in known[family]
    ]


def _joint_problems(cell: Cell) -> Iterator[Problem]:
    from prunetune.methods.compensation import check_compensation
    from prunetune.methods.masks import check_hidden

    config = cell.config
    yield from check_compensation(config.compensation.method, config.compensation.options())
    if HIDDEN in config.target.units:
        yield from check_hidden(config.mask.method)
