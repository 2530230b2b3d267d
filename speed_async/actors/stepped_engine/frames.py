"""Frames that carry inputs and iteration results between an actor and its engine process.

A frame is a 4-byte length and a msgpack value. Both ends run the same program, so frames carry no
version and the only invalid input is a truncated frame.
"""

import dataclasses
import struct
from typing import Any

import msgpack
import numpy as np

from speed_async import errors
from speed_async.actors.engine import EngineStats, GenerationRequest, UpdateReport
from speed_async.actors.stepped_engine.core import (
    Answer,
    Command,
    IterationInput,
    IterationResult,
    LoadWeights,
    Pause,
    Resume,
)
from speed_async.actors.stepped_engine.stepper import FinishedRequest
from speed_async.errors import SpeedAsyncError
from speed_async.types import Sampled, WeightOffer

LENGTH = struct.Struct("<I")
REQUEST_FIELDS = [field.name for field in dataclasses.fields(GenerationRequest)]  # prompt first


def frame(value: Any) -> bytes:
    body = msgpack.packb(value)
    return LENGTH.pack(len(body)) + body


def pack_input(inputs: IterationInput) -> dict[str, Any]:
    return {
        "arrivals": [(key, *_pack_request(request)) for key, request in inputs.arrivals],
        "cancelled": inputs.cancelled,
        "commands": [_pack_command(command) for command in inputs.commands],
    }


def unpack_input(value: dict[str, Any]) -> IterationInput:
    return IterationInput(
        arrivals=[(key, _unpack_request(*rest)) for key, *rest in value["arrivals"]],
        cancelled=value["cancelled"],
        commands=[_unpack_command(*parts) for parts in value["commands"]],
    )


def pack_result(result: IterationResult) -> dict[str, Any]:
    return {
        "finished": [(each.key, *_pack_sampled(each.sampled)) for each in result.finished],
        "answers": [_pack_answer(answer) for answer in result.answers],
        "tokens_cancelled": result.tokens_cancelled,
        "stats": dataclasses.astuple(result.stats),
    }


def unpack_result(value: dict[str, Any]) -> IterationResult:
    return IterationResult(
        finished=[
            FinishedRequest(key=key, sampled=_unpack_sampled(*rest))
            for key, *rest in value["finished"]
        ],
        answers=[_unpack_answer(*parts) for parts in value["answers"]],
        tokens_cancelled=value["tokens_cancelled"],
        stats=unpack_stats(value["stats"]),
    )


def unpack_stats(values: list[Any]) -> EngineStats:
    names = [field.name for field in dataclasses.fields(EngineStats)]
    return EngineStats(**dict(zip(names, values, strict=True)))


def pack_error(error: SpeedAsyncError) -> tuple[str, str]:
    return type(error).__name__, str(error)


def unpack_error(kind: str, text: str) -> SpeedAsyncError:
    """An error of the same class and text. Other attributes of the class are not preserved."""
    error_class = getattr(errors, kind)
    error = error_class.__new__(error_class)
    SpeedAsyncError.__init__(error, text)
    return error


def _pack_request(request: GenerationRequest) -> tuple[Any, ...]:
    prompt, *rest = (getattr(request, name) for name in REQUEST_FIELDS)
    return prompt.tobytes(), *rest


def _unpack_request(prompt: bytes, *rest: Any) -> GenerationRequest:
    values: tuple[Any, ...] = (np.frombuffer(prompt, np.int32), *rest)
    return GenerationRequest(**dict(zip(REQUEST_FIELDS, values, strict=True)))


def _pack_sampled(sampled: Sampled) -> tuple[Any, ...]:
    return (
        sampled.token_ids.tobytes(),
        sampled.logprobs.tobytes(),
        sampled.policy_versions.tobytes(),
        sampled.finish_reason,
    )


def _unpack_sampled(tokens: bytes, logprobs: bytes, versions: bytes, finish_reason: Any) -> Sampled:
    return Sampled(
        token_ids=np.frombuffer(tokens, np.int32),
        logprobs=np.frombuffer(logprobs, np.float32),
        policy_versions=np.frombuffer(versions, np.int32),
        finish_reason=finish_reason,
    )


def _pack_command(command: Command) -> tuple[Any, ...]:
    match command:
        case LoadWeights(offer=offer):
            return ("update", dataclasses.asdict(offer))
        case Pause(abort=abort):
            return ("pause", abort)
        case Resume():
            return ("resume", None)


def _unpack_command(kind: str, value: Any) -> Command:
    if kind == "update":
        return LoadWeights(offer=WeightOffer(**value))
    return Pause(abort=value) if kind == "pause" else Resume()


def _pack_answer(answer: Answer) -> tuple[Any, ...]:
    if isinstance(answer, UpdateReport):
        return ("report", *dataclasses.astuple(answer))
    return ("none",) if answer is None else ("error", *pack_error(answer))


def _unpack_answer(kind: str, *values: Any) -> Answer:
    if kind == "report":
        policy_version, transfer_s, pause_s = values
        return UpdateReport(policy_version=policy_version, transfer_s=transfer_s, pause_s=pause_s)
    return None if kind == "none" else unpack_error(*values)
