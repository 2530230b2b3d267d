"""Make a tiny model and arithmetic word problems in the schema of GSM8K, for the tiny recipe.

    python examples/recipes/tiny/make.py runs/tiny      less than a minute on a CPU

Writes train.jsonl and test.jsonl (`question`, and `answer` ending in `#### N`) and model/, a Llama
of 0.13 M parameters. The model is pre-trained on other draws of the same problems, in many of which
the completion gives no answer, so that it solves some kinds of problems often and others rarely.
Reinforcement learning then raises the accuracy.

Shape legend: B sequences, L tokens of a padded sequence.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_TRAIN, NUM_TEST = 2000, 200
MAX_NUMBER = 6
NUM_STEPS, BATCH_SIZE, PEAK_LR = 250, 32, 5e-3
PROMPT = "{question}\nPut the answer in \\boxed{{}}."
"""The same text as `task.format` in config.toml."""
NO_ANSWER = "How many?"
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "stones")
SPECIAL = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of problem about two numbers, `large` >= `small`."""

    question: str
    solution: str
    share_answered: float
    """Share of problems that the pre-training text answers."""


KINDS = {
    "+": Kind(
        question="{name} has {large} {things} and buys {small} more. How many {things} does {name} "
        "have now?",
        solution="{name} has {large} + {small} = <<{large}+{small}={result}>>{result} {things}.",
        share_answered=0.7,
    ),
    "-": Kind(
        question="{name} has {large} {things} and gives away {small}. How many {things} does "
        "{name} have left?",
        solution="{name} has {large} - {small} = <<{large}-{small}={result}>>{result} {things}.",
        share_answered=0.4,
    ),
    "*": Kind(
        question="{name} fills {large} boxes with {small} {things} each. How many {things} does "
        "{name} have?",
        solution="There are {large} * {small} = <<{large}*{small}={result}>>{result} {things}.",
        share_answered=0.15,
    ),
}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    question: str
    solution: str
    result: int
    share_answered: float

    @property
    def row(self) -> dict[str, str]:
        """The row of a file of GSM8K."""
        return {"question": self.question, "answer": f"{self.solution}\n#### {self.result}"}


def draw_problem(rng: random.Random) -> Problem:
    symbol = rng.choice(list(KINDS))
    small, large = sorted((rng.randint(1, MAX_NUMBER), rng.randint(1, MAX_NUMBER)))
    result = OPERATIONS[symbol](large, small)
    values = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    values |= {"large": str(large), "small": str(small), "result": str(result)}
    kind = KINDS[symbol]
    return Problem(
        question=kind.question.format(**values),
        solution=kind.solution.format(**values),
        result=result,
        share_answered=kind.share_answered,
    )


def draw_rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Different problems."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = draw_problem(rng)
        rows[problem.question] = problem.row
    return list(rows.values())


def write_problems(folder: Path, seed: int) -> None:
    rows = draw_rows(random.Random(seed), NUM_TRAIN + NUM_TEST)
    for name, part in (("train", rows[:NUM_TRAIN]), ("test", rows[NUM_TRAIN:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def pretraining_text(rng: random.Random) -> tuple[str, str]:
    """A prompt and a completion: the answer, or none."""
    problem = draw_problem(rng)
    answered = rng.random() < problem.share_answered
    completion = f"\\boxed{{{problem.result}}}" if answered else NO_ANSWER
    return PROMPT.format(question=problem.question), completion


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE: frequent words are one token, digits are single tokens, and any text can be
    encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(pretraining_text(rng)) for _ in range(2000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids: dict[str, Any] = {
        f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos")
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
    return model


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """(tokens_BL, labels_BL); the label is -100 at prompt and padding."""
    rows: list[tuple[list[int], int]] = []
    for prompt, completion in (pretraining_text(rng) for _ in range(BATCH_SIZE)):
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = tokenizer(completion + "<eos>", add_special_tokens=False)["input_ids"]
        rows.append((prompt_ids + completion_ids, len(prompt_ids)))
    length = max(len(ids) for ids, _ in rows)
    tokens_BL = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels_BL = torch.full_like(tokens_BL, -100)
    for labels_L, (ids, num_prompt) in zip(labels_BL, rows, strict=True):
        labels_L[num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return tokens_BL, labels_BL


def pretrain(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=NUM_STEPS)
    for step in range(NUM_STEPS):
        tokens_BL, labels_BL = next(batches)
        loss = model(input_ids=tokens_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == NUM_STEPS - 1:
            print(f"step {step:4d} of {NUM_STEPS}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the problems and the model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_problems(args.folder, args.seed)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed + 1)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer)
    pretrain(model, (draw_batch(rng, tokenizer) for _ in range(NUM_STEPS)))
    model.save_pretrained(args.folder / "model")
    tokenizer.save_pretrained(args.folder / "model")
    print(f"{model.num_parameters():,} parameters in {args.folder / 'model'}")


if __name__ == "__main__":
    main()
