"""Create quickstart/model: a tiny Llama that adds digits well and handles carries badly.

It is pre-trained on sums in which most carries are missing, so its pass rate at temperature 1
falls with the number of carries: a third of the quickstart's prompts are nearly always solved,
a third nearly never, and the rest sometimes. Reinforcement learning can teach the carry.

    python scripts/make_quickstart_model.py            train, save, check (two minutes, two cores)
    python scripts/make_quickstart_model.py --check    only check the saved folder

Shape legend: B sequences, P prompt tokens, T completion tokens, Q prompts, S samples per prompt.
"""

import argparse
import math
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache

from speed_async.environments.arithmetic import ArithmeticTask, draw_sum, level_cycle
from speed_async.types import Prompt

FOLDER = Path(__file__).resolve().parents[1] / "quickstart" / "model"
NUM_DIGITS = 4
CARRY_KEPT = 0.3
"""Probability that a carry in the pre-training text is kept; independent per carry."""
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

NUM_STEPS = 800
BATCH_SIZE = 192
PEAK_LR = 2e-3
NUM_WARMUP_STEPS = 50

NUM_CHECK_PROMPTS = 480
NUM_CHECK_SAMPLES = 64
LOW, HIGH = 0.05, 0.80
MIN_SHARE_LOW = MIN_SHARE_HIGH = 0.28


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII. The beginning of sequence is added."""
    alphabet = [*SPECIAL, *string.digits, "+", "=", " ", "\n"]
    alphabet += [c for c in map(chr, range(33, 127)) if c not in alphabet]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    pad, bos, eos = map(SPECIAL.index, ("<pad>", "<bos>", "<eos>"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        # Untied, so that engines that pack the output matrix need not refresh it after each update.
        tie_word_embeddings=False,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos
    )
    return model


def answer_with_missing_carries(rng: random.Random, text: str) -> str:
    """The answer to `text` with each carry kept with probability CARRY_KEPT.

    A missing carry affects only its own digit, so K carries are right with CARRY_KEPT ** K.
    """
    left, right = text.rstrip("=").split("+")
    answer, carry = "", 0
    for a, b in zip(map(int, left + "0"), map(int, right + "0"), strict=True):
        kept = carry if rng.random() < CARRY_KEPT else 0
        answer += str((a + b + kept) % 10)
        carry = int(a + b + carry >= 10)
    return answer


def draw_batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, int]]:
    """Endless (token ids (B, P + T), P). All sums have equal length, so there is no padding."""
    levels = level_cycle(rng, NUM_DIGITS)
    while True:
        texts = [
            draw_sum(rng, num_digits=NUM_DIGITS, num_carries=next(levels))[0]
            for _ in range(BATCH_SIZE)
        ]
        rows = [f"{text}{answer_with_missing_carries(rng, text)}<eos>" for text in texts]
        num_prompt_tokens = len(tokenizer(texts[0])["input_ids"])
        yield torch.tensor(tokenizer(rows)["input_ids"]), num_prompt_tokens


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine decay to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
    return PEAK_LR * warmup * (0.05 + 0.95 * cosine)


def pretrain(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    model.train()
    for step, (tokens_BL, num_prompt) in zip(range(NUM_STEPS), batches, strict=False):
        logits_BTV = model(input_ids=tokens_BL[:, :-1]).logits[:, num_prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BL[:, num_prompt:].flatten()
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts_BP: Tensor, num_tokens: int) -> Tensor:
    """(B, T) token ids at temperature 1."""
    cache, tokens_B1, sampled = DynamicCache(), prompts_BP, []
    for _ in range(num_tokens):
        logits_BV = model(input_ids=tokens_B1, past_key_values=cache).logits[:, -1]
        tokens_B1 = torch.multinomial(logits_BV.softmax(-1), 1)
        sampled.append(tokens_B1)
    return torch.cat(sampled, dim=1)


def pass_rates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: tuple[Prompt, ...]
) -> Tensor:
    """(Q,) share of samples that equal the answer followed by the end of sequence."""
    model.eval()
    rates = []
    for start in range(0, len(prompts), 16):
        chunk = prompts[start : start + 16]
        prompts_QP = torch.tensor(tokenizer([p.text for p in chunk])["input_ids"])
        answers = tokenizer([f"{p.answer}<eos>" for p in chunk])["input_ids"]
        answers_QT = torch.tensor(answers)[:, 1:]
        tokens_BP = prompts_QP.repeat_interleave(NUM_CHECK_SAMPLES, dim=0)
        tokens_BT = sample(model, tokens_BP, answers_QT.shape[1])
        tokens_QST = tokens_BT.view(len(chunk), NUM_CHECK_SAMPLES, -1)
        rates.append((tokens_QST == answers_QT[:, None]).all(-1).float().mean(-1))
    return torch.cat(rates)


def check(folder: Path) -> bool:
    """Print the spread of pass rates of a saved folder. Returns True if it is wide enough."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = cast(
        LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    )
    task = ArithmeticTask(
        num_prompts=NUM_CHECK_PROMPTS, num_held_out=0, max_digits=NUM_DIGITS, seed=0
    )
    torch.manual_seed(0)
    rates_Q = pass_rates(model, tokenizer, tuple(task.train_prompts))
    low, high = (rates_Q < LOW).float().mean().item(), (rates_Q > HIGH).float().mean().item()
    print(f"{len(rates_Q)} prompts x {NUM_CHECK_SAMPLES} samples, temperature 1")
    for tenth, count in enumerate(torch.histc(rates_Q, bins=10, min=0, max=1).int().tolist()):
        print(f"  pass rate from {tenth / 10:.1f}: {count:4d} {'#' * (count // 4)}")
    for level in sorted({p.level for p in task.train_prompts}):
        chosen = torch.tensor([p.level == level for p in task.train_prompts])
        print(f"  {level}: mean {rates_Q[chosen].mean():.3f} of {int(chosen.sum())}")
    print(f"mean {rates_Q.mean():.3f}; below {LOW:.2f}: {low:.1%}; above {HIGH:.2f}: {high:.1%}")
    wide = low >= MIN_SHARE_LOW and high >= MIN_SHARE_HIGH
    print("spread wide enough" if wide else f"TOO NARROW: both need {MIN_SHARE_LOW:.0%}")
    return wide


def main() -> int:
    parser = argparse.ArgumentParser(description="Create or check the quickstart's model.")
    parser.add_argument("--check", action="store_true", help="only measure the saved folder")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if not args.check:
        torch.manual_seed(args.seed)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        pretrain(model, draw_batches(random.Random(args.seed), tokenizer))
        model.save_pretrained(args.folder)
        tokenizer.save_pretrained(args.folder)
    return 0 if check(args.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
