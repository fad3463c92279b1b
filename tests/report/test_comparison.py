"""What a comparison's table, page and figure say, and do not hide."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from prunetune.report.comparison import comparison_table, write_comparison
from prunetune.report.comparison_figure import draw
from prunetune.report.palette import BLUE
from prunetune.report.recipe_results import summaries
from tests.report.test_recipe_results import result

DENSE, RANDOM, WANDA = "dense LoRA", "one-shot random, uniform, none", "one-shot wanda, uniform, none"


def written(folder: Path, results: list[dict[str, Any]]) -> tuple[str, str]:
    """(table.md, report.html)."""
    write_comparison(folder, results)
    return (folder / "table.md").read_text(), (folder / "report.html").read_text()


def drawn(results: list[dict[str, Any]]) -> Any:
    """The finished figure; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(summaries(results))
        FigureCanvasAgg(figure).draw()
    return figure


def tick_labels(figure: Any) -> list[str]:
    axis = figure.axes[-1]
    low, high = axis.get_xlim()
    return [label.get_text() for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def test_diverged_recipes_stand_last_and_are_called_so(tmp_path: Path) -> None:
    results = [result(RANDOM, 0.6, 0, math.nan), result(WANDA, 0.6, 0, 10.0), result(DENSE, None, 0, math.inf)]
    table, page = written(tmp_path, results)
    rows = [line for line in table.splitlines() if line.startswith(("| one", "| dense"))]
    assert "wanda" in rows[0]
    assert "10.00" in rows[0]
    assert all("| diverged |" in row for row in rows[1:])
    assert "no better than random" not in table
    assert "nan" not in table + page.split("base64")[0]
    assert "diverged" in str([list(column.cells) for column in comparison_table(results).columns])


def test_recipes_without_a_result_and_with_few_seeds_are_named(tmp_path: Path) -> None:
    missing = [{"label": WANDA, "kept": 0.6, "seed": 1}, {"label": "joint apt, refit", "kept": 0.6, "seed": 0}]
    table, page = written(tmp_path, [result(WANDA, 0.6, 0, 10.0), *missing])
    assert f"| {WANDA} (1 of 2 seeds) | 10.00 |" in table
    assert "| joint apt, refit (no result: failed, or still to be done) | – |" in table
    assert "3 runs on the same data" in page
    assert "2 without a result" in page
    cells = [list(column.cells) for column in comparison_table([result(WANDA, 0.6, 0, 10.0), *missing]).columns]
    assert cells[1] == ["10.00 (1 of 2 seeds)", "–"]


def test_the_sentence_of_a_base_alone_is_one(tmp_path: Path) -> None:
    _, page = written(tmp_path, [{**result("base", None, 0, 5.0), "steps": 0}])
    assert "1 run on the same data, budgets and seeds." in page


def test_near_budgets_have_titles_of_their_own(tmp_path: Path) -> None:
    table, _ = written(tmp_path, [result(RANDOM, 0.625, 0, 20.0), result(WANDA, 0.624, 0, 20.0)])
    assert [line for line in table.splitlines() if line.startswith("##")] == ["## 62.5% kept", "## 62.4% kept"]


def test_a_random_control_of_another_size_is_said(tmp_path: Path) -> None:
    results = [result(RANDOM, 0.6, 0, 9.0, kept_decoder=0.786), result(WANDA, 0.6, 0, 10.0, kept_decoder=0.667)]
    table, page = written(tmp_path, results)
    assert f"{WANDA} (no better than random, which kept 78.6% of the decoder)" in table
    assert "which kept 78.6% of the decoder" in page
    assert "(!) 10.00" in str([list(column.cells) for column in comparison_table(results).columns])


@pytest.mark.parametrize("values", [(5.0, 10.0, 3e8), (10.0, 10.1, 10.3), (5.0, 9.0, 70.0), (5.0, 20.0, 1e90)])
def test_any_range_has_a_handful_of_labelled_ticks_and_short_numbers(values: tuple[float, ...]) -> None:
    dense, wanda, random = values
    figure = drawn([result(DENSE, None, 0, dense), result(WANDA, 0.6, 0, wanda), result(RANDOM, 0.6, 0, random)])
    assert 3 <= len([label for label in tick_labels(figure) if label]) <= 10
    assert all(len(text.get_text()) <= 7 for text in figure.axes[0].texts)


@pytest.mark.parametrize("ppl", [10.0, math.nan])
def test_one_recipe_without_references_is_drawn_without_a_legend(ppl: float) -> None:
    assert legend(drawn([result(WANDA, 0.6, 0, ppl)])) == []


def test_every_reference_has_a_line_of_its_own() -> None:
    figure = drawn([*(result(f"dense LoRA {i}", None, 0, 5.0 + i) for i in range(6)), result(WANDA, 0.6, 0, 30.0)])
    assert legend(figure) == [f"dense LoRA {i}" for i in range(6)]
    lines = [line for line in figure.axes[0].lines if line.get_xdata()[0] == line.get_xdata()[-1] < 20]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6


def test_marks_and_bars_are_drawn_and_explained() -> None:
    results = [result(RANDOM, 0.6, 0, 20.0), result(WANDA, 0.6, 0, 21.0), result(WANDA, 0.6, 1, 84.0)]
    label = "joint saliency, refit, data.samples.method=random"
    figure = drawn([*results, result(label, 0.6, 0, 10.0)])
    assert legend(figure) == ["no better than random", "± standard deviation over the seeds"]
    bar, point = figure.axes[0].lines[:2]
    factor = math.exp(math.log(4) / math.sqrt(2))
    assert list(bar.get_xdata()) == pytest.approx([42 / factor, 42 * factor])
    assert point.get_markerfacecolor() == "white"
    # A setting that is called random makes no control of a recipe.
    assert to_hex(figure.axes[0].lines[-1].get_color()).upper() == BLUE
