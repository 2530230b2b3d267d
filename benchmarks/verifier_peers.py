r"""The answer rules of other libraries, as comparison functions of (completion, answer).

Written from the behaviour of `verl/utils/reward_score/math.py` (Hendrycks' normalisation of
MATH), `verl/utils/reward_score/math_dapo.py` (Minerva's normalisation) and TRL's `accuracy_reward`
(`trl/rewards/accuracy_rewards.py`), August 2026. `math_dapo` reads the line after `Answer:`; its
recipes for boxed answers apply the same normalisation to the last box, and so does this one.
"""

import re

from math_verify import LatexExtractionConfig, parse, verify

from speed_async.environments.final_answer import last_boxed

DAPO_TAIL_CHARS = 300
_UNIT_WORDS = (
    "square|ways|integers|dollars|mph|inches|hours|km|units|points|feet|minutes|digits|cents"
    "|degrees|cm|gm|pounds|meters|meals|edges|students|multiples"
)
_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\w|\{[^{}]*\})\s*(\w|\{[^{}]*\})")


def math_verify_alone(completion: str, answer: str) -> bool:
    """Default settings. A timeout or an error counts as different, without a trace."""
    return verify(parse(f"${answer}$"), parse(completion))


def trl_accuracy_reward(completion: str, answer: str) -> bool:
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    candidate = parse(
        completion, extraction_config=[config], extraction_mode="first_match", parsing_timeout=10
    )
    return verify(parse(f"${answer}$", parsing_timeout=10), candidate)


def verl_math(completion: str, answer: str) -> bool:
    boxed = last_boxed(completion)
    return boxed is not None and _hendrycks(boxed) == _hendrycks(answer)


def verl_math_dapo(completion: str, answer: str) -> bool:
    tail = completion[-DAPO_TAIL_CHARS:]
    lines = _ANSWER_LINE.findall(tail)
    candidate = lines[-1] if lines else last_boxed(tail)
    return candidate is not None and _minerva(candidate) == _minerva(answer)


def _hendrycks(text: str) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\^\{?\\circ\}?|\\?%|\\\$", "", text)
    text = text.split("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = _SHORT_FRACTION.sub(_braced, text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def _minerva(text: str) -> str:
    text = re.sub(r"\ban? |\\\$|\\ | ", "", text.split("=")[-1]).replace("mbox", "text")
    text = re.sub(rf",?\\text\{{and\}}|{_UNIT_WORDS}|\^\{{?\\circ\}}?|\\;|,\\!|\{{,\}}", "", text)
    text = re.sub(r"\\text\{\}(?:\^[23])?", "", text)
    text = re.sub(r"\\(?:text|textbf|overline)\{(.*?)\}", r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text.strip()


def _braced(fraction: re.Match[str]) -> str:
    top, bottom = (part.strip("{}") for part in fraction.groups())
    return f"\\frac{{{top}}}{{{bottom}}}"
