"""When a completion of an evaluation enters the engine."""

import asyncio
from collections.abc import Coroutine

import numpy as np

from speed_async.actors.evaluation_gate import EvaluationGate
from speed_async.types import Sampled


class Engine:
    """Requests that return when the test says so."""

    def __init__(self, gate: EvaluationGate) -> None:
        self._gate = gate
        self._running: dict[str, asyncio.Future[int]] = {}
        self.tasks: dict[str, asyncio.Task[Sampled]] = {}

    async def start(self, name: str, *, gives_way: bool = False) -> None:
        async def generate() -> Sampled:
            self._running[name] = asyncio.get_running_loop().create_future()
            num_tokens = await self._running[name]
            return Sampled(
                token_ids=np.zeros(num_tokens, np.int32),
                logprobs=np.zeros(num_tokens, np.float32),
                policy_versions=np.zeros(num_tokens, np.int32),
                finish_reason="stop",
            )

        running = self._gate.run(generate, gives_way=gives_way)
        self.tasks[name] = asyncio.create_task(running)
        await settle()

    async def finish(self, name: str, num_tokens: int) -> None:
        self._running.pop(name).set_result(num_tokens)
        await self.tasks[name]
        await settle()

    @property
    def running(self) -> list[str]:
        return sorted(self._running)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


def test_an_evaluation_takes_free_slots_and_no_others() -> None:
    async def scenario() -> None:
        engine = Engine(EvaluationGate(num_slots=2, max_share=0.05))
        await engine.start("training")
        await engine.start("first", gives_way=True)
        await engine.start("second", gives_way=True)
        assert engine.running == ["first", "training"]
        await engine.start("more training")  # is not held back
        await engine.finish("training", 3)
        assert engine.running == ["first", "more training"]
        await engine.finish("more training", 3)
        assert engine.running == ["first", "second"]

    run(scenario())


def test_an_evaluation_gets_its_share_when_no_slot_is_free() -> None:
    async def scenario() -> None:
        engine = Engine(EvaluationGate(num_slots=1, max_share=0.25))
        await engine.start("busy")
        for name in ("a", "b", "c"):
            await engine.start(name, gives_way=True)
        for name in ("one", "two"):
            await engine.start(name)
            await engine.finish(name, 10)
        # An evaluation of 10 tokens beside 20 tokens of training would be a third of all tokens.
        assert engine.running == ["busy"]
        await engine.start("three")
        await engine.finish("three", 10)
        assert engine.running == ["a", "busy"]  # 10 of 40
        await engine.finish("a", 10)
        assert engine.running == ["busy"]  # 20 of 50 would be too many
        await engine.start("four")
        await engine.finish("four", 30)
        assert engine.running == ["b", "busy"]  # 20 of 80

    run(scenario())


def test_evaluations_in_free_slots_do_not_use_up_the_share() -> None:
    async def scenario() -> None:
        engine = Engine(EvaluationGate(num_slots=1, max_share=0.5))
        await engine.start("free", gives_way=True)
        await engine.finish("free", 1000)
        await engine.start("busy")
        await engine.start("charged", gives_way=True)
        assert engine.running == ["busy", "charged"]

    run(scenario())


def test_a_closed_gate_lets_everything_pass_and_a_cancelled_wait_takes_no_slot() -> None:
    async def scenario() -> None:
        gate = EvaluationGate(num_slots=1, max_share=0.05)
        engine = Engine(gate)
        await engine.start("busy")
        await engine.start("cancelled", gives_way=True)
        await engine.start("next", gives_way=True)
        engine.tasks["cancelled"].cancel()
        await settle()
        await engine.finish("busy", 1)
        assert engine.running == ["next"]
        await engine.start("waiting", gives_way=True)
        gate.close()
        await settle()
        assert engine.running == ["next", "waiting"]

    run(scenario())
