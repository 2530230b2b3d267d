"""Values that are refused with vLLM only."""

from typing import Any

import pytest

from speed_async.config.checks.vllm import check_vllm
from speed_async.config.schema import Config

SUITE = {"name": "cold", "path": "data.jsonl", "temperature": 0.005}


def found(actors: dict[str, Any], **sections: Any) -> list[tuple[str, object]]:
    tree = {"model": {"path": "m"}, "task": {"name": "arithmetic"}, "actors": actors} | sections
    return [(error.field, error.value) for error in check_vllm(Config.model_validate(tree))]


@pytest.mark.parametrize(
    "name", ["pipeline_parallel_size", "data_parallel_size", "data_parallel_backend"]
)
def test_parallelism_that_the_launcher_does_not_assign_is_refused(name: str):
    arguments = {name: 2, "max_num_batched_tokens": 8192}
    vllm = {"engine": "vllm", "vllm": {"arguments": arguments}}
    assert found(vllm) == [("actors.vllm.arguments", name)]


def test_temperatures_that_vllm_would_raise_are_refused():
    assert found({"engine": "vllm", "temperature": 0.009}) == [("actors.temperature", 0.009)]
    assert found({"engine": "vllm", "temperature": 0.01}) == []
    assert found({"engine": "torch", "temperature": 0.009}) == []
    suites = found({"engine": "vllm"}, evaluate={"suites": [SUITE]})
    assert suites == [("evaluate.suites", 0.005)]
