r"""Named settings of an evaluation: prompt, sampling, and samples per suite."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PLAIN_FORMAT = "{prompt} " + INSTRUCTION
QWEN_MATH_FORMAT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Settings that an option of the command, or of a suite, overrides."""

    name: str
    temperature: float
    format: str
    """Prompt text; `{prompt}` stands for the question."""
    chat_template: bool
    """Whether the text is one user message of the tokenizer's chat template. False: `format`
    already holds all special tokens."""
    max_new_tokens: int
    samples: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Samples per prompt, by suite; 1 for other suites."""
    suites: tuple[str, ...] = ()
    """Suites of the protocol, for an evaluation that names none."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens in `format`. A tokenizer without them encodes them as text."""

    def num_samples(self, suite: str) -> int:
        return self.samples.get(suite, 1)


SPEED_PAPER = Protocol(
    name="speed-paper",
    temperature=1.0,
    format=PLAIN_FORMAT,
    chat_template=True,
    max_new_tokens=3072,
    samples=MappingProxyType({"amc23": 4, "aime24": 16, "aime25": 16}),
    suites=("dapo1k", "math500", "amc23", "aime24", "aime25"),
)
"""arXiv 2506.09016: temperature 1; DAPO-1k and MATH500 mean@1, AMC23 mean@4, AIME mean@16."""
QWEN_MATH = Protocol(
    name="qwen-math",
    temperature=0.0,
    format=QWEN_MATH_FORMAT,
    chat_template=False,
    max_new_tokens=2048,
    suites=("math500", "amc23", "aime24"),
    special_tokens=("<|im_start|>", "<|im_end|>"),
)
"""The `qwen25-math-cot` prompt of Qwen2.5-Math's evaluation code, one greedy sample."""
GREEDY = Protocol(
    name="greedy",
    temperature=0.0,
    format=PLAIN_FORMAT,
    chat_template=True,
    max_new_tokens=3072,
    suites=SPEED_PAPER.suites,
)
"""One greedy sample of each prompt, with the prompt of `speed-paper`."""
PROTOCOLS = {each.name: each for each in (SPEED_PAPER, QWEN_MATH, GREEDY)}
