from __future__ import annotations

import pytest

from prunetune.data.docstrings import clean_inline, paragraphs, sentences, shorten


def test_only_the_opening_prose_stays():
    doc = """Fit the model to ``x``.

    Uses :class:`~pkg.solvers.Solver` and goes on
    until it converges, e.g. after ten steps.

    .. versionadded:: 1.2

    Parameters
    ----------
    x : array
        The data.
    """
    assert paragraphs(doc) == [
        "Fit the model to `x`.",
        "Uses `Solver` and goes on until it converges, e.g. after ten steps.",
    ]


@pytest.mark.parametrize(
    "section",
    ["Args:\n    x: data", ":param x: data", ">>> fit(1)", "Returns:\n    x", "- a list\n- of things", "Example::"],
)
def test_sections_fields_examples_and_lists_end_the_prose(section):
    assert paragraphs(f"Fit the model.\n\n{section}\n\nMore.") == ["Fit the model."]


def test_leading_call_line_is_not_prose():
    assert paragraphs("max(a, b) -> value\n\nReturn the larger one") == ["Return the larger one."]


def test_a_sentence_that_introduces_code_is_dropped():
    assert paragraphs("Read a file. Use it like this:\n\n    read(x)") == ["Read a file."]


def test_markup_is_removed():
    assert clean_inline("See [`~trl.SFTTrainer`] and `text <http://x.y>`_ in *this* **bold** `word'") == (
        "See `SFTTrainer` and text in this bold `word`"
    )


def test_abbreviations_do_not_end_a_sentence():
    assert sentences("Use it, e.g. Here. Then stop! ok") == ["Use it, e.g. Here.", "Then stop!", "ok"]


def test_shorten_keeps_whole_sentences_and_drops_pointers():
    text = "One two three. See the manual for more. Four five six. Seven."
    assert shorten(text, 29) == "One two three. Four five six."
    assert shorten(text, 100) == "One two three. Four five six. Seven."
    assert shorten(text, 5) == ""
