r"""Built-in format rewards: 1.0 for a completion in the form that was asked for, else 0.0.

They never look at the answer, so they do not change what passes (environments/rewards.py).
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from speed_async.environments.final_answer import last_boxed, last_tagged

_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_TAG = re.compile(r"</?answer>")


def boxed(*, completion: str, **_: object) -> float:
    r"""Whether the completion has exactly one `\boxed{...}`, complete and not empty, on its last
    line."""
    boxes = list(_BOX.finditer(completion))
    if len(boxes) != 1:
        return 0.0
    is_last = "\n" not in completion.rstrip()[boxes[0].end() :]
    return float(is_last and bool(last_boxed(completion)))


def answer_tag(*, completion: str, **_: object) -> float:
    """Whether the completion ends with its only `<answer>...</answer>`, which is not empty."""
    tags = _TAG.findall(completion)
    ends = completion.rstrip().endswith("</answer>")
    return float(tags == ["<answer>", "</answer>"] and ends and bool(last_tagged(completion)))


FORMAT_REWARDS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {"boxed": boxed, "answer_tag": answer_tag}
)
"""By the name in the configuration. Called like a reward function of the user."""
