"""Sequential calibration: its numbers against numpy, resumption to the bit, and no pass that is not needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from prunetune.core.errors import DataError
from prunetune.model import sequential
from prunetune.model.architecture import describe
from prunetune.model.layer_statistics import CONSUMERS, RunningMoments
from prunetune.model.layer_stream import LayerStream, Weights
from prunetune.model.sequential import Calibration, batches_of
from prunetune.model.shards import ShardReader
from tests.contracts.scores import random_rows, world
from tests.methods.scores.direct import LAYER, recorded
from tests.support import tiny_model

ROWS = [row.input_ids for row in random_rows(8)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_model(seed=3).save_pretrained(tmp_path / "model")
    return tmp_path


def calibration(place: Path, name: str = "cache") -> Calibration:
    arch = describe(AutoConfig.from_pretrained(place / "model"))
    return Calibration(place / name, arch, {"rows": "these"})


def run(place: Path, name: str = "cache", *, products: Collection[str] = (), most: int = 64) -> Calibration:
    found = calibration(place, name)
    found.run(lambda: stream_of(place), batches_of(ROWS, most), products=products)
    return found


def stream_of(place: Path) -> LayerStream:
    config = AutoConfig.from_pretrained(place / "model")
    return LayerStream(config, Weights(ShardReader(place / "model")), torch.device("cpu"), torch.float32)


def refuse() -> Any:
    pytest.fail("the model was asked for")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 1, 30), (36,), (7, 7, 7, 7, 8)])
def test_running_variance_is_that_of_all_tokens_together(sizes: tuple[int, ...]) -> None:
    """What FLAP's code loses: the mean is not updated before it is used, and the first batch has a variance too."""
    draw = np.random.default_rng(0)
    # A mean much larger than the spread is where careless formulas cancel.
    x_TF = (draw.normal(size=(sum(sizes), 6)) * [1, 2, 3, 0, 1, 1] + [0, 5, -3, 2, 1000, -1000]).astype(np.float32)
    moments, start = RunningMoments(6, products=True), 0
    for size in sizes:
        moments.add(torch.from_numpy(x_TF[start : start + size]))
        start += size
    found, exact = moments.result(), x_TF.astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["variance"], exact.var(0), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(found["absolute"], np.abs(exact).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["products"], exact.T @ exact, rtol=1e-4, atol=1e-2)


def test_statistics_are_those_of_the_whole_model_s_activations() -> None:
    of = world()
    x, found = recorded(of), of.calibration.statistics(LAYER)
    for role in ("o", "down"):
        values = x[role].double().numpy()
        np.testing.assert_allclose(found.inputs[role].mean, values.mean(0), atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(found.inputs[role].variance, values.var(0), atol=1e-7, rtol=1e-4)
        np.testing.assert_allclose(found.inputs[role].square, (values**2).mean(0), atol=1e-7, rtol=1e-4)
        np.testing.assert_allclose(of.calibration.products(LAYER, role), values.T @ values, atol=1e-4, rtol=1e-4)
    assert found.tokens == sum(len(row.input_ids) for row in of.rows)
    assert of.calibration.statistics(LAYER).inputs["o"].products is None, "read when they are asked for"


def test_batches_are_equally_long_and_lose_nothing() -> None:
    batches = batches_of(ROWS, 24)
    assert all(ids.numel() <= 24 or ids.shape[0] == 1 for ids in batches)
    assert sorted(row for ids in batches for row in ids.tolist()) == sorted(ROWS)
    assert batches_of([[], [1]], 8)[0].tolist() == [[1]]


def test_how_rows_are_batched_changes_rounding_only(place: Path) -> None:
    one, many = run(place, "one", most=1), run(place, "many", most=500)
    for layer in range(3):
        left, right = one.statistics(layer), many.statistics(layer)
        torch.testing.assert_close(left.inputs["down"].variance, right.inputs["down"].variance, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(left.heads, right.heads, rtol=1e-5, atol=1e-6)
        assert abs(left.cosine - right.cosine) < 1e-6


@pytest.mark.parametrize("products", [(), ("o", "down")])
def test_a_stopped_pass_goes_on_to_the_same_bits(
    products: Collection[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(place, "whole", products=products)
    loaded: list[int] = []
    layer = LayerStream.layer

    def stops_at_the_third(self: LayerStream, index: int) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return layer(self, index)

    monkeypatch.setattr(LayerStream, "layer", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped", products=products)
    monkeypatch.setattr(LayerStream, "layer", lambda self, index: (loaded.append(index), layer(self, index))[1])
    resumed = run(place, "stopped", products=products)
    assert loaded == [2], "finished layers are not run again"
    assert contents(resumed.folder) == contents(whole.folder)


def test_nothing_is_run_twice_and_products_can_be_had_later(place: Path) -> None:
    found = run(place)
    assert found.missing() is None
    assert found.missing(products=["down"]) == 0
    before = contents(found.folder)
    found.run(refuse, batches_of(ROWS, 64))
    again = run(place, products=["down"])
    assert again.missing(products=["down"]) is None
    assert again.missing(products=["o", "down"]) == 0, "those of one consumer are not those of the other"
    after = contents(again.folder)
    assert {name: after[name] for name in before} == before
    again.run(refuse, [], products=["down"])
    assert not list(found.folder.glob("hidden*")), "hidden states go when the pass is done"


def test_a_folder_of_another_calibration_is_refused(place: Path) -> None:
    run(place)
    arch = describe(AutoConfig.from_pretrained(place / "model"))
    with pytest.raises(DataError, match="holds another calibration"):
        Calibration(place / "cache", arch, {"rows": "others"})


def test_two_processes_may_make_the_same_calibration_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, saved = run(place, "whole", products=["down"]), []
    save_file = sequential.save_file

    def and_the_other_does_all(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        saved.append(path)
        if len(saved) == 1:
            run(place, products=["down"])

    monkeypatch.setattr(sequential, "save_file", and_the_other_does_all)
    assert contents(run(place, products=["down"]).folder) == contents(whole.folder)


def test_hidden_states_that_another_process_used_up_are_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(place, "whole")
    again = run(place)
    again._file("layer", 2).unlink()
    again._file("hidden", 2).touch()
    load_file = sequential.load_file
    monkeypatch.setattr(sequential, "load_file", lambda path: (path.unlink(), load_file(path))[1])
    assert contents(run(place).folder) == contents(whole.folder)


def test_what_cannot_be_written_is_said_with_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, advice in ((OSError(28, "No space left on device"), "make room"), (PermissionError(), "rights")):
        monkeypatch.setattr(sequential, "save_file", Mock(side_effect=error))
        with pytest.raises(DataError, match=f"calibration stopped at layer .*{advice} and run the same command"):
            run(place)


@pytest.fixture
def damaged(place: Path) -> Calibration:
    found = run(place, products=CONSUMERS)
    for kind in ("layer", "products-o"):
        path = found.folder / f"{kind}-00001.safetensors"
        path.write_bytes(path.read_bytes()[:50])
    return found


def test_damage_is_said(damaged: Calibration) -> None:
    with pytest.raises(DataError, match=r"layer-00001.safetensors is damaged .* delete it and run again"):
        damaged.statistics(1)
    with pytest.raises(DataError, match=r"products-o-00001.safetensors is damaged"):
        damaged.products(1, "o")


def test_a_full_disk_is_said_before_anything_is_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.model.sequential.free_bytes", lambda path: 1000)
    with pytest.raises(DataError, match=r"needs about .* 1.0 KB is free; make room"):
        calibration(place).run(refuse, batches_of(ROWS, 64), products=CONSUMERS)
