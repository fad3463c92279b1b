from __future__ import annotations

import json
import re

import datasets
import pytest

from prunetune.core.errors import DataError
from prunetune.data import sources

ROWS = [{"prompt": f"Question {index}?", "completion": f"Answer, {index}."} for index in range(3)]


def read_one(path) -> sources.Rows:
    return sources.read(str(path), "data.train")["train"]


def test_every_file_kind_gives_the_same_rows(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, ROWS)))
    dataset.to_csv(str(tmp_path / "a.csv"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "a.json", "b.json", "c.json", "a.csv", "a.parquet", "saved"):
        assert read_one(tmp_path / name).values == ROWS, name


def test_a_saved_dict_keeps_its_splits(tmp_path):
    parts = {"train": ROWS[:2], "validation": ROWS[2:], "test": ROWS[:1]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(str(tmp_path / "d"))
    splits = sources.read(str(tmp_path / "d"), "data.train")
    assert sources.training_rows(splits).values == ROWS[:2]
    held = sources.held_out_rows(splits)
    assert held is not None
    assert held.values == ROWS[2:]
    assert held.name == "d[validation]"
    assert sources.held_out_rows({"train": splits["train"], "test": splits["test"]}) is None


def test_relative_paths_are_also_looked_for_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert sources.read("rows.jsonl", "data.train", tmp_path)["train"].values == ROWS[:1]


def test_places_are_line_numbers_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(ROWS[0])}\n\n{json.dumps(ROWS[1])}\n")
    assert read_one(tmp_path / "a.jsonl").places == [2, 4]
    (tmp_path / "a.csv").write_text('prompt,completion\n"two\nlines",x\nb,y\n')
    rows = read_one(tmp_path / "a.csv")
    assert rows.places == [3, 4]
    assert rows.values[0]["prompt"] == "two\nlines"


def test_invalid_lines_are_all_listed_and_five_are_shown(tmp_path):
    lines = [json.dumps(ROWS[0])] * 12
    for index in (1, 2, 3, 6, 8, 10):
        lines[index] = '{"prompt": "a",'
    lines[8] = "[1]"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_one(tmp_path / "bad.jsonl")
    text = str(caught.value)
    assert "bad.jsonl: 6 of 12 rows" in text
    assert len(re.findall(r"^  line \d+: ", text, re.M)) == 5
    assert "line 2: is not JSON" in text
    assert "line 9: is list, not an object" in text
    assert "lines 2-4, 7, 9, 11" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n\n", "no rows in it"),
        ("a.csv", "prompt,completion\n", "no rows in it"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", "line 3: has 1 cells more"),
        ("a.json", '[{"a": 1},\n {"a": }]', "line 2, column"),
        ("a.json", "[1, 2]", "row 1: is int"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.txt", "hello", r"Use .jsonl, .json, .csv, .parquet"),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_one(tmp_path / name)


def test_wrong_encoding_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"not UTF-8 text \(line 2\)"):
        read_one(tmp_path / "a.jsonl")


def test_missing_file_is_not_mistaken_for_a_hub_id(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_one(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        sources.read("./nowhere", "data.train")
    with pytest.raises(DataError, match="not saved by datasets"):
        read_one(tmp_path)


def test_unreachable_hub_says_what_else_to_use(monkeypatch):
    asked = []

    def offline(name, config):
        asked.append((name, config))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"Couldn't reach the Hub.*pydocs"):
        sources.read("someone/data:main", "data.train")
    assert asked == [("someone/data", "main")]
