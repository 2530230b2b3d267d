"""The command `data show`: the prompts of a configuration as the engine gets them."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from speed_async.commands.training import PASS_THROUGH, WithOverrides
from speed_async.config.load import load_config
from speed_async.types import Prompt, Verdict

if TYPE_CHECKING:
    from speed_async.config.schema import Config


@click.command(cls=WithOverrides, context_settings=PASS_THROUGH)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--num", type=click.IntRange(min=1), default=3, show_default=True, help="Number of prompts."
)
def show(config: str, overrides: tuple[str, ...], num: int) -> None:
    """Print prompts of CONFIG exactly as the engine gets them.

    Shows the sources of the data, and for the first training prompts: the text with special tokens
    and the chat template, its number of tokens, the answer, and what the verifier says to a right
    answer alone, in a box and in a sentence, and to a wrong answer: scored as in training, with
    the rewards and the time limit of CONFIG.
    """
    from speed_async.actors.model_folder import load_tokenizer
    from speed_async.actors.prompt_codec import configured_codec
    from speed_async.config.local_model import model_folder
    from speed_async.environments.registry import make_task
    from speed_async.environments.task import StoredTask

    resolved = load_config(config, overrides)
    tokenizer = load_tokenizer(model_folder(resolved.model.path))
    codec = configured_codec(tokenizer, resolved.model)
    task = make_task(resolved.task)
    if isinstance(task, StoredTask):
        for line in (*task.notes, *(f"warning: {warning}" for warning in task.warnings)):
            click.echo(line)
    train, held_out = len(task.train_prompts), len(task.held_out_prompts)
    click.echo(f"{train:,} training prompts, {held_out:,} held out")
    prompts = task.train_prompts[:num]
    scored = asyncio.run(_scored(resolved, prompts))
    for prompt, verdicts in zip(prompts, scored, strict=True):
        ids = codec.encode(prompt.text).tolist()
        limit = resolved.task.max_prompt_tokens
        left_out = (
            "" if limit is None or len(ids) <= limit else ", left out: task.max_prompt_tokens"
        )
        click.echo(f"\n--- training prompt {prompt.prompt_id}: {len(ids)} tokens{left_out} ---")
        click.echo(_visible(tokenizer, ids))
        level = f" (level {prompt.level})" if prompt.level else ""
        click.echo(f"answer: {prompt.answer!r}{level}")
        for (what, _), verdict in zip(made_up_completions(prompt.answer), verdicts, strict=True):
            click.echo(f"  {what}: {_described(verdict)}")


def made_up_completions(answer: str) -> tuple[tuple[str, str], ...]:
    """Completions by what they are: a right answer alone, in a box and without one, and a wrong
    one."""
    return (
        ("right, alone", answer),
        ("right, in a box", f"The answer is \\boxed{{{answer}}}."),
        ("right, in a sentence", f"The answer is {answer}"),
        ("wrong", f"The answer is \\boxed{{{answer}7}}."),
    )


def _visible(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of the token ids, special tokens included; control characters are escaped."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


async def _scored(config: "Config", prompts: Sequence[Prompt]) -> list[list[Verdict]]:
    """Verdicts on the made-up completions of each prompt. Raises TaskError when the verifier cannot
    start."""
    from speed_async.environments.registry import make_task
    from speed_async.environments.verifier import VerifierPool

    pool = VerifierPool(
        partial(make_task, config.task),
        1,
        config.actors.verifier_timeout_s,
        rewards=config.task.weighted_rewards,
    )
    async with pool:
        return [
            await pool.score(prompt, [text for _, text in made_up_completions(prompt.answer)])
            for prompt in prompts
        ]


def _described(verdict: Verdict) -> str:
    if verdict.outcome != "scored":
        return f"{verdict.outcome}, the verifier {verdict.error}"
    parts = ", ".join(f"{name} {value:g}" for name, value in verdict.parts.items())
    shown = f" ({parts}; {'passes' if verdict.passed else 'does not pass'})" if parts else ""
    return f"reward {verdict.reward:g}{shown}, extracted {verdict.extracted!r}"
