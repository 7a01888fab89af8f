"""Numbers are written as a person would, and never with more digits than they have."""

from __future__ import annotations

import pytest

from deta.platform.pages.number_format import (
    Interval,
    amount,
    common_decimals,
    decimals_for,
    duration,
    interval_text,
    num_of,
    p_value,
    percent,
    percent_of,
    plus_minus,
    short,
    signed,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (36, "36 s"), (89.6, "2 min"), (185, "3 min"), (720, "12 min"),
        (11088, "3 h 05 min"), (187920, "2 d 4 h"),
    ],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0412345, "0.0412"), (3.14159, "3.14"), (2126.4, "2,126"), (0, "0")]
)
def test_amounts_have_three_digits_and_no_exponent(value: float, text: str):
    assert amount(value) == text


def test_what_rounds_to_zero_has_no_sign():
    assert signed(-0.04, 1) == "0.0"
    assert signed(-0.06, 1) == "\u22120.1"
    assert short(-2.0) == "\u22122"


@pytest.mark.parametrize(
    ("uncertainty", "decimals"), [(None, 2), (0.0, 2), (3.0, 0), (0.3, 1), (0.15, 2), (1e-9, 3)]
)
def test_an_uncertainty_keeps_its_first_digit(uncertainty: float | None, decimals: int):
    assert decimals_for(uncertainty) == decimals


def test_intervals_and_their_columns():
    assert plus_minus(-0.12, 0.31) == "\u22120.1 ± 0.3"
    assert interval_text(0.1, Interval(-0.4, 0.2), 2) == "0.10  [\u22120.40, 0.20]"
    assert interval_text(0.1, None, 1) == "0.1"
    assert 0 in Interval(-0.4, 0.2)
    assert common_decimals([0.3, 0.03]) == 2
    assert common_decimals([]) == 2


def test_shares_and_counts():
    assert percent(0.123) == "12 %"
    assert percent(0.1234, 1) == "12.3 %"
    assert [percent_of(1, 0), percent_of(0, 5), percent_of(3, 1000), percent_of(1, 2)] == [
        "-", "0 %", "0.3 %", "50 %",
    ]  # fmt: skip
    assert [num_of(1, "seed"), num_of(3, "seed")] == ["1 seed", "3 seeds"]


@pytest.mark.parametrize(
    ("p", "text"), [(0.0004, "p < 0.001"), (0.004, "p = 0.004"), (0.2, "p = 0.20")]
)
def test_small_p_values_are_not_written_as_zero(p: float, text: str):
    assert p_value(p) == text
