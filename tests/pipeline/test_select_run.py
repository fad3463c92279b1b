"""From scores on disk to a selection's folder with its report."""

from __future__ import annotations

import pytest

from prunetune.core.errors import DataError
from prunetune.data.store import write_scores
from prunetune.pipeline.select_run import report_run, select_run
from tests.data.selections import stored, tokenizer_folder


def test_the_folder_has_a_report_with_examples(tmp_path):
    write_scores(tmp_path / "scores", stored(tokenizer=tokenizer_folder(tmp_path / "tokenizer")))
    select_run(
        tmp_path / "scores", tmp_path / "kept", samples_method="random", samples_kept=0.5,
        tokens_method="random", tokens_kept=0.6,
    )  # fmt: skip
    page = (tmp_path / "kept" / "report.html").read_text()
    assert "12 random rows that stay" in page
    assert "12 random rows that were dropped" in page
    assert "<del>" in page
    (tmp_path / "kept" / "report.html").unlink()
    assert report_run(tmp_path / "kept").read_text() == page


def test_without_a_tokenizer_the_report_has_no_examples(tmp_path):
    write_scores(tmp_path / "scores", stored(tokenizer=tmp_path / "gone"))
    select_run(tmp_path / "scores", tmp_path / "kept", samples_method="random", samples_kept=0.5)
    assert "There is none." in (tmp_path / "kept" / "report.html").read_text()


def test_a_folder_that_exists_is_refused_before_any_work(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError, match="--overwrite"):
        select_run(tmp_path / "nowhere", tmp_path / "kept")
