r"""Rules that judge a completion against the right answer, without a model.

Each is a function `(completion, answer) -> float`, 1.0 for right and 0.0 for wrong, and depends on
nothing else. `VERIFIERS` names them for `--reward`. A rule raises ValueError for an `answer` that
it cannot read: the data then are not what the rule is for, and a reward of 0 would hide it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

Verifier = Callable[[str, str], float]

# ---- numbers ------------------------------------------------------------------------------------

# Three digits of exponent at most: the exact value of 1e999999999 would fill the memory.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_PLAIN = rf"(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_NUMBER = re.compile(
    # A minus between two terms is a subtraction, not a sign; the digits of x2 or m^2 are no number.
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?\s?\$?(?<![A-Za-z0-9_^])(?<!\^\{)"
    rf"(?:\\[dt]?frac\{{(?P<top>{_PLAIN})\}}\{{(?P<bottom>{_PLAIN})\}}"
    rf"|(?P<value>{_PLAIN})(?:\s?/\s?(?P<over>{_PLAIN}))?)"
)


def _exact(match: re.Match) -> Fraction | None:
    parts = match["top"] or match["value"], match["bottom"] or match["over"] or "1"
    try:
        top, bottom = (Fraction(part.replace(",", "")) for part in parts)
    except ValueError:  # longer than the 4300 digits that Python converts
        return None
    if bottom == 0:
        return None
    return -top / bottom if match["sign"] in ("-", "\u2212") else top / bottom


def _boxed(text: str) -> tuple[int, str]:
    r"""Where the last `\boxed{...}` starts, and what is in it; -1 if it is nowhere, or open."""
    start = text.rfind("\\boxed{")
    begin = start + len("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", text[begin:]) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start, text[begin : begin + brace.start()]
    return -1, ""


def _tagged(text: str) -> tuple[int, str]:
    """The same of the last `<answer>...</answer>`."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return start, text[start + len("<answer>") : end] if start >= 0 else ""


def final_number(text: str) -> Fraction | None:
    r"""The number that a text ends up with, exactly; None if there is none.

    The only number in the last `\boxed{}` or `<answer></answer>`, or the first after the last
    `####` on its line, whichever starts last; without any of these the last number of the text.
    Read are signs, thousands separators, decimals, exponents, `a/b` and `\frac{a}{b}`; a currency
    or percent sign is a unit, so "50%" is 50, as in the graders of GSM8K and MATH.
    """
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "$")
    hashes = text.rfind("####")
    start, marked = max(_boxed(text), _tagged(text))
    if hashes > start:
        line = text[hashes:].partition("\n")[0]
        numbers = list(_NUMBER.finditer(line))[:1]
    elif start >= 0:
        numbers = list(_NUMBER.finditer(marked))
    else:
        numbers = list(_NUMBER.finditer(text))[-1:]
    return _exact(numbers[0]) if len(numbers) == 1 else None


def numeric(completion: str, answer: str) -> float:
    """Whether both end up with the same number (see `final_number`), compared as fractions.

    `answer` may be a bare number or a whole solution that ends in "#### 72", as in GSM8K.
    """
    expected = final_number(answer)
    if expected is None:
        raise ValueError(f"answer: expected a text with a number, got {answer!r}")
    return float(final_number(completion) == expected)


# ---- letters and text ---------------------------------------------------------------------------

# From the most explicit to the least; the last match of the first that matches counts. "I am sure"
# after "The answer is B." must not make the answer I.
_CHOICES = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}",
        r"<answer>\s*\(?([A-Z])\b[^<]*</answer>",
        r"(?i:answer|choice|option)(?i:\s+is)?[\s:*=]*(?i:option\s+|choice\s+)?\(?([A-Z])\b(?!')",
        r"\(([A-Z])\)",
        r"(?<![\w'])([A-Z])(?=[.):*]|\s*$)",
        r"(?<![\w'])([A-Z])(?![\w'])",
    )
)


def multiple_choice(completion: str, answer: str) -> float:
    r"""Whether the chosen letter is that of the answer ("B", "(B)" or "b").

    Read are `\boxed{B}`, `<answer>B</answer>`, "Answer: B", "(B)", "B." and "B", in this order; of
    several of one kind the last counts.
    """
    expected = answer.strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", expected):
        raise ValueError(f"answer: expected one letter from A to Z, got {answer!r}")
    for pattern in _CHOICES:
        if found := pattern.findall(completion):
            return float(found[-1] == expected)
    return 0.0


def exact_match(completion: str, answer: str) -> float:
    """Whether the texts are the same, runs of white space counting as one blank."""
    if not answer.strip():
        raise ValueError(f"answer: expected a text to compare with, got {answer!r}")
    return float(completion.split() == answer.split())


_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def format_tags(completion: str, answer: str) -> float:
    """Whether it is one `<think>...</think>` and then one `<answer>...</answer>`, nothing else."""
    tags = re.findall(r"</?(?:think|answer)>", completion)
    return float(len(tags) == 4 and _FORMAT.fullmatch(completion) is not None)


VERIFIERS: dict[str, Verifier] = {
    "numeric": numeric,
    "multiple_choice": multiple_choice,
    "exact_match": exact_match,
    "format_tags": format_tags,
}
