"""Selections: what stays, what plain datasets opens, and what is said about them."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from prunetune.core.errors import ConfigError, DataError
from prunetune.data.selection import select
from prunetune.data.selection_audit import audit_rows, from_runs, to_runs
from prunetune.data.selection_facts import projected_cost, selection_facts
from prunetune.data.selection_folder import write_selection
from prunetune.data.store import StoredScores, write_scores
from prunetune.methods.reasons import REASONS
from prunetune.methods.samples import SAMPLES
from prunetune.model.score_table import ScoreTable
from tests.data.selections import PROMPT, stored


def shuffled(scores: StoredScores, seed=1) -> StoredScores:
    order = np.random.default_rng(seed).permutation(len(scores.table))
    return StoredScores(
        scores.table.pick(order),
        [scores.examples[i] for i in order],
        [scores.input_ids[i] for i in order],
        [scores.labels[i] for i in order],
        scores.header,
    )


def with_rows(scores: StoredScores, **columns) -> StoredScores:
    table = scores.table
    return replace(scores, table=ScoreTable(table.ids, table.offsets, {**table.rows, **columns}, table.tokens))


def test_without_methods_every_row_is_as_it_was():
    scores = stored()
    dataset = select(scores).dataset()
    assert dataset.column_names == ["input_ids", "labels", "id"]
    assert dataset["input_ids"][:] == [list(row) for row in scores.input_ids]
    assert dataset["labels"][:] == scores.labels
    assert dataset["id"][:] == list(scores.table.ids)


def test_dropped_tokens_are_ignored_labels_and_stay_in_the_text():
    scores = stored()
    kept = select(scores, samples_method="random", samples_kept=0.5, tokens_method="loss", tokens_kept=0.5)
    dataset = kept.dataset()
    assert len(dataset) == 12
    rows = {name: i for i, name in enumerate(scores.table.ids)}
    for example in dataset:
        row = rows[example["id"]]
        before = scores.labels[row]
        assert example["input_ids"] == scores.input_ids[row]
        assert all(new in (-100, old) for new, old in zip(example["labels"], before, strict=True))
        stays = sum(label != -100 for label in example["labels"])
        assert stays == int(np.ceil(0.5 * (len(before) - PROMPT)))
        assert example["labels"][-1] == 2  # the end of the turn is protected


def test_a_removing_method_takes_tokens_out_of_the_text():
    scores = stored()
    kept = select(scores, tokens_method="paragraph_surprisal", tokens_kept=0.6)
    assert kept.removes
    for row, example in enumerate(kept.dataset()):
        gone = set(kept.dropped(row).tolist())
        stays = [i for i in range(len(scores.input_ids[row])) if i not in gone]
        assert example["input_ids"] == [scores.input_ids[row][i] for i in stays]
        assert example["labels"] == [scores.labels[row][i] for i in stays]
        assert example["labels"][-1] == 2
    facts = selection_facts(kept)
    assert facts["achieved"]["forward_tokens"] < 1
    assert facts["counts"]["kept_forward_tokens"] == sum(len(row) for row in kept.dataset()["input_ids"])


@pytest.mark.parametrize("tokens", ["neighbour_perplexity", "random"])
@pytest.mark.parametrize("samples", ["q_tuning", "random", "perplexity"])
@pytest.mark.parametrize("scope", ["sample", "all"])
def test_the_order_of_rows_does_not_matter(samples, tokens, scope):
    settings = dict(
        samples_method=samples, samples_kept=0.4, tokens_method=tokens, tokens_kept=0.6, scope=scope, seed=5
    )
    first = select(stored(), **settings).dataset()
    second = select(shuffled(stored()), **settings).dataset().sort("id")
    assert first.to_list() == second.to_list()


def test_q_tuning_prunes_tokens_of_confident_mistakes_only():
    kept = select(
        stored(60), samples_method="q_tuning", samples_kept=0.5, tokens_method="neighbour_perplexity", tokens_kept=0.5
    )
    assert kept.choice.keep.sum() == 30
    whole = kept.choice.keep & ~kept.choice.prunable
    assert whole.any()
    table = kept.scores.table
    assert (table.total(kept.kept)[whole] == table.targets[whole]).all()
    pruned = kept.choice.keep & kept.choice.prunable
    assert (table.total(kept.kept)[pruned] == np.ceil(table.targets[pruned] / 2)).all()


def test_strata_keep_their_shares():
    scores = stored(60)
    kept = select(scores, samples_method="random", samples_kept=0.5, stratify="source")
    names, counts = np.unique(scores.table.rows["source"][kept.rows], return_counts=True)
    assert dict(zip(names, counts)) == {"common": 20, "rare": 10}
    facts = selection_facts(kept)
    assert [(g["name"], g["rows"], g["kept_rows"]) for g in facts["composition"]["source"]] == [
        ("common", 40, 20), ("rare", 20, 10),
    ]  # fmt: skip


def test_selection_from_a_folder_of_scores(tmp_path):
    write_scores(tmp_path / "scores", stored())
    kept = select(tmp_path / "scores", samples_method="random", samples_kept=0.25)
    assert kept.dataset().to_list() == select(stored(), samples_method="random", samples_kept=0.25).dataset().to_list()
    assert selection_facts(kept)["scores"]["folder"] == str(tmp_path / "scores")


def test_a_written_selection_opens_with_plain_datasets(tmp_path):
    kept = select(stored(), samples_method="q_tuning", samples_kept=0.5, tokens_method="loss", tokens_kept=0.7)
    write_selection(kept, tmp_path / "kept")
    assert datasets.load_from_disk(str(tmp_path / "kept" / "dataset")).to_list() == kept.dataset().to_list()
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    facts = json.loads((tmp_path / "kept" / "selection.json").read_text())
    assert facts["settings"]["samples_method"] == "q_tuning"
    assert facts["achieved"]["samples"] == 0.5
    assert set(facts["meanings"]) == set(facts["reasons"])
    assert facts["scores"]["tokenizer_hash"] == "t"


def test_audit_has_a_row_for_every_scored_row(tmp_path):
    scores = stored()
    kept = select(scores, samples_method="q_tuning", samples_kept=0.5, tokens_method="loss", tokens_kept=0.5)
    write_selection(kept, tmp_path / "kept")
    audit = pq.read_table(tmp_path / "kept" / "audit.parquet").to_pydict()
    assert audit["id"] == list(scores.table.ids)
    assert {"source", "value", "threshold", "sentence", "duplicate_of", "ppl", "entropy", "el2n"} <= set(audit)
    for row, decision in enumerate(audit["decision"]):
        kept_here, target = audit["n_target_kept"][row], audit["n_target"][row]
        assert decision == ("drop" if kept_here == 0 else "keep" if kept_here == target else "mask")
        assert audit["sentence"][row].startswith("dropped: " if decision == "drop" else "kept: ")
        assert (audit["reason"][row] in ("Q2", "Q4", "topup")) == (decision != "drop")
    np.testing.assert_allclose(np.log(audit["ppl"]), audit["loss"], rtol=1e-6)
    tokens = pq.read_table(tmp_path / "kept" / "tokens.parquet").to_pydict()
    assert tokens["input_ids"] == [list(row) for row in scores.input_ids]
    for row, example in zip(kept.rows, kept.dataset()):
        inside = from_runs(tokens["kept"][row], len(example["labels"]))
        assert inside.tolist() == [label != -100 for label in example["labels"]]


def test_runs_there_and_back():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.9, 1.0):
        mask = rng.random(40) < share
        np.testing.assert_array_equal(from_runs(to_runs(np.flatnonzero(mask)).tolist(), 40), mask)


@pytest.mark.parametrize("method", SAMPLES.names())
def test_every_reason_of_every_method_has_a_sentence(method):
    rng = np.random.default_rng(2)
    scores = stored(40)
    scores.table.tokens["nll"][: int(scores.table.offsets[2])] = np.nan
    prompts = np.array([f"question {i // 2} of many that are asked" for i in range(40)], dtype=object)
    scores = with_rows(
        scores,
        prompt=prompts,
        answer=prompts,
        truncated=np.arange(40) % 9 == 0,
        residual=rng.normal(size=40),
        grad_norm=rng.random(40),
        direct_nll=rng.exponential(1.5, 40),
        influence=rng.random(40),
        embedding=rng.normal(size=(40, 8)).astype(np.float32).repeat(2, axis=0)[:40],
        gradient=rng.normal(size=(40, 8)).astype(np.float32),
    )
    scores = replace(scores, table=replace(scores.table, facts={"weight_norm": 3.0}))
    audit = audit_rows(select(scores, samples_method=method, samples_kept=0.3)).to_pydict()
    assert set(audit["reason"]) <= set(REASONS)
    assert "{" not in "".join(audit["sentence"])
    if method == "q_tuning":
        assert audit["reason"][:2] == ["bad_score", "bad_score"]
    if method == "exact_duplicates":
        repeats = [row for row in range(40) if audit["duplicate_of"][row]]
        assert repeats
        assert all(f"it repeats {audit['duplicate_of'][row]}" in audit["sentence"][row] for row in repeats)


def test_facts_warn_of_selection_by_length_topping_up_and_vanished_sources():
    scores = stored(30)
    # Losses that grow with the number of targets, and entropies that grow with the losses.
    growing = np.repeat(scores.table.targets / 5.0, scores.table.targets).astype(np.float32)
    scores.table.tokens["nll"][:] = growing
    scores.table.tokens["entropy"][:] = growing
    facts = selection_facts(select(scores, samples_method="perplexity", samples_kept=0.2))
    assert abs(facts["score_length_spearman"]) > 0.99
    assert any("selection by length" in text for text in facts["warnings"])
    facts = selection_facts(select(scores, samples_method="q_tuning", samples_kept=0.5))
    assert facts["topup_share"] > 0.5
    assert any("topped up" in text for text in facts["warnings"])
    lonely = np.array(["other"] * 30, dtype=object)
    lonely[np.argmin(scores.table.targets)] = "alone"
    facts = selection_facts(select(with_rows(scores, source=lonely), samples_method="length", samples_kept=0.1))
    assert any("source alone" in text for text in facts["warnings"])
    assert not any("by length" in text for text in facts["warnings"]), "that is what was asked for"


def test_facts_say_why_a_budget_was_missed():
    scores = stored(20)
    scores.table.tokens["protected"][:] = True
    kept = select(scores, tokens_method="loss", tokens_kept=0.5)
    facts = selection_facts(kept)
    assert facts["achieved"]["tokens_of_kept_rows"] == 1.0
    assert any("protected tokens and floors stay" in text for text in facts["warnings"])
    scores = stored(20)
    scores.table.tokens["nll"][int(scores.table.offsets[5]) :] = np.inf
    facts = selection_facts(select(scores, samples_method="perplexity", samples_kept=0.5))
    assert any("cannot judge" in text for text in facts["warnings"])
    assert any("15 of 20 rows have no finite score" in text for text in facts["warnings"])


def test_projected_cost_is_the_table_of_flops():
    cost = projected_cost(100.0, 0.25)
    assert cost["relative_flops"]["LoRA, 1 epoch"] == 0.75
    assert cost["relative_flops"]["full fine-tuning, 1 epoch"] == pytest.approx(0.58, abs=0.005)
    assert cost["relative_flops"]["full fine-tuning, 3 epochs"] == pytest.approx(0.36, abs=0.005)
    assert cost["seconds_saved_per_lora_epoch"] == 150.0
    assert projected_cost(None, 0.5)["seconds_saved_per_lora_epoch"] is None


def test_one_row_is_kept_at_least():
    assert select(stored(1), samples_method="q_tuning", samples_kept=0.01).rows.tolist() == [0]


def test_all_faults_of_the_settings_at_once():
    with pytest.raises(ConfigError) as caught:
        select(
            stored(),
            samples_method="q_tunning",
            tokens_kept=0.5,
            scope="batch",
            floor=2,
            stratify="sauce",
            minimum=-1,
        )
    said = str(caught.value)
    assert "6 problems" in said
    assert "did you mean 'q_tuning'" in said
    assert "name a token method" in said
    assert "did you mean 'source'" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples_kept": 0.0, "samples_method": "random"}, "not above 0%"),
        ({"samples_options": {"prefer": "low"}}, "are of no method"),
        ({"tokens_method": "loss", "tokens_options": {"bands": "low"}}, "did you mean 'band'"),
        ({"stratify": "source"}, "name a sample method"),
        ({"minimum": 3, "samples_method": "random"}, "set stratify"),
    ],
)
def test_faults_of_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        select(stored(), **settings)


def test_missing_columns_are_named():
    scores = stored()
    with pytest.raises(DataError, match="reference_nll"):
        select(scores, tokens_method="excess_loss", tokens_kept=0.5)
    with pytest.raises(DataError, match="label"):
        select(scores, samples_method="random", samples_kept=0.5, stratify="label")


def test_nothing_left_is_refused():
    scores = stored(5)
    scores.table.tokens["nll"][:] = np.nan
    with pytest.raises(DataError, match=r"keeps none of 5 rows.*bad_score \(5\)"):
        select(scores, samples_method="perplexity", samples_kept=0.5)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    kept = select(stored())
    write_selection(kept, tmp_path / "kept")
    with pytest.raises(DataError, match="exists; name another folder"):
        write_selection(kept, tmp_path / "kept")
    write_selection(kept, tmp_path / "kept", replace=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="holds no selection"):
        write_selection(kept, tmp_path / "mine", replace=True)


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_selection(select(stored()), tmp_path / "kept", finish=fail)
    assert list(tmp_path.iterdir()) == []
