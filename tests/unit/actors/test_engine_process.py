"""The engine in a separate process: the engine contract, start-up and process failures."""

import asyncio
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from speed_async.actors.engine import EngineStats, UpdateReport
from speed_async.actors.stepped_engine import process as engine_process
from speed_async.actors.stepped_engine.core import (
    IterationInput,
    IterationResult,
    LoadWeights,
    Pause,
    Resume,
)
from speed_async.actors.stepped_engine.engine import SteppedEngine
from speed_async.actors.stepped_engine.frames import (
    pack_input,
    pack_result,
    unpack_input,
    unpack_result,
)
from speed_async.actors.stepped_engine.process import ProcessWorker
from speed_async.actors.stepped_engine.stepper import FinishedRequest, Stepper
from speed_async.errors import DeadlineExceeded, IncarnationLost, ModelError, SpeedAsyncError
from speed_async.testing.scripted_engine import ScriptedStepper
from speed_async.types import Sampled, WeightOffer
from tests.fakes.engine_contract import (
    CONTRACT,
    NUM_TOKEN_IDS,
    WAIT_S,
    contract_script,
    gather,
    offer,
    request,
    start_all,
    until,
)

CONTEXT_LENGTH = 96
STEP_S = 0.01
"""Long enough for the parent to observe running sequences."""


class SlowStepper(ScriptedStepper):
    def step(self) -> list[FinishedRequest]:
        time.sleep(STEP_S)
        return super().step()


def slow_stepper(receive: Callable[[WeightOffer], float] = lambda _: 0.0) -> SlowStepper:
    return SlowStepper(
        contract_script,
        num_slots=2,
        context_length=CONTEXT_LENGTH,
        num_token_ids=NUM_TOKEN_IDS,
        receive=receive,
    )


def forked(make_stepper: Callable[[], Stepper], load_timeout_s: float = WAIT_S) -> ProcessWorker:
    return ProcessWorker(make_stepper, load_timeout_s=load_timeout_s, fork=True)


def start(make_stepper: Callable[[], Stepper] = slow_stepper) -> SteppedEngine:
    return SteppedEngine(forked(make_stepper))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_engine_process_satisfies_the_contract(check) -> None:
    asyncio.run(check(start))


def test_spawned_process_generates() -> None:
    """With a GPU, the process is spawned and receives the pickled factory."""

    async def run() -> None:
        worker = ProcessWorker(slow_stepper, load_timeout_s=WAIT_S, fork=False)
        async with SteppedEngine(worker) as engine:
            [sampled] = await gather(start_all(engine, [request(7)]))
        assert sampled.num_tokens == 7
        assert not worker.process.is_alive()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [("auto", False, True), ("cpu", True, True), ("auto", True, False), ("cuda", True, False)],
)
def test_engine_with_cuda_is_not_forked(
    monkeypatch, tmp_path: Path, device: str, has_gpu: bool, expected: bool
) -> None:
    monkeypatch.setattr(engine_process.sys, "platform", "linux")
    monkeypatch.setattr(
        engine_process, "NVIDIA_DEVICE", tmp_path if has_gpu else tmp_path / "absent"
    )
    assert engine_process.may_fork(device) is expected


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_raises_given_up_in_every_call(signal_number) -> None:
    async def run() -> None:
        worker = forked(slow_stepper)
        async with SteppedEngine(worker) as engine:
            [task] = start_all(engine, [request(90)])
            await until(engine, lambda: engine.stats.num_running == 1)
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal_number)
            with pytest.raises(
                IncarnationLost, match=rf"engine process died \({signal_number.name}\)"
            ):
                await gather([task])
            with pytest.raises(IncarnationLost, match="engine process died"):
                await engine.update_weights(offer(1))

    asyncio.run(run())


def test_load_error_is_raised_on_enter() -> None:
    def fail() -> Stepper:
        raise ModelError("model folder nowhere does not exist: set model.path")

    async def run() -> None:
        with pytest.raises(ModelError, match="nowhere does not exist"):
            async with start(fail):
                pass

    asyncio.run(run())


def test_hanging_load_raises_at_its_deadline() -> None:
    def hang() -> Stepper:
        time.sleep(1000)
        raise AssertionError

    async def run() -> None:
        worker = forked(hang, load_timeout_s=0.2)
        with pytest.raises(DeadlineExceeded, match="the engine process: loading the model"):
            async with SteppedEngine(worker):
                pass
        assert not worker.process.is_alive()

    asyncio.run(run())


def test_error_in_a_step_is_reported_with_its_type(capfd) -> None:
    class Faulty(SlowStepper):
        def step(self) -> list[FinishedRequest]:
            raise ZeroDivisionError("scripted")

    def make() -> Stepper:
        return Faulty(lambda *_: [1], num_slots=1, context_length=8, receive=lambda _: 0.0)

    async def run() -> None:
        async with start(make) as engine:
            with pytest.raises(SpeedAsyncError, match="ZeroDivisionError: scripted"):
                await gather(start_all(engine, [request(2, num_prompt=3)]))

    asyncio.run(run())
    assert "Traceback" in capfd.readouterr().err


def test_process_exits_when_its_actor_is_killed() -> None:
    """Even during an iteration, and although no process joins it."""

    def act(connection) -> None:
        multiprocessing.current_process().daemon = False  # daemons cannot have children

        async def run() -> None:
            worker = forked(slow_stepper)
            async with SteppedEngine(worker) as engine:
                start_all(engine, [request(90)])
                await until(engine, lambda: engine.stats.num_running == 1)
                connection.send(worker.process.pid)
                await asyncio.sleep(WAIT_S)

        asyncio.run(run())

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    actor = context.Process(target=act, args=(sender,))
    actor.start()
    assert receiver.poll(WAIT_S)
    engine_id = receiver.recv()
    actor.kill()
    actor.join(WAIT_S)
    deadline_s = time.monotonic() + WAIT_S
    while os.path.exists(f"/proc/{engine_id}") and not is_zombie(engine_id):
        assert time.monotonic() < deadline_s, "the engine process outlived its actor"
        time.sleep(0.01)


def test_idle_process_exits_when_its_actor_exits_with_unread_results() -> None:
    """Closing a socket with unread bytes resets the connection."""
    worker = forked(slow_stepper)
    actor_end = worker._socket  # pyright: ignore[reportPrivateUsage]
    assert select.select([actor_end], [], [], WAIT_S)[0], "the initial stats must be unread"
    actor_end.close()
    worker.process.join(WAIT_S)
    has_exited = not worker.process.is_alive()
    worker.process.kill()
    assert has_exited, "the engine process outlived its actor"


def is_zombie(process_id: int) -> bool:
    """Whether the process has exited but was not reaped."""
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_frames_round_trip_inputs_and_results() -> None:
    inputs = IterationInput(
        arrivals=[(3, request(5, priority=1)), (4, request(7))],
        cancelled=[2],
        commands=[LoadWeights(offer=offer(9)), Pause(abort=True), Resume()],
    )
    unpacked = unpack_input(pack_input(inputs))
    assert unpacked.cancelled == [2] and unpacked.commands == inputs.commands
    pairs = zip(inputs.arrivals, unpacked.arrivals, strict=True)
    for (sent_key, sent), (received_key, received) in pairs:
        assert received_key == sent_key and received.prompt_token_ids.dtype == np.int32
        assert received.prompt_token_ids.tolist() == sent.prompt_token_ids.tolist()
        assert (received.max_new_tokens, received.priority) == (sent.max_new_tokens, sent.priority)

    sampled = Sampled(
        token_ids=np.array([1, 2], np.int32),
        logprobs=np.array([-0.25, -1.5], np.float32),
        policy_versions=np.array([4, 5], np.int32),
        finish_reason="stop",
    )
    stats = EngineStats(
        tokens_generated=9,
        tokens_running=1,
        num_running=1,
        num_waiting=0,
        num_slots=2,
        policy_version=5,
        steps=8,
        sampling_s=0.5,
        updating_s=0.25,
    )
    report = UpdateReport(policy_version=5, transfer_s=0.125, pause_s=0.25)
    result = unpack_result(
        pack_result(
            IterationResult(
                finished=[FinishedRequest(key=3, sampled=sampled)],
                answers=[report, None, DeadlineExceeded("rank 0", "a bucket", 2.0)],
                tokens_cancelled=6,
                stats=stats,
            )
        )
    )
    assert result.stats == stats and result.tokens_cancelled == 6
    assert result.answers[:2] == [report, None]
    assert isinstance(result.answers[2], DeadlineExceeded)
    assert str(result.answers[2]) == "waited 2.0 s for rank 0: a bucket"
    [finished] = result.finished
    assert finished.key == 3 and finished.sampled.finish_reason == "stop"
    for name in ("token_ids", "logprobs", "policy_versions"):
        received, sent = getattr(finished.sampled, name), getattr(sampled, name)
        assert received.dtype == sent.dtype and received.tolist() == sent.tolist()
