# pyright: reportMissingImports=false
"""A minimal wrapper around vLLM's AsyncLLM, without any engine code of this project."""

import asyncio
import itertools
from functools import partial
from typing import Any, Self

from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from speed_async.actors.engine import EngineStats, GenerationRequest
from speed_async.actors.vllm_engine.start import start_llm
from speed_async.config.schema import Config


class BareVllm:
    """`generate` returns vLLM's own output."""

    def __init__(self, config: Config) -> None:
        self._open = partial(start_llm, config, seed=config.run.seed)
        self._ids = itertools.count()
        self._tokens_returned = 0

    async def __aenter__(self) -> Self:
        self._opened = await asyncio.to_thread(self._open)
        self._llm = self._opened.llm
        return self

    async def __aexit__(self, *details: Any) -> None:
        await asyncio.to_thread(self._opened.close)

    async def generate(self, request: GenerationRequest) -> Any:
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            logprobs=0,
            stop_token_ids=list(self._opened.eos_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=request.prompt_token_ids.tolist())
        stream = self._llm.generate(
            prompt, params, f"bare-{next(self._ids)}", priority=request.priority
        )
        [output] = [each async for each in stream]  # only the final output
        self._tokens_returned += len(output.outputs[0].token_ids)
        return output

    async def pause(self, *, abort: bool) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        await self._llm.resume_generation()

    @property
    def stats(self) -> EngineStats:
        states = self._llm.output_processor.request_states.values()
        running = sum(state.detokenizer.num_output_tokens() for state in states)
        return EngineStats(
            tokens_generated=self._tokens_returned + running,
            tokens_running=running,
            num_running=len(states),
            num_waiting=0,
            num_slots=self._opened.num_slots,
            policy_version=0,
            steps=0,
        )
