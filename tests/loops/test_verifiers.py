"""The rules, on what language models really write."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest
from rlkern_loops.verifiers import (
    VERIFIERS,
    exact_match,
    final_number,
    format_tags,
    multiple_choice,
    numeric,
)


@pytest.mark.parametrize(
    "text,number",
    [
        ("72", 72), ("The answer is 72.", 72), ("She has 3 apples, so 3 * 4 = 12 in all.", 12),
        ("It costs $1,234.50.", Fraction("1234.5")), ("1,234,567", 1234567), ("1{,}234", 1234),
        ("-5", -5), ("\u22125", -5), ("it is -$5", -5), ("10-7", 7), ("x=-3", -3), ("+4", 4),
        (".5", Fraction(1, 2)), ("0.50", Fraction(1, 2)), ("-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)), ("10 / 4", Fraction(5, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{1}{3}", Fraction(-1, 3)),
        ("50%", 50), (r"50\%", 50), ("1e3", 1000), ("2.5E-1", Fraction(1, 4)),
        ("the area is 20 m^2", 20), ("20 m^{2}", 20), ("in 5 km2", 5), ("**72**", 72),
        ("a list: 1,2,3", 3), ("12,34", 34), ("\u7b54\u6848\u662f72", 72),
        ("no number", None), ("", None), ("1/0", None), (r"\frac{1}{0}", None),
    ],
)  # fmt: skip
def test_the_last_number_is_read_exactly(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text,number",
    [
        ("3 + 4 = 7\n#### 7", 7), ("#### 72 apples in 3 boxes", 72),
        ("#### $1,000\nDone in 2.", 1000),
        ("#### 1\n#### 2", 2), (r"so \boxed{5} of 9", 5),
        (r"\boxed{\frac{1}{2}} 7", Fraction(1, 2)),
        (r"\boxed{5\text{ m}^2}", 5), (r"\boxed{x = -4}", -4), (r"\boxed{1} then \boxed{2}", 2),
        ("<think>3</think><answer>4</answer> 5", 4), (r"#### 1, no: \boxed{2}", 2),
        # Two answers at once are none; and an empty mark is an answer without a number.
        (r"\boxed{3 \text{ or } 4}", None), (r"7 \boxed{}", None), ("7\n####", None),
    ],
)  # fmt: skip
def test_a_marked_answer_counts_before_the_last_number(text, number):
    assert final_number(text) == number


def test_numeric_compares_exactly():
    assert numeric("0.1", "1/10") == 1.0
    assert numeric("The total is 1,000.00", "48/2 = 24, ... \n#### 1000") == 1.0
    assert numeric("0.3333333333333333", "1/3") == 0.0
    assert numeric("10000000000000001", "10000000000000000") == 0.0
    with pytest.raises(ValueError, match="answer: expected a text with a number, got 'none'"):
        numeric("1", "none")


def test_numeric_is_safe_from_what_a_model_may_write():
    start = time.perf_counter()
    for text in ("9" * 100_000, "1e999999999", "1," * 50_000, "1/" * 50_000, "\\boxed{" * 20_000,
                 "{" * 50_000, "-" * 50_000, "####" * 20_000, "<answer>" * 20_000):  # fmt: skip
        assert numeric(text, "12345") == 0.0
    assert time.perf_counter() - start < 5


def test_numeric_finds_any_number_that_is_written_out():
    rng = random.Random(0)
    for _ in range(500):
        value = Fraction(rng.randint(-(10**9), 10**9), rng.choice([1, 10, 100, 1000]))
        text = f"{value.numerator / value.denominator:,.3f}"
        assert final_number(f"We get 17 and then {text}.") == value
        assert final_number(f"{value.numerator}/{value.denominator}") == value


@pytest.mark.parametrize(
    "completion",
    [
        "(B)", "B", "B.", "b or not, Answer: B", "Answer: (B)", "**Answer:** B", r"\boxed{B}",
        r"\boxed{\text{(B)}}", "A or C? The answer is B. I am sure.",
        "The correct answer is option B",
        "(A) is wrong, (B) is right", "A) no\nB) yes\nAnswer: B) yes", "<answer>B</answer>",
        "<answer>(B) Paris</answer>", r"Answer: A, no wait, \boxed{B}", "I pick B", "so it's B\n",
    ],
)  # fmt: skip
def test_the_letter_that_is_meant(completion):
    assert multiple_choice(completion, "B") == 1.0
    assert multiple_choice(completion, "(b)") == 1.0
    assert multiple_choice(completion, "C") == 0.0


@pytest.mark.parametrize("completion", ["", "both", "BB", "Bob's", "b"])
def test_no_letter_is_no_answer(completion):
    assert multiple_choice(completion, "B") == 0.0


def test_an_answer_that_is_no_letter_is_an_error():
    with pytest.raises(ValueError, match="answer: expected one letter from A to Z, got '2'"):
        multiple_choice("B", "2")


def test_exact_match_leaves_only_white_space_out():
    assert exact_match("  a \n b", "a b") == 1.0
    assert exact_match("ab", "a b") == 0.0 and exact_match("A b", "a b") == 0.0
    with pytest.raises(ValueError, match="answer: expected a text to compare with, got ' '"):
        exact_match("", " ")


@pytest.mark.parametrize(
    "completion,right",
    [
        ("<think>a\nb</think>\n<answer>c</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("a <think>b</think><answer>c</answer>", 0.0),
        ("<think>b</think>so<answer>c</answer>", 0.0),
        ("<think>b</think><answer>c</answer> and more", 0.0),
        ("<answer>c</answer><think>b</think>", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think>b<answer>c</answer></think>", 0.0),
        ("<think>b</think><answer>c", 0.0),
        ("", 0.0),
    ],
)
def test_format_tags_wants_one_pair_of_each(completion, right):
    assert format_tags(completion, "") == right


def test_the_registry_has_them_all():
    assert set(VERIFIERS) == {"numeric", "multiple_choice", "exact_match", "format_tags"}
    assert VERIFIERS["numeric"]("4", "4") == 1.0
