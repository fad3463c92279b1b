"""Instruction-following difficulty: how little the prompt helps with the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES, SampleChoice, SampleMethod, keep_highest
from prunetune.model.score_table import ScoreTable

# exp of it is still a finite double.
_LARGEST_DIFFERENCE = 700.0


class IfdOptions(MethodOptions):
    """Options of ifd."""

    variant: Literal["loss_ratio", "perplexity_ratio"] = Field(
        "perplexity_ratio", description="ratio of mean losses (arXiv 2308.12032) or of perplexities (2402.00530)"
    )
    discard_unaided: bool = Field(True, description="drop rows whose prompt does not help: a ratio of 1 or more")


@SAMPLES.register("ifd")
class IfdSamples(SampleMethod):
    """Rows whose prompt helps least with the answer, but does help (IFD).

    Of arXiv 2308.12032, 2402.00530. The mean loss of the answer after its prompt is compared with that of the answer
    alone: as a ratio of the two losses (the first paper) or of the two perplexities (the second); the highest below 1
    are kept. A ratio of 1 or more says that prompt and answer do not belong together. Answers that were cut are
    dropped: the two losses would be about different text.
    """

    Options = IfdOptions
    paper = "arXiv 2308.12032, 2402.00530"
    needs = frozenset({"nll", "direct_nll", "truncated"})
    online = False
    options: IfdOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        given, alone = table.mean(table.tokens["nll"]), table.rows["direct_nll"].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.options.variant == "loss_ratio":
                ratio = given / alone
            else:
                ratio = np.exp(np.minimum(given - alone, _LARGEST_DIFFERENCE))
        return np.where(np.isfinite(given) & np.isfinite(alone), ratio, np.nan)

    def choose(self, table: ScoreTable, count: int) -> SampleChoice:
        table.require(self.needs, type(self).__name__)
        scores, truncated = self.scores(table), table.rows["truncated"].astype(bool)
        unaided = (scores >= 1) & self.options.discard_unaided
        choice = keep_highest(table, scores, count, ~truncated & ~unaided)
        reason = choice.reason.copy()
        reason[(reason == "filtered") & truncated] = "truncated"
        reason[(reason == "filtered") & unaided] = "unaided"
        return replace(choice, reason=reason)
