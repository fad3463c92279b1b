"""The scoring pass: right numbers, no influence of neighbours or order, shards that survive a stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.core.errors import ConfigError, DataError
from prunetune.data import score, store
from prunetune.data.scorer import ScoringOptions
from prunetune.model.marks import Protection, paragraphs, token_at
from tests.support import MODEL_TYPES, tiny_model, tiny_tokenizer

ALL = ScoringOptions(extras=("last_layer", "embedding", "ifd"))


def rows(count=12):
    lot = np.random.default_rng(0)

    def words(low, high):
        return " ".join(f"w{i}" for i in lot.integers(0, 90, lot.integers(low, high)))

    return [{"prompt": words(2, 9), "completion": words(3, 12), "source": "ab"[i % 2]} for i in range(count)]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def alone(model, ids, positions):
    """(nll, entropy) of target positions from full float64 logits of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)[positions - 1]
    nll = -log_probs[torch.arange(len(positions)), torch.tensor(ids)[positions]]
    return nll.numpy(), -(log_probs.exp() * log_probs).sum(-1).numpy()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_token_statistics_are_those_of_the_row_alone(model_type, tokenizer):
    model = tiny_model(model_type)
    found = score(rows(), model, tokenizer, options=ALL)
    table = found.table
    assert list(table.ids) == sorted(table.ids)
    for index, ids in enumerate(found.input_ids):
        span = slice(table.offsets[index], table.offsets[index + 1])
        positions = table.tokens["position"][span]
        assert [ids[i] for i in positions] == table.tokens["token"][span].tolist()
        nll, entropy = alone(model, ids, positions)
        np.testing.assert_allclose(table.tokens["nll"][span], nll, atol=2e-5)
        np.testing.assert_allclose(table.tokens["entropy"][span], entropy, atol=2e-5)


def test_order_and_repetitions_change_nothing(tokenizer):
    model = tiny_model()
    one = score(rows(), model, tokenizer).table
    other = score([*rows()[::-1], rows()[3]], model, tokenizer).table
    assert list(one.ids) == list(other.ids)
    for name, column in one.tokens.items():
        np.testing.assert_array_equal(column, other.tokens[name])


def test_batch_size_changes_nothing_but_noise(tokenizer):
    model = tiny_model()
    big, small = (score(rows(), model, tokenizer, options=ScoringOptions(batch_tokens=size)) for size in (4096, 1))
    np.testing.assert_allclose(big.table.tokens["nll"], small.table.tokens["nll"], atol=1e-5)
    np.testing.assert_allclose(big.table.rows["grad_norm"], small.table.rows["grad_norm"], rtol=1e-4)


def test_last_layer_columns_equal_a_step_on_the_output_layer(tokenizer):
    model = tiny_model("qwen3", tie_word_embeddings=False).double()
    found = score(rows(5), model, tokenizer)
    weight = model.lm_head.weight
    assert found.table.facts["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    for index, (ids, labels) in enumerate(zip(found.input_ids, found.labels)):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)[1:]).backward()
        assert found.table.rows["grad_norm"][index] == pytest.approx(float(weight.grad.norm()), rel=1e-4)
        inner = float((weight.detach() * weight.grad).sum())
        assert found.table.rows["residual"][index] == pytest.approx(inner, abs=1e-4)


def test_direct_loss_is_the_answer_behind_an_opening(tokenizer):
    model = tiny_model()
    found = score(rows(4), model, tokenizer, options=ALL)
    start = tokenizer.bos_token_id
    for index, (ids, labels) in enumerate(zip(found.input_ids, found.labels)):
        answer = [token for token, label in zip(ids, labels) if label != -100]
        nll, _ = alone(model, [start, *answer], np.arange(1, len(answer) + 1))
        assert found.table.rows["direct_nll"][index] == pytest.approx(nll.mean(), abs=2e-5)


def test_adapters_off_is_the_reference(tokenizer):
    base = tiny_model()
    plain = score(rows(), base, tokenizer).table
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    found = score(rows(), model, tokenizer, reference="base").table
    np.testing.assert_allclose(found.tokens["reference_nll"], plain.tokens["nll"], atol=1e-5)
    assert not np.allclose(found.tokens["nll"], plain.tokens["nll"], atol=1e-3)
    with pytest.raises(DataError, match="no adapters"):
        score(rows(), tiny_model(), tokenizer, reference="base")


def test_a_reference_of_another_vocabulary_is_refused(tokenizer):
    with pytest.raises(DataError, match="same tokenizer"):
        score(rows(), tiny_model(), tokenizer, reference=tiny_model(vocab_size=50))


def test_a_row_influences_itself_most(tokenizer):
    options = ScoringOptions(extras=("influence",))
    table = score(rows(), tiny_model(), tokenizer, options=options, validation=rows()[4:5]).table
    ids = score(rows()[4:5], tiny_model(), tokenizer).table.ids
    best = int(np.argmax(table.rows["influence"]))
    assert [table.ids[best]] == list(ids)
    assert table.rows["influence"][best] == pytest.approx(1.0, abs=1e-5)
    assert np.sort(table.rows["influence"])[-2] < 0.9


def test_scoring_leaves_training_mode_and_weights_alone(tokenizer):
    model = tiny_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    score(rows(4), model, tokenizer, options=ALL)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_rows_without_targets_stay_in_the_table(tokenizer):
    long = {"prompt": " ".join(["w1"] * 40), "completion": "w2"}
    table = score([*rows(3), long], tiny_model(), tokenizer, max_length=30).table
    assert sorted(table.targets)[0] == 0
    assert np.isfinite(table.tokens["nll"]).all()
    with pytest.raises(DataError, match="larger --max-length"):
        score([long], tiny_model(), tokenizer, max_length=30)


def test_written_scores_read_back_equal_and_a_stopped_pass_goes_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 5)
    model = tiny_model()
    whole = score(rows(), model, tokenizer, folder=tmp_path / "a", options=ALL)
    memory = score(rows(), model, tokenizer, options=ALL)
    assert_same(whole, memory)
    # A pass that was killed after its second shard, with half a file of the third.
    folder = tmp_path / "b"
    score(rows(), model, tokenizer, folder=folder, options=ALL)
    header = store.read_header(folder)
    store.write_json(folder / store.HEADER, {**header, "complete": False})
    store.shard_path(folder, 2).unlink()
    (folder / store.SHARDS / ".part-00002.parquet.77.partial").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not finished"):
        store.read_scores(folder)
    times = [store.shard_path(folder, n).stat().st_mtime_ns for n in (0, 1)]
    assert_same(score(rows(), model, tokenizer, folder=folder, options=ALL), whole)
    assert times == [store.shard_path(folder, n).stat().st_mtime_ns for n in (0, 1)], "finished shards stay"


def test_shards_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 5)
    model, folder = tiny_model(), tmp_path / "c"
    assert score(rows(), model, tokenizer, folder=folder, process=(1, 2)) is None
    assert score(rows(), model, tokenizer, folder=folder, process=(0, 2)) is not None
    assert_same(store.read_scores(folder), score(rows(), model, tokenizer))


def assert_same(one, other):
    assert list(one.table.ids) == list(other.table.ids)
    assert list(one.input_ids) == list(other.input_ids)
    assert list(one.labels) == list(other.labels)
    assert list(one.examples) == list(other.examples)
    assert one.table.rows.keys() == other.table.rows.keys()
    assert one.table.tokens.keys() == other.table.tokens.keys()
    for mine, theirs in ((one.table.rows, other.table.rows), (one.table.tokens, other.table.tokens)):
        for name, column in mine.items():
            if column.dtype.kind == "f":
                np.testing.assert_allclose(column, theirs[name], atol=2e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(column, theirs[name], err_msg=name)


def test_scores_of_something_else_are_refused(tokenizer, tmp_path):
    folder = tmp_path / "scores"
    score(rows(), tiny_model(), tokenizer, folder=folder)
    with pytest.raises(DataError, match="model_hash"):
        score(rows(), tiny_model(seed=1), tokenizer, folder=folder)
    with pytest.raises(DataError, match="max_length"):
        score(rows(), tiny_model(), tokenizer, folder=folder, max_length=9)
    with pytest.raises(DataError, match="without ifd"):
        score(rows(), tiny_model(), tokenizer, folder=folder, options=ALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DataError, match="no scores"):
        score(rows(), tiny_model(), tokenizer, folder=tmp_path / "other")


def test_unknown_extras_are_named():
    with pytest.raises(ConfigError, match="did you mean"):
        ScoringOptions(extras=("embeding",))


class Letters:
    """A tokenizer of single characters, with an end token 0."""

    all_special_ids = (0,)
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def decode(self, ids):
        return "".join("$" if i == 0 else chr(i) for i in ids)

    def encode(self, text):
        return [0 if letter == "$" else ord(letter) for letter in text]


def test_marks():
    letters = Letters()
    ids = letters.encode("one\n\ntwo\n \nthree #### 42$\n")
    number = paragraphs(letters, ids)
    assert [int(number[i]) for i in (0, 4, 5, 7, 11)] == [0, 0, 1, 1, 2]
    assert number[-1] == 2
    kept = Protection(letters)(ids)
    assert kept.tolist() == [False] * (len(ids) - 2) + [True, True]
    kept = Protection(letters, "####")(ids)
    assert kept.sum() == len("#### 42$\n")
    assert token_at(letters, np.array(ids), 5) == 5
