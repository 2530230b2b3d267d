# pyright: reportMissingImports=false
"""Implements the engine interface with vLLM: tokens in, tokens out, one request per completion.

The engine is one state machine: requests and weight updates share its pauses, its unverified
version and its failure.

| loop | consumes | waits for | unblocked by |
| --- | --- | --- | --- |
| `generate` | one request | its final output, then a verified version | vLLM; the canary |
| `update_weights` | one offer | pause, transfer, canary | vLLM; the offer's deadline |
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from vllm import TokensPrompt
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.v1.engine.exceptions import EngineDeadError

from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepped_engine.admission import ModelLimits, sequence_limit
from speed_async.actors.stepped_engine.frames import unpack_error
from speed_async.actors.vllm_engine.held_weights import verify_parts
from speed_async.actors.vllm_engine.requests import (
    LiveRequest,
    canary_logprobs,
    canary_params,
    sampled,
    sampling_params,
)
from speed_async.errors import DeadlineExceeded, IncarnationLost, SpeedAsyncError, WeightSyncError
from speed_async.observability.first_error import LogSince, one_line
from speed_async.types import Sampled, WeightOffer
from speed_async.weight_sync.canary_check import Canary, canary_tolerance, verify

NUM_STAGES = 4
"""Stages of a transfer, each with the offer's deadline; vLLM itself has no timeout."""
CANARY_PRIORITY = -1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StartedLlm:
    """A started AsyncLLM (`start.start_llm`) and the limits on its requests."""

    llm: Any  # vllm.v1.engine.async_llm.AsyncLLM
    limits: ModelLimits
    eos_token_ids: tuple[int, ...]
    num_slots: int
    dtype: str
    close: Callable[[], None]


class VllmEngine:
    """Implements `Engine`. Entering starts vLLM, exiting stops it.

    Tokens are counted when they arrive in this process. A completion that finishes between an
    update and its canary check waits for the check. When vLLM dies, every call raises
    IncarnationLost, so that the actor is restarted; after a rejected version, every call raises
    WeightSyncError.
    """

    def __init__(
        self,
        start_llm: Callable[[], StartedLlm],
        *,
        recompute_at_update: bool,
        canary_tolerance_nats: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start_llm` runs in a thread and takes about 30 s."""
        self._open_llm = start_llm
        self._recompute_at_update = recompute_at_update
        self._tolerance = canary_tolerance_nats
        self._clock = clock
        self._ids = itertools.count()
        self._live: dict[str, LiveRequest] = {}
        self._failure: Exception | None = None
        self._policy_version = 0
        self._paused = False
        self._untraced: list[str] = []  # tensors that a digest of held weights cannot cover
        self._canary: tuple[Canary, int] | None = None  # to be verified when sampling resumes
        self._tokens_returned = self._tokens_cancelled = 0
        self._updating_s = self._busy_s = 0.0
        self._busy_since_s: float | None = None

    async def __aenter__(self) -> Self:
        self._verified = asyncio.Event()
        self._verified.set()
        self._updating = asyncio.Lock()
        self._log = LogSince()
        self._started = await asyncio.to_thread(self._open_llm)
        self._llm = self._started.llm
        await self._llm.update_weight_version(str(self._policy_version))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Running completions fail with SpeedAsyncError."""
        self._fail(SpeedAsyncError("the engine was closed before this request finished"))
        await asyncio.to_thread(self._started.close)

    @property
    def stats(self) -> EngineStats:
        running = [live for live in self._live.values() if live.is_running]
        tokens_running = sum(live.num_tokens for live in running)
        return EngineStats(
            tokens_generated=self._tokens_returned + self._tokens_cancelled + tokens_running,
            tokens_running=tokens_running,
            num_running=len(running),
            num_waiting=len(self._live) - len(running),
            num_slots=self._started.num_slots,
            policy_version=self._policy_version,
            steps=0,  # not reported by vLLM
            sampling_s=self._busy_s - self._updating_s + self._busy_now_s(),
            updating_s=self._updating_s,
        )

    @property
    def tokens_cancelled(self) -> int:
        """Tokens sampled for cancelled calls.

        Invariant: tokens_generated = tokens returned + tokens_cancelled + tokens_running.
        """
        return self._tokens_cancelled

    async def generate(self, request: GenerationRequest) -> Sampled:
        """Raises ModelError or ConfigError immediately when the request cannot be served."""
        self._check_usable()
        limit = sequence_limit(request, self._started.limits)
        # Shielded from cancellation, which would leave an untracked request in vLLM.
        adding = asyncio.ensure_future(self._add(request, limit))
        try:
            live = await asyncio.shield(adding)
            output = (await self._get(live)).outputs[0]
            if not self._verified.is_set():
                await self._verified.wait()
                self._check_usable()
        except asyncio.CancelledError:
            await self._cancel(await adding)
            raise
        self._discard(live)
        self._tokens_returned += len(output.token_ids)
        return sampled(output)

    async def pause(self, *, abort: bool) -> None:
        self._check_usable()
        async with self._updating:
            self._paused = True
            await self._call(
                self._llm.pause_generation(mode="abort" if abort else "keep", clear_cache=False)
            )
            if abort:  # including requests that vLLM had not scheduled yet
                await self._llm.abort([*self._live], internal=True)

    async def resume(self) -> None:
        self._check_usable()
        async with self._updating:
            self._paused = False
            await self._call(self._llm.resume_generation())
            await self._verify()

    async def update_weights(self, offer: WeightOffer) -> UpdateReport:
        """See `Engine`. While paused, the canary is evaluated at `resume`."""
        self._check_usable()
        async with self._updating:
            started_s = self._clock()
            await self._abort_stale(offer.policy_version)
            await self._call(
                self._llm.pause_generation(mode="keep", clear_cache=self._recompute_at_update)
            )
            outcomes = await self._transfer(offer)
            self._policy_version = offer.policy_version
            self._expect_canary(outcomes[0], offer.policy_version)
            if not self._paused:
                await self._call(self._llm.resume_generation())
            pause_s = self._clock() - started_s
            self._updating_s += pause_s
            if not self._paused:
                await self._verify()
            return UpdateReport(
                policy_version=offer.policy_version,
                transfer_s=max(outcome["transfer_s"] for outcome in outcomes),
                pause_s=pause_s,
            )

    # --- requests ----------------------------------------------------------------------------

    async def _add(self, request: GenerationRequest, limit: int) -> LiveRequest:
        params = sampling_params(request, limit, self._started.eos_token_ids)
        prompt = TokensPrompt(
            prompt_token_ids=request.prompt_token_ids.tolist(),
            # Cached prefixes of an older version must not be reused.
            cache_salt=str(self._policy_version),
        )
        queue = await self._call(
            self._llm.add_request(
                f"request-{next(self._ids)}", prompt, params, priority=request.priority
            )
        )
        state = self._llm.output_processor.request_states.get(queue.request_id)
        live = LiveRequest(request, queue, state)
        if not self._live:
            self._busy_since_s = self._clock()
        self._live[queue.request_id] = live
        return live

    async def _get(self, live: LiveRequest) -> Any:
        return await self._call(live.queue.get())

    async def _cancel(self, live: LiveRequest) -> None:
        """Free a cancelled request and count its sampled tokens."""
        self._discard(live)
        num_tokens = live.num_tokens
        if self._failure is None:
            await self._llm.abort(live.queue.request_id, internal=True)
        self._tokens_cancelled += num_tokens

    def _discard(self, live: LiveRequest) -> None:
        self._live.pop(live.queue.request_id, None)
        if not self._live:
            self._busy_s += self._busy_now_s()
            self._busy_since_s = None

    def _busy_now_s(self) -> float:
        return 0.0 if self._busy_since_s is None else self._clock() - self._busy_since_s

    # --- weights -----------------------------------------------------------------------------

    async def _abort_stale(self, policy_version: int) -> None:
        stale = []
        for request_id, live in self._live.items():
            if live.first_version is None and live.is_running:
                live.first_version = self._policy_version  # else set by an earlier update
            if live.request is not None and live.request.is_stale(
                live.first_version, policy_version
            ):
                stale.append(request_id)
        if stale:
            await self._llm.abort(stale, internal=True)

    async def _transfer(self, offer: WeightOffer) -> list[dict[str, Any]]:
        """Receive the version in all workers; returns their outcomes.

        After an error, vLLM either still holds its previous version or is unusable.
        """
        deadline_s = NUM_STAGES * offer.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                outcomes = await self._receive(offer)
        except TimeoutError:
            failure = DeadlineExceeded("the vLLM engine", "receiving weights", deadline_s)
            self._fail(failure)
            raise failure from None
        failures = [outcome for outcome in outcomes if outcome["error"]]
        if not failures:
            self._verify_whole(outcomes, offer.policy_version)
            return outcomes
        error = unpack_error(*failures[0]["error"])
        if not all(failure["is_whole"] for failure in failures) or len(failures) < len(outcomes):
            self._fail(error)
        elif not self._paused:
            await self._call(self._llm.resume_generation())
        raise error

    async def _receive(self, offer: WeightOffer) -> list[dict[str, Any]]:
        """Run vLLM's update protocol. The version label changes after all workers succeed."""
        await self._call(self._llm.start_weight_update())
        info = WeightTransferUpdateRequest(update_info={"offer": asdict(offer)})
        await self._call(self._llm.update_weights(info))
        outcomes = await self._call(self._llm.collective_rpc("transfer_outcome"))
        has_failed = any(outcome["error"] for outcome in outcomes)
        await self._call(
            self._llm.finish_weight_update(None if has_failed else str(offer.policy_version))
        )
        return outcomes

    def _verify_whole(self, outcomes: list[dict[str, Any]], policy_version: int) -> None:
        """Raises WeightSyncError if the workers together lack a part of a tensor."""
        parts = [outcome["parts"] for outcome in outcomes]
        try:
            verify_parts(parts, policy_version=policy_version)
        except WeightSyncError as error:
            self._fail(error)
            raise
        untraced = sorted(set[str]().union(*(outcome["untraced"] for outcome in outcomes)))
        if untraced and untraced != self._untraced:
            sys.stderr.write(
                f"vLLM holds {len(untraced)} of {len(parts[0])} tensors in another layout or "
                f"precision than the learner, first '{untraced[0]}': what was received is compared "
                "with the learner's digests, what vLLM holds is only checked by the canary\n"
            )
        self._untraced = untraced

    def _expect_canary(self, outcome: dict[str, Any], policy_version: int) -> None:
        if outcome["token_ids"]:
            canary = Canary(
                token_ids=tuple(outcome["token_ids"]), logprobs=tuple(outcome["logprobs"])
            )
            self._canary = canary, policy_version
            self._verified.clear()

    async def _verify(self) -> None:
        """Evaluate a pending canary. Raises WeightSyncError; the engine is then unusable."""
        if self._canary is None:
            return
        canary, policy_version = self._canary
        tolerance = canary_tolerance(self._tolerance, self._started.dtype)
        try:
            measured = await self._measure(canary)
            verify(canary, measured, tolerance=tolerance, policy_version=policy_version)
        except WeightSyncError as error:
            self._fail(error)
            raise
        finally:
            self._canary = None
            self._verified.set()

    async def _measure(self, canary: Canary) -> list[float]:
        """Log-probabilities (T-1,) of the canary's tokens 1..T-1."""
        queue = await self._call(
            self._llm.add_request(
                f"canary-{next(self._ids)}",
                TokensPrompt(prompt_token_ids=list(canary.token_ids)),
                canary_params(),
                priority=CANARY_PRIORITY,
            )
        )
        output = await self._get(LiveRequest(None, queue, None))
        return canary_logprobs(canary, output)

    # --- failure -----------------------------------------------------------------------------

    async def _call(self, awaitable: Any) -> Any:
        """Await one vLLM call. Raises IncarnationLost when vLLM has died or the call fails.

        Any failure ends the engine, because the state of vLLM is then unknown.
        """
        try:
            return await awaitable
        except EngineDeadError:
            raise self._engine_death() from None
        except (RuntimeError, ValueError, TypeError) as error:
            failure = IncarnationLost(f"vLLM failed: {one_line(str(error))} (see the actor's log)")
            self._fail(failure)
            raise failure from error

    def _engine_death(self) -> Exception:
        cause = self._log.first_error()
        detail = f": {cause} (see the actor's log)" if cause else "; see the actor's log"
        self._fail(IncarnationLost(f"the vLLM engine died{detail}"))
        assert self._failure is not None
        return self._failure

    def _fail(self, failure: Exception) -> None:
        """Fail every request and every later call."""
        if self._failure is not None:
            return
        self._failure = failure
        for live in self._live.values():
            live.queue.put(failure)
        self._verified.set()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
