r"""The answer that a completion states: the rules of `task.match = "math"`.

The first rule that applies decides, and an empty answer is no answer:

1. the content of the last `\boxed{...}`; a last box that is never closed ends with its line;
2. the content of the last `<answer>...</answer>`;
3. the text after the last `####`;
4. what follows the last `answer is`, `answer:` or `answer =` in its sentence and line;
5. the last line. It must be the answer itself: no number is taken out of a sentence.
"""

import re

from speed_async.environments.final_answer import after_mark, last_boxed, last_tagged

_BOX = "\\boxed{"
_STATED = re.compile(r"\banswer(?: is\b:?|[:=]| [:=])(?:[ \t]*\*\*)?", re.IGNORECASE)
_DELIMITED = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*([^*]+)\*\*")
_FINAL_MARKUP = " \t\r$*."


def math_answer(text: str) -> str | None:
    """The stated answer of a completion; None when it states none."""
    answer = _delimited(text)
    if answer is None:
        answer = _stated(text)
    if answer is None:
        lines = text.strip().rsplit("\n", 1)
        answer = _undelimited(lines[-1])
    return answer or None


def _delimited(text: str) -> str | None:
    """Rules 1 to 3. Unlike `marked_answer`, which reads ground truths, it also accepts tags and a
    last box that is never closed."""
    start = text.rfind(_BOX)
    if start >= 0:
        tail = text[start:]
        closed = last_boxed(tail)
        return closed if closed is not None else _open_box(tail)
    tagged = last_tagged(text)
    return after_mark(text) if tagged is None else tagged


def _open_box(tail: str) -> str:
    return tail[len(_BOX) :].lstrip(" \n$").partition("\n")[0].rstrip(_FINAL_MARKUP)


def _stated(text: str) -> str | None:
    ends = [statement.end() for statement in _STATED.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].lstrip().partition("\n")[0]
    return _undelimited(line.partition(". ")[0])


def _undelimited(line: str) -> str:
    """`line` without a final period and delimiters of mathematics or emphasis around it all."""
    line = line.strip().rstrip("*. ") if line.count("**") % 2 else line.strip().removesuffix(".")
    whole = _DELIMITED.fullmatch(line)
    if whole is not None:
        line = next(part for part in whole.groups() if part is not None)
    return line.strip().removesuffix(".").strip()
