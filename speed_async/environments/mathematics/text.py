r"""Brings the text of an answer into one notation, and splits it outside brackets."""

import re
from collections.abc import Iterator

from speed_async.environments.exact_answer import normalised

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": "*",
        "\u00b7": "*",
        "\u22c5": "*",
        "\u00f7": "/",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00b0": "^\\circ",
        "\u03c0": "\\pi ",
        "\u221a": "\\sqrt ",
        "\u221e": "\\infty ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u222a": "\\cup ",
        "\u2208": "\\in ",
        "\u00b1": "\\pm ",
        "\u2248": "\\approx ",
        "\u03b8": "\\theta ",
        "\uff0c": ",",
    }
)
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)\s*(?=\d{3}(?!\d))")
_DELIMITER = re.compile(r"\\[()\[\]]|\\(?:displaystyle|big|Big|bigg|Bigg|limits)(?![A-Za-z])")
_DOLLARS = re.compile(r"\\\$\s*([\d.,]+)")
_TOKEN_OF_THOUSANDS = re.compile(
    r"(?P<number>(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]))|(?P<open>\\\{|[(\[])|(?P<close>\\\}|[)\]])"
)
_BRACKET = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[{}]|[(){}\[\]]")
_APPROXIMATION = re.compile(r"\\approx(?![A-Za-z])")
_REALS = re.compile(r"\\mathbb\{R\}|\\mathbb R|\\R(?![A-Za-z])")
_EMPTY_SET = re.compile(r"\\(?:emptyset|varnothing)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .-]*")
_FINAL_TEXT = re.compile(
    r"\\(?:text|mbox|textnormal|textbf|textit|textrm|mathrm|mathbf|rm)\s*\{([A-Za-z' ./\s-]+)\}"
    r"\s*(\^\s*\{?[23]\}?)?[.\s$]*$"
)
_MATHEMATICAL = frozenset({"pi", "sin", "cos", "tan", "cot", "sec", "csc", "sqrt", "infinity"})
_ARTICLE = re.compile(r"(?:an?|the) ")
ROW_END = "\u00b6"


def clean(text: str) -> str:
    """`text` in one notation: no spacing, delimiters, thousands separators or approximation."""
    text = _EMPTY_SET.sub(r"\\{\\}", _REALS.sub(r"(-\\infty,\\infty)", text))
    text = text.translate(_CHARACTERS).replace("\\\\", ROW_END)
    text = _DOLLARS.sub(r"\1 dollars", _DELIMITER.sub(" ", _SEPARATOR.sub("", text)))
    exact, *approximation = _APPROXIMATION.split(text, maxsplit=1)
    text = _without_thousands(exact if exact.strip() else "".join(approximation))
    command = _FINAL_TEXT.search(text)
    if command is None or (len(command[1].strip()) == 1 and not command.start()):
        return normalised(text)
    words = " ".join(command[1].split())
    return f"{normalised(text[: command.start()])}\\text{{{words}}}{command[2] or ''}"


def _without_thousands(text: str) -> str:
    """Commas between thousands are removed outside brackets; inside, they separate items."""
    depth = 0
    pieces: list[str] = []
    position = 0
    for token in _TOKEN_OF_THOUSANDS.finditer(text):
        if token["number"] and depth == 0:
            pieces += [text[position : token.start()], token.group().replace(",", "")]
            position = token.end()
        depth += bool(token["open"]) - bool(token["close"])
    return "".join([*pieces, text[position:]])


def words_in(text: str) -> str | None:
    """Lower-case words without an article or text command; None when `text` is more than words."""
    text = text.removeprefix("\\text{").rstrip("}. ") if text.startswith("\\text{") else text
    if _WORDS.fullmatch(text) is None:
        return None
    words = " ".join(text.lower().rstrip(".").split())
    return _ARTICLE.sub("", words, count=1) if _ARTICLE.match(words) else words


def is_words(text: str) -> bool:
    """Whether `text` is words; letters that may be a product of variables are not."""
    if _WORDS.fullmatch(text) is None or text.rstrip(".").lower() in _MATHEMATICAL:
        return text.startswith("\\text{") and words_in(text) is not None
    return max(map(len, text.split())) > 3


def split_outside(text: str, separator: re.Pattern[str]) -> list[tuple[str, str]]:
    """The parts of `text` between separators outside brackets, each with the one before it."""
    brackets = list(_brackets(text))
    parts: list[tuple[str, str]] = []
    start, before, depth, index = 0, "", 0, 0
    for match in separator.finditer(text):
        while index < len(brackets) and brackets[index][0].start() < match.start():
            depth += 1 if brackets[index][1] else -1
            index += 1
        if depth == 0:
            parts.append((text[start : match.start()].strip(), before))
            start, before = match.end(), match.group()
    return [*parts, (text[start:].strip(), before)]


def enclosing(text: str) -> tuple[str, str] | None:
    """The brackets around all of `text`, or None."""
    depth = 0
    opening = None
    for bracket, is_open in _brackets(text):
        if opening is None:
            if bracket.start() or not is_open or bracket.group().startswith("\\begin"):
                return None
            opening = bracket.group()
        depth += 1 if is_open else -1
        if depth == 0:
            at_end = bracket.end() == len(text)
            return (opening, bracket.group()) if at_end else None
    return None


def _brackets(text: str) -> Iterator[tuple[re.Match[str], bool]]:
    for bracket in _BRACKET.finditer(text):
        yield bracket, bracket.group().startswith("\\begin") or bracket.group()[-1] in "([{"
