"""What a verifier could not score is kept for people, and costs its own group alone."""

import asyncio
import json
import os
import resource
import signal
from functools import partial
from pathlib import Path

import numpy as np
from buffer_fixtures import make_config

from speed_async.actors.failed_completions import MAX_TEXT_CHARS, FailedCompletions
from speed_async.actors.rollout import LeaseWork, Refused, Rollout
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import TaskError
from speed_async.testing.scripted_engine import ScriptedEngine
from speed_async.types import Int32Array, Lease, LeaseKind, Prompt


class DeadlyTask:
    """A verifier that some prompts hang, kill or confuse."""

    train_prompts = tuple(
        Prompt(prompt_id=number, text=text, answer="")
        for number, text in enumerate(("fine", "hang", "die", "raise", "fine"))
    )
    held_out_prompts = ()

    def score(self, prompt: Prompt, completion: str) -> float:
        if prompt.text == "hang":
            while True:
                pass
        if prompt.text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.text == "raise":
            raise ValueError(f"cannot parse {completion!r}")
        return 0.0

    def extract(self, completion: str) -> str | None:
        return None


class Words:
    def encode(self, text: str) -> Int32Array:
        return np.array([len(text)], np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return " ".join(map(str, token_ids.tolist()))


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_completion_that_hangs_or_kills_its_verifier_fails_and_is_kept(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))
    kept = FailedCompletions(tmp_path / "failed" / "actor-1.jsonl")
    task = DeadlyTask()

    async def play() -> list[object]:
        engine = ScriptedEngine(lambda request, number: [7, 8, number], num_slots=8)
        pool = VerifierPool(partial(DeadlyTask), 1, 1.0)
        async with pool, engine:
            rollout = Rollout(config, engine, pool, Words(), failures=kept)
            ends: list[object] = []
            for prompt in task.train_prompts:
                lease = Lease(
                    lease_id=prompt.prompt_id,
                    prompt_id=prompt.prompt_id,
                    kind=LeaseKind.TRAINING,
                )
                try:
                    ends.append(await rollout.run(LeaseWork(lease=lease), prompt))
                except TaskError as error:
                    ends.append(str(error))
            return ends

    fine, hung, died, raised, fine_again = asyncio.run(asyncio.wait_for(play(), 60))
    assert fine == fine_again == Refused(num_passed=0)
    assert isinstance(hung, str) and "gave no answer within 1 s" in hung
    assert isinstance(died, str) and "ended its worker process" in died
    assert isinstance(raised, str) and "ValueError: cannot parse '7 8 6'" in raised
    assert records(tmp_path / "failed" / "actor-1.jsonl") == [
        {
            "prompt_id": number,
            "held_out": False,
            "prompt": text,
            "completions": [f"7 8 {2 * number}", f"7 8 {2 * number + 1}"],
            "error": error,
        }
        for number, text, error in ((1, "hang", hung), (2, "die", died), (3, "raise", raised))
    ]
    assert (kept.num_kept, kept.num_dropped) == (3, 0)


def test_the_file_is_bounded_and_the_first_failures_stay(tmp_path: Path) -> None:
    path = tmp_path / "failed" / "actor-1.jsonl"
    prompt = Prompt(prompt_id=0, text="p", answer="")
    first = FailedCompletions(path, max_file_bytes=1000)
    for number in range(20):
        first.keep(prompt, [f"completion {number}"], "no")
    assert 0 < first.num_kept < 20
    assert first.num_dropped == 20 - first.num_kept
    assert path.stat().st_size <= 1000
    again = FailedCompletions(path, max_file_bytes=1000)  # the next incarnation
    again.keep(prompt, ["late " * 100], "no")
    assert (again.num_kept, again.num_dropped) == (0, 1)
    assert [record["completions"] for record in records(path)] == [
        [f"completion {number}"] for number in range(first.num_kept)
    ]


def test_a_long_text_is_cut_and_a_strange_one_is_still_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    kept = FailedCompletions(path)
    kept.keep(
        Prompt(prompt_id=0, text="p\n\u2028\ud800", answer="", held_out=True),
        ["x" * (MAX_TEXT_CHARS + 7)],
        "no",
    )
    [record] = records(path)
    assert record["prompt"] == "p\n\u2028\ud800"
    [text] = record["completions"]  # pyright: ignore[reportGeneralTypeIssues]
    assert text.endswith("x ... (7 more characters)")


def test_a_full_disk_costs_the_record_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "failed" / "actor-1.jsonl"
    kept = FailedCompletions(path)
    prompt = Prompt(prompt_id=0, text="p", answer="")
    kept.keep(prompt, ["short"], "no")
    before = path.read_bytes()
    # The kernel cuts writes at this size, as it does where a disk is full.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        kept.keep(prompt, ["long " * 100], "no")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (kept.num_kept, kept.num_dropped) == (1, 1)
    assert path.read_bytes() == before
    kept.keep(prompt, ["after"], "no")
    assert len(records(path)) == 2
    nowhere = FailedCompletions(path / "below" / "a file")
    nowhere.keep(prompt, ["x"], "no")
    assert nowhere.num_dropped == 1
