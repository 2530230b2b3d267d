"""Completions that the verifier fails to score are recorded and fail only their group."""

import asyncio
import json
import os
import resource
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from speed_async.actors.failed_completions import MAX_TEXT_CHARS, FailedCompletions
from speed_async.actors.rollout import LeaseProgress, Rollout
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import TaskError
from speed_async.testing.scripted_engine import ScriptedEngine
from speed_async.types import Int32Array, Lease, LeaseKind, Prompt, Verdict
from tests.fakes.buffer_fixtures import make_config
from tests.fakes.faulty_task import HANGS_S


class FaultyTask:
    """A task that hangs, dies or raises on some prompts."""

    train_prompts = tuple(
        Prompt(prompt_id=number, text=text, answer="")
        for number, text in enumerate(("fine", "hang", "die", "raise", "fine"))
    )
    held_out_prompts = ()

    def score(self, prompt: Prompt, completion: str) -> float:
        if prompt.text == "hang":
            time.sleep(HANGS_S)
        if prompt.text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.text == "raise":
            raise ValueError(f"cannot parse {completion!r}")
        return 0.0

    def extract(self, completion: str) -> str | None:
        return None


class IntCodec:
    def encode(self, text: str) -> Int32Array:
        return np.array([len(text)], np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        return " ".join(map(str, token_ids.tolist()))


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_completions_that_break_the_verifier_are_recorded(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = make_config(str(tmp_path))
    failures = FailedCompletions(tmp_path / "failed" / "actor-1.jsonl")
    task = FaultyTask()

    async def run_leases() -> list[object]:
        engine = ScriptedEngine(lambda request, number: [7, 8, number], num_slots=8)
        pool = VerifierPool(partial(FaultyTask), 1, 1.0)
        async with pool, engine:
            rollout = Rollout(config, engine, pool, IntCodec(), failures=failures)
            results: list[object] = []
            for prompt in task.train_prompts:
                lease = Lease(
                    lease_id=prompt.prompt_id,
                    prompt_id=prompt.prompt_id,
                    kind=LeaseKind.TRAINING,
                )
                try:
                    work = LeaseProgress(lease=lease)
                    results.append((await rollout.run(work, prompt), work.num_passed))
                except TaskError as error:
                    results.append(str(error))
            return results

    fine, hung, died, raised, fine_again = asyncio.run(asyncio.wait_for(run_leases(), 240))
    assert fine == fine_again == (None, 0)
    assert isinstance(hung, str) and "did not return within 1 s" in hung
    assert isinstance(died, str) and "ended its worker process" in died
    assert isinstance(raised, str) and "ValueError: cannot parse '7 8 6'" in raised
    assert hung.startswith("verifier timeout: 2 of 2 completions of training prompt 1: ")
    assert raised.startswith("verifier error: 2 of 2 completions of training prompt 3: ")
    found = records(tmp_path / "failed" / "actor-1.jsonl")
    assert [(each["prompt_id"], each["prompt"], each["completion"]) for each in found] == [
        (number, text, f"7 8 {2 * number + sample}")
        for number, text in ((1, "hang"), (2, "die"), (3, "raise"))
        for sample in range(2)
    ]
    assert found[0]["error"] == hung.partition("prompt 1: ")[2]
    assert found[5]["error"] == "raised ValueError: cannot parse '7 8 7'"
    assert (failures.num_recorded, failures.num_dropped) == (6, 0)


class EndedPool(VerifierPool):
    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[Verdict]:
        raise TaskError(f"the pool has ended, with {len(completions)} completions")


def test_completions_of_an_ended_pool_are_recorded_and_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    failures = FailedCompletions(tmp_path / "actor-1.jsonl")
    work = LeaseProgress(lease=Lease(lease_id=1, prompt_id=0, kind=LeaseKind.TRAINING))

    async def run_lease() -> None:
        pool = EndedPool(partial(FaultyTask), 1, 1.0)
        async with ScriptedEngine(lambda _request, number: [7, number], num_slots=8) as engine:
            rollout = Rollout(
                make_config(str(tmp_path)), engine, pool, IntCodec(), failures=failures
            )
            with pytest.raises(TaskError, match="the pool has ended, with 2 completions"):
                await rollout.run(work, FaultyTask().train_prompts[0])

    asyncio.run(run_lease())
    assert [outcome for _, outcome in work.verified] == ["error", "error"]
    assert failures.num_recorded == 2


def test_file_size_is_bounded_and_keeps_the_first_failures(tmp_path: Path) -> None:
    path = tmp_path / "failed" / "actor-1.jsonl"
    prompt = Prompt(prompt_id=0, text="p", answer="")
    first = FailedCompletions(path, max_file_bytes=1000)
    for number in range(20):
        first.record(prompt, [(f"completion {number}", "no")])
    assert 0 < first.num_recorded < 20
    assert first.num_dropped == 20 - first.num_recorded
    assert path.stat().st_size <= 1000
    second = FailedCompletions(path, max_file_bytes=1000)  # the next incarnation
    second.record(prompt, [("late " * 100, "no")])
    assert (second.num_recorded, second.num_dropped) == (0, 1)
    assert [record["completion"] for record in records(path)] == [
        f"completion {number}" for number in range(first.num_recorded)
    ]


def test_long_text_is_truncated_and_unusual_characters_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    failures = FailedCompletions(path)
    failures.record(
        Prompt(prompt_id=0, text="p\n\u2028\ud800", answer="", held_out=True),
        [("x" * (MAX_TEXT_CHARS + 7), "no")],
    )
    [record] = records(path)
    assert record["prompt"] == "p\n\u2028\ud800"
    assert str(record["completion"]).endswith("x ... (7 more characters)")


def test_full_disk_drops_the_record_only(tmp_path: Path) -> None:
    path = tmp_path / "failed" / "actor-1.jsonl"
    failures = FailedCompletions(path)
    prompt = Prompt(prompt_id=0, text="p", answer="")
    failures.record(prompt, [("short", "no")])
    before = path.read_bytes()
    # The kernel truncates writes at this size, as on a full disk.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        failures.record(prompt, [("long " * 100, "no")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (failures.num_recorded, failures.num_dropped) == (1, 1)
    assert path.read_bytes() == before
    failures.record(prompt, [("after", "no")])
    assert len(records(path)) == 2
    invalid_path = FailedCompletions(path / "below" / "a file")
    invalid_path.record(prompt, [("x", "no")])
    assert invalid_path.num_dropped == 1
