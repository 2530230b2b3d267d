"""Exact pass rates: the probability of the one completion that passes, without sampling.

The task of the experiment (task.py) accepts a completion only if its text equals the answer. The
tokenizer of the quickstart's model has one token per character, and special tokens decode to
nothing. A completion may have one token more than the answer, and a truncated one does not pass. So
exactly one token string passes: the answer and the end of sequence. Its probability at temperature
1 and top-p 1 is the pass rate, and one forward pass computes it (`exact_only` refuses other
settings).

Shape legend: Q prompts, C prompts of a chunk, L tokens, A answer tokens with the end of sequence.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from speed_async.config.schema import Config
from speed_async.types import Prompt

CHUNK = 512


class ExactScorer:
    """Pass rates of fixed prompts under any checkpoint of one model."""

    def __init__(self, tokenizer_folder: Path, prompts: Sequence[Prompt]) -> None:
        """ValueError if the tokenizer does not have one token per character, or if prompts or
        answers differ in length."""
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        texts = [f"{p.text}{p.answer}{tokenizer.eos_token}" for p in prompts]
        rows = tokenizer(texts)["input_ids"]
        self._num_answer_tokens = len(prompts[0].answer) + 1
        num_special = 1 + int(rows[0][0] == tokenizer.bos_token_id)
        lengths = {(len(p.text), len(p.answer)) for p in prompts}
        num_characters = len(prompts[0].text) + len(prompts[0].answer)
        if len(lengths) > 1 or {len(row) for row in rows} != {num_characters + num_special}:
            raise ValueError(
                f"exact pass rates need prompts and answers of one length and one token per "
                f"character; lengths are {sorted(lengths)}: use another task or tokenizer"
            )
        self._tokens_QL = torch.tensor(rows)

    @torch.no_grad()
    def pass_rates(self, model_folder: Path) -> NDArray[np.float64]:
        """(Q,) exact pass rates at temperature 1."""
        model = AutoModelForCausalLM.from_pretrained(
            model_folder, local_files_only=True, dtype=torch.float32
        ).eval()
        num_answer = self._num_answer_tokens
        rates = []
        for tokens_CL in self._tokens_QL.split(CHUNK):
            logits_CAV = model(input_ids=tokens_CL[:, :-1]).logits[:, -num_answer:]
            answers_CA1 = tokens_CL[:, -num_answer:, None]
            logprobs_CA = logits_CAV.log_softmax(-1).gather(-1, answers_CA1)[..., 0]
            rates.append(logprobs_CA.double().sum(-1).exp())
        return torch.cat(rates).numpy()


def exact_only(config: Config, num_answer_characters: int) -> None:
    """ValueError unless exactly one token string passes at the sampling of `config`."""
    needed = {
        "actors.temperature": (config.actors.temperature, 1.0),
        "actors.max_new_tokens": (config.actors.max_new_tokens, num_answer_characters + 1),
        "task.score_truncated": (config.task.score_truncated, False),
    }
    for field, (value, exact) in needed.items():
        if value != exact:
            raise ValueError(f"{field} = {value}: exact pass rates need {exact}")
