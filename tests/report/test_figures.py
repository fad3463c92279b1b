"""Figures: what they draw from whole, short and damaged runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import save_file

from prunetune.model.plan import Plan
from prunetune.report.figures import write_figures
from prunetune.report.gather import gather, phase_spans, read_metrics, read_scores, series
from prunetune.report.training_figure import training_figure
from prunetune.report.units_figure import kept_units_figure, scores_figure


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_all_figures_of_a_whole_run(run_folder):
    written = write_figures(gather(run_folder), run_folder / "figures")
    assert [file.name for file in written] == ["training.png", "kept_units.png", "scores.png"]
    for file in written:
        image = imread(file)
        assert 600 <= image.shape[1] <= 1600
        assert image[..., :3].std() > 0.05


def test_titles_say_what_to_see(run_folder):
    record = gather(run_folder)
    loss, kept, seconds = titles(training_figure(record.metrics))
    assert loss.startswith("Training loss went from 3.85 to 2.05")
    assert kept == "Decoder parameters kept: 100% at first, 60.0% in the end"
    assert seconds == "Time of a step: 2.00 s in search, 1.25 s in recover (medians)"
    assert titles(kept_units_figure(record.plan)) == [
        "MLP channels: 48 of 80 stay in a layer",
        "KV groups: 3 of 4 stay in a layer",
    ]
    assert titles(scores_figure(record.scores, record.plan)) == [
        "MLP channels: 192 of 320 stay",
        "KV groups: 12 of 16 stay",
    ]


def test_phases_cover_the_run_without_gaps(run_folder):
    spans = phase_spans(gather(run_folder).metrics)
    assert spans == [("warmup", 0.0, 2.0), ("search", 2.0, 10.0), ("recover", 10.0, 20.0)]


def test_smoothing_does_not_reach_over_the_freeze():
    entries = [
        {"step": s, "phase": "search" if s <= 20 else "recover", "loss": 1.0 if s <= 20 else 3.0} for s in range(1, 41)
    ]
    smooth = training_figure(tuple(entries)).axes[0].lines[1].get_ydata()
    assert set(np.asarray(smooth).tolist()) == {1.0, 3.0}


def test_kept_share_of_the_score_is_drawn(plan, scores):
    axis = kept_units_figure(plan, scores).axes[0]
    [dots] = [line for line in axis.lines if line.get_marker() == "o"]
    assert np.allclose(dots.get_xdata(), 0.75 * 80)


def test_removed_layers_are_grey_all_over(plan):
    shorter = replace(plan, kept={**plan.kept, "layers": (0, 1, 3)})
    figure = kept_units_figure(shorter)
    rows = [patch for patch in figure.axes[0].patches if round(patch.get_y() + 0.4) == 2]
    assert sorted(patch.get_width() for patch in rows) == [0, 80]
    depth_only = kept_units_figure(Plan({"layers": (0, 1, 3)}, plan.architecture))
    assert titles(depth_only) == ["3 of 4 layers stay"]


@pytest.mark.parametrize(
    "metrics",
    [
        ({"step": 1, "loss": 3.0},),
        ({"step": 1, "phase": "warmup", "loss": 3.0}, {"step": 2, "phase": "search", "loss": float("nan")}),
        tuple({"step": s, "kept_fraction": 1.0} for s in (1, 2)),
        ({"step": 1, "loss": 2.0, "phase": "train"}, {"step": 2, "loss": 2.0, "phase": "train"}),
    ],
)
def test_short_runs_and_missing_keys_still_draw(metrics, tmp_path):
    assert training_figure(metrics) is not None


def test_nothing_to_draw_is_no_figure(plan, tmp_path):
    assert training_figure(({"step": 1, "learning_rate": 1e-3},)) is None
    assert scores_figure({}, plan) is None
    assert kept_units_figure(Plan({}, plan.architecture)) is None
    (tmp_path / "run").mkdir()
    assert write_figures(gather(tmp_path / "run"), tmp_path / "figures") == []


def test_gates_get_a_linear_axis_and_scores_over_decades_a_logarithmic_one():
    gates = scores_figure({"layers.0.mlp_channels": np.array([0, 0.2, 0.9, 1.0], np.float32)}, None)
    wide = scores_figure({"layers.0.mlp_channels": np.array([0, 1e-6, 1e-3, 1e-1], np.float32)}, None)
    assert gates.axes[0].get_xscale() == "linear"
    assert gates.axes[0].get_xlabel() == "gate (1 = open)"
    assert wide.axes[0].get_xscale() == "log"
    # The zero is counted too.
    assert sum(patch.get_height() for patch in wide.axes[0].patches) == 4


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0], [-1.0, 3.0]])
def test_odd_scores_still_draw(values):
    assert scores_figure({"layers": np.array(values, np.float32)}, None) is not None


def test_a_cut_last_line_and_foreign_tensors_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": 2}\n{"loss": 3}\n{"ste')
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "loss") == ([1.0, 2.0], [2.0, 1.0])
    save_file({"layers": np.ones(3), "multipliers": np.ones(2)}, tmp_path / "scores.safetensors")
    assert list(read_scores(tmp_path / "scores.safetensors")) == ["layers"]
