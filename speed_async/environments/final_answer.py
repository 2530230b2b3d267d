r"""Extracts the final answer of a text: from `<answer>` tags, from `\boxed{}`, or after `####`."""

import re

_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_BRACE = re.compile(r"\\boxed\{|(?<!\\)[{}]")
_MARK = "####"


def last_tagged(text: str) -> str | None:
    """Stripped content of the last `<answer>...</answer>`, or None."""
    end = text.rfind(_CLOSE_TAG)
    start = text.rfind(_OPEN_TAG, 0, max(end, 0))
    return text[start + len(_OPEN_TAG) : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Stripped content of the last `\boxed{...}` with balanced braces, or None."""
    open_braces: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):  # one pass: a policy may generate thousands of open boxes
        if brace.group().endswith("{"):
            open_braces.append(brace)
        elif open_braces:
            opened = open_braces.pop()
            if opened.group() != "{" and (last is None or opened.end() > last[0]):
                last = (opened.end(), brace.start())
    return None if last is None else text[slice(*last)].strip()


def after_mark(text: str) -> str | None:
    """Stripped text after the last `####`, or None."""
    _, mark, tail = text.rpartition(_MARK)
    return tail.strip() if mark else None


def marked_answer(text: str) -> str | None:
    r"""The last `\boxed{}`, else the text after the last `####`, stripped; else None."""
    boxed = last_boxed(text)
    return after_mark(text) if boxed is None else boxed


def final_answer(text: str) -> str:
    """The marked answer, else the whole text; stripped."""
    marked = marked_answer(text)
    return text.strip() if marked is None else marked
