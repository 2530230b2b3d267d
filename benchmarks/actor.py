"""Compare a complete actor with the bare engine, in tokens per second as they are sampled.

actor   ActorLoop, Rollout and VerifierPool in this process, with the engine in another process and
        a ZeroMQ link to a real buffer service. Service, verifier and a stand-in learner are
        separate processes. The actor screens, gates, continues, scores, packs and reports; nothing
        is broadcast.
bare    a second engine with the same settings. It receives the actor's requests in the same order
        from twice as many callers as it has slots, so its queue never runs empty. Results are
        discarded: no loop, verifier, messages or decoding. With actors.engine = "vllm" this is
        vLLM's own AsyncLLM, called as its documentation shows.

Both are started and then measured alternately: one is paused between two steps while the other
runs. The ratio is taken within one repeat, so both see the same machine state.

`--random-model 512x8` uses a model of that hidden size and number of layers with random weights,
whose completions are as long as `actors.max_new_tokens` allows. Use it with --gate.mode off.

Usage: python -m benchmarks.actor [--repeats N] [--turn-s S] [--section.field value]
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import QUICKSTART, copy_tokenizer, report
from benchmarks.measured_engine import MeasuredEngine, RecordingEngine, Turn, measure_turn
from benchmarks.stand_in_learner import run_stand_in_learner
from speed_async.actors.engine import GenerationRequest
from speed_async.actors.loop import ActorLoop
from speed_async.actors.model_folder import load_tokenizer
from speed_async.actors.prompt_codec import configured_codec
from speed_async.actors.rollout import Rollout
from speed_async.config.load import load_config, save_config
from speed_async.config.schema import Config
from speed_async.environments.registry import make_task
from speed_async.environments.task import data_fingerprint
from speed_async.environments.verifier import VerifierPool
from speed_async.launcher.event_loop import run
from speed_async.launcher.identity.model_files import model_fingerprint
from speed_async.launcher.processes import start_role
from speed_async.launcher.roles.engine_choice import start_engine
from speed_async.launcher.roles.engine_environment import engine_environment
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport import messages as m
from speed_async.transport.session import SessionLink
from speed_async.transport.zeromq import open_link

WARM_UP_S = 4.0
CALLERS_PER_SLOT = 2
"""At least the actor's requests in flight, so that the bare engine is never emptier."""
END_TIMEOUT_S = 60.0


def bare_engine(config: Config) -> MeasuredEngine:
    if config.actors.engine == "vllm":
        from benchmarks.bare_vllm import BareVllm

        return BareVllm(config)
    return start_engine(config, index=2, incarnation=0)


@asynccontextmanager
async def running_actor(config: Config, engine: RecordingEngine) -> AsyncIterator[None]:
    """Run an actor on `engine`, past its first evaluation. It is drained on exit."""
    task = make_task(config.task)
    folder = RunFolder(path=Path(config.run.folder))
    save_config(config, folder.config)
    arguments = ["--config", str(folder.config), "--run-folder", str(folder.path)]
    service = await start_role("service", arguments, log=folder.log("service"))
    assert service.stdout is not None
    port = json.loads(await service.stdout.readline())["port"]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    model = model_fingerprint(Path(config.model.path), config.model)
    learner = context.Process(
        target=run_stand_in_learner,
        args=(port, data_fingerprint(task, {}), model, config.learner.groups_per_update, stop),
        daemon=True,
    )
    learner.start()
    link = SessionLink(await open_link("127.0.0.1", port, "actor-1.0"))
    actors = config.actors
    make = partial(make_task, config.task)
    verifier = VerifierPool(make, actors.verifier_workers, actors.verifier_timeout_s)
    tokenizer = load_tokenizer(Path(config.model.path))
    codec = configured_codec(tokenizer, config.model)
    async with verifier:
        rollout = Rollout(config, engine, verifier, codec)
        loop = ActorLoop(
            config, name="actor-1", link=link, engine=engine, rollout=rollout, task=task
        )
        hello = m.Hello(
            role="actor",
            index=1,
            incarnation=0,
            fingerprint=data_fingerprint(task, {}),
            model_fingerprint=model,
            process_id=os.getpid(),
        )
        loop_task = asyncio.create_task(loop.run(hello))
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait_for(loop_task, END_TIMEOUT_S)
            await link.close()
            await asyncio.wait_for(service.wait(), END_TIMEOUT_S)
            await asyncio.to_thread(learner.join, END_TIMEOUT_S)
    assert learner.exitcode == 0, "the stand-in learner failed"


@asynccontextmanager
async def replaying(
    engine: MeasuredEngine, recorded: list[GenerationRequest], num_callers: int
) -> AsyncIterator[None]:
    """`num_callers` callers that send the recorded requests to `engine` in an endless loop."""

    def endless() -> Iterator[GenerationRequest]:
        while True:
            yield from recorded  # grows concurrently

    requests = endless()

    async def call() -> None:
        for request in requests:
            await engine.generate(request)

    callers = [asyncio.create_task(call()) for _ in range(num_callers)]
    try:
        yield
    finally:
        for caller in callers:
            caller.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*callers)


async def compare(
    config: Config, actor: RecordingEngine, bare: MeasuredEngine, num_repeats: int, turn_s: float
) -> list[dict[str, object]]:
    engines: dict[str, MeasuredEngine] = {"actor": actor, "bare": bare}
    num_callers = CALLERS_PER_SLOT * config.actors.num_slots
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    async with actor, bare, running_actor(config, actor):
        await asyncio.sleep(WARM_UP_S)
        await actor.pause(abort=False)
        await bare.pause(abort=False)
        async with replaying(bare, actor.recorded, num_callers):
            await measure_turn(bare, WARM_UP_S / 4)
            for repeat in range(num_repeats):
                for name in sorted(engines, reverse=bool(repeat % 2)):
                    turns[name].append(await measure_turn(engines[name], turn_s))
    return [row_of(name, name_turns, turns["bare"]) for name, name_turns in turns.items()]


def row_of(name: str, turns: list[Turn], bare: list[Turn]) -> dict[str, object]:
    ratios = [turn.tokens_per_s / base.tokens_per_s for turn, base in zip(turns, bare, strict=True)]
    medians = {
        field: statistics.median(getattr(turn, field) for turn in turns)
        for field in ("tokens_per_s", "slots_busy", "steps_per_s", "slots_asked")
    }
    lower, _, upper = statistics.quantiles(ratios, n=4)
    return {
        "side": name,
        **medians,
        "over_bare": statistics.median(ratios),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "repeats": len(ratios),
    }


def save_random_model(folder: Path, size: str) -> Path:
    """A Llama with random weights, sized "HIDDENxLAYERS", and the quickstart's tokenizer."""
    hidden, layers = map(int, size.split("x"))
    copy_tokenizer(folder)
    known = AutoConfig.from_pretrained(QUICKSTART.parent / "model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=known.vocab_size,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=known.eos_token_id,
        )
    ).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--turn-s", type=float, default=4.0)
    parser.add_argument("--config", default=str(QUICKSTART))
    parser.add_argument("--random-model", default="", help="HIDDENxLAYERS")
    arguments, overrides = parser.parse_known_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        # Training leases start after the first evaluation, so keep it short.
        fixed = ["--run.folder", folder, "--task.num_held_out", "16"]
        if arguments.random_model:
            model = save_random_model(Path(folder) / "model", arguments.random_model)
            # All completions are truncated; score them so that the verifier's work is measured.
            fixed += ["--model.path", str(model), "--task.score_truncated", "true"]
        config = load_config(arguments.config, [*overrides, *fixed])
        os.environ.update(engine_environment(config))
        actor = RecordingEngine(start_engine(config, index=1, incarnation=0))  # before the loop
        bare = bare_engine(config)
        rows = run(compare(config, actor, bare, arguments.repeats, arguments.turn_s))
    title = (
        "Tokens/s of a complete actor (loop, rollout, verifier, ZeroMQ to a buffer service) and of "
        "the bare engine replaying its requests with as many callers, alternating in one process, "
        f"{arguments.turn_s:g} s each; {config.actors.engine} engine, "
        f"{config.actors.num_slots} slots, "
        f"at most {config.actors.max_new_tokens} tokens per completion, "
        f"{arguments.random_model or 'quickstart'} model"
    )
    report("actor", title, rows)


if __name__ == "__main__":
    main()
