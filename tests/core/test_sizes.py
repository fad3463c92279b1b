"""Amounts: what people write, what is refused, what is printed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetune.core.sizes import (
    format_bytes,
    format_count,
    format_fraction,
    parse_bytes,
    parse_count,
    parse_fraction,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("60%", 0.6), (" 60 % ", 0.6), ("0.6", 0.6), (0.6, 0.6), (".5", 0.5), ("1", 1.0), (1, 1.0), (0, 0.0),
     ("100%", 1.0), ("12.5%", 0.125), ("0%", 0.0), (1e-5, 1e-5), ("1e-5", 1e-5)],
)  # fmt: skip
def test_fractions(text, value):
    assert parse_fraction(text) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("text", [60, "60", 1.5, "60M", "60 percent", "", "%", "-5%", "-0.1", "nan", "inf", "6o%",
                                  "1,5", None, True, "1/2", "60%%", "0.5 0.5", "5e"])  # fmt: skip
def test_what_is_no_fraction(text):
    with pytest.raises(ValueError):
        parse_fraction(text)


def test_a_bare_number_above_one_says_both_ways_to_write_it():
    with pytest.raises(ValueError, match="60% or a number between 0 and 1"):
        parse_fraction(60)


@pytest.mark.parametrize(
    ("text", "value"),
    [("90M", 90_000_000), ("1.2B", 1_200_000_000), ("5k", 5000), ("5 K", 5000), (1234, 1234), ("1234", 1234),
     (90e6, 90_000_000), ("9e7", 90_000_000), (1e18, 10**18), ("0.1M", 100_000), (10**17, 10**17)],
)  # fmt: skip
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["90MB", "60%", "many", "-5", "", "M", "1e", "90 M M", "nan", "1e999", "9" * 400])
def test_what_is_no_count(text):
    with pytest.raises(ValueError):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("180MB", 180_000_000), ("180mb", 180_000_000), ("1.5GiB", 1_610_612_736), ("2 KiB", 2048), ("7", None), ("7B", 7),
     ("1 MiB", 2**20)],
)  # fmt: skip
def test_bytes(text, value):
    if value is None:
        with pytest.raises(ValueError, match="write for example 180MB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["180M", "60%", "-1MB", "MB", "1TB ", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_fraction, 0.5969, "59.7%"),
        (format_fraction, 1, "100.0%"),
        (format_count, 134_515_008, "134.5M"),
        (format_count, 1_235_000_000, "1.2B"),
        (format_count, 999, "999"),
        (format_count, 1000, "1.0K"),
        (format_count, -2_500_000, "-2.5M"),
        (format_bytes, 269_030_016, "269.0 MB"),
        (format_bytes, 12, "12 B"),
        (format_bytes, 5e9, "5.0 GB"),
    ],
)
def test_printing(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    ("parse", "form"), [(parse_fraction, "60% or 0.6"), (parse_count, "90M or 1.2B"), (parse_bytes, "180MB or 1.5GiB")]
)
@pytest.mark.parametrize("text", ["foo", "-5", "1e999", "60 x"])
def test_whatever_is_refused_the_form_is_said(parse, form, text):
    with pytest.raises(ValueError, match=f"^'{text}' is not a .* {form}$"):
        parse(text)


@given(st.integers(0, 100))
def test_percentages_come_back(percent):
    assert parse_fraction(f"{percent}%") == percent / 100


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused_with_a_value_error(text):
    for parse in (parse_fraction, parse_count, parse_bytes):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
