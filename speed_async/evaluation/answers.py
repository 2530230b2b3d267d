"""Which extracted answers are equal, for majority voting.

Equality is that of the verifier: of the text after normalisation, and, for mathematical answers, of
the value where exact rules decide it (environments/mathematics/comparison.py). An answer joins the
first class whose first member it equals.
"""

from collections.abc import Sequence

from speed_async.environments.exact_answer import normalised, same_answer
from speed_async.environments.matching import MatchKind
from speed_async.environments.mathematics.comparison import same_math
from speed_async.environments.numeric_answer import same_number
from speed_async.environments.whole_number import whole_number


def answer_classes(answers: Sequence[str | None], match: MatchKind) -> list[int | None]:
    """The class of each answer, numbered from 0 in the order of first members; None for none."""
    firsts: list[str] = []
    by_text: dict[str, int] = {}
    classes: list[int | None] = []
    for answer in answers:
        if answer is None or not answer.strip():
            classes.append(None)
            continue
        text = normalised(answer) or answer.strip()
        if text not in by_text:
            by_text[text] = next(
                (i for i, first in enumerate(firsts) if _are_equal(first, text, match)),
                len(firsts),
            )
            if by_text[text] == len(firsts):
                firsts.append(text)
        classes.append(by_text[text])
    return classes


def _are_equal(first: str, text: str, match: MatchKind) -> bool:
    if same_answer(first, text):
        return True
    if match == "math":
        return same_math(first, text) is True
    if match == "numeric":
        one, other = whole_number(first), whole_number(text)
        return one is not None and other is not None and same_number(one, other)
    return False
