from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prunetune.data import prose, pydocs, pysource
from prunetune.data.docstrings import sentences


@pytest.fixture(scope="module")
def docs() -> pydocs.PyDocs:
    return pydocs.load()


def test_thousands_of_rows_from_many_modules(docs):
    assert len(docs.train) >= 2000
    assert 100 <= len(docs.validation) <= 400
    assert docs.standard_modules >= 80
    assert docs.packages >= 5
    shares = [sum(row.top == top for row in docs.train) for top in {row.top for row in docs.train}]
    assert max(shares) <= 0.05 * len(docs.train)  # no module dominates


def test_validation_asks_about_modules_never_seen(docs):
    assert len(docs.held_out) >= 6
    assert {row.top for row in docs.train}.isdisjoint(docs.held_out)
    assert {row.top for row in docs.validation} == set(docs.held_out)


def test_no_question_and_no_answer_is_on_both_sides(docs):
    prompts = [row.prompt for row in (*docs.train, *docs.validation)]
    assert len(prompts) == len(set(prompts))
    answers = {row.completion for row in docs.train}
    assert not [row for row in docs.validation if row.completion in answers]


def test_rows_are_clean_and_short(docs):
    for row in (*docs.train, *docs.validation):
        assert 10 <= len(row.completion) <= pydocs.ANSWER_CHARACTERS, row
        assert row.prompt.endswith(("?", "briefly.")), row
        for leftover in ("``", ":func:", ":class:", ">>>", "\n", ".. version"):
            assert leftover not in row.prompt + row.completion, (leftover, row)


def test_several_wordings_are_in_use(docs):
    for start in ("What does `", "What is the signature of `", "How do I ", "Which arguments does `", "What is `"):
        assert sum(row.prompt.startswith(start) for row in docs.train) >= 100, start


def test_known_functions_are_described_rightly():
    files = dict(pysource.stdlib_files())
    entries = {entry.name: entry for top in ("json", "posixpath") for entry in pysource.read_package(top, files[top])}
    entries |= {entry.name: entry for entry in pysource.read_c_module("builtins")}
    assert entries["os.path.join"].top == "os"  # so that no split can separate os.path from os
    assert entries["json.dumps"].signature.startswith("(obj, *, skipkeys=False")
    assert entries["str.split"].signature == "(sep=None, maxsplit=-1)"
    answers = [row.completion for row in pydocs.questions(entries["os.path.join"], ["Join two or more paths."])]
    assert answers == ["Join two or more paths.", "Use `os.path.join(a, *p)`."]


def test_nothing_of_prunetune_and_no_module_with_side_effects(docs):
    tops = {row.top for row in (*docs.train, *docs.validation)}
    assert tops.isdisjoint({"prunetune", "antigravity", "this", "idlelib", "test", "turtle", "tkinter"})
    assert not [row for row in docs.train if "prunetune" in row.prompt]


def test_a_fresh_process_gives_the_same_rows_and_imports_no_documented_package(docs):
    code = (
        "import sys; from prunetune.data import pydocs; docs = pydocs.load();"
        "print(pydocs.content_key([[r.prompt, r.completion] for r in docs.train]));"
        "print([m for m in ('numpy', 'torch', 'transformers', 'antigravity', 'tkinter') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    key, imported = run.stdout.split("\n")[:2]
    assert key == pydocs.content_key([[row.prompt, row.completion] for row in docs.train])
    assert imported == "[]"


def test_sources_are_read_without_running_them(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from ._core import shown\nraise RuntimeError('imported')\n")
    (tmp_path / "pack" / "_core.py").write_text(
        'def shown(a: int, *, b=2):\n    """Show it."""\ndef hidden():\n    """Hide it."""\nclass _C:\n    """No."""\n'
    )
    files = pysource._module_files(tmp_path, "pack", 5)
    entries = list(pysource.read_package("pack", files))
    assert [(entry.name, entry.signature) for entry in entries] == [("pack.shown", "(a, *, b=2)")]


def test_general_text_is_long_prose_apart_from_the_answers(docs):
    answers = [row.completion for row in docs.train]
    text = prose.general_text(avoid=answers)
    assert len(text.encode()) >= 60_000
    assert text == prose.general_text(avoid=answers)
    known = {sentence.casefold() for answer in answers for sentence in sentences(answer)}
    paragraphs = text.strip().split("\n\n")
    assert not [p for p in paragraphs if {sentence.casefold() for sentence in sentences(p)} & known]
    letters = sum(character.isalpha() or character.isspace() for character in text)
    assert letters >= 0.9 * len(text)


def test_avoided_sentences_really_disappear():
    paragraph = prose.general_text().split("\n\n")[3]
    assert paragraph not in prose.general_text(avoid=[paragraph])


def test_general_text_is_long_enough_without_any_installed_description(monkeypatch):
    monkeypatch.setattr(prose, "_descriptions", lambda: iter(()))
    assert len(prose.general_text()) >= 60_000
