"""Which GPUs of a node an actor uses."""

import pytest

from speed_async.config.schema import Config
from speed_async.config.sections.actors import ActorsConfig, VllmConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.task import TaskConfig
from speed_async.errors import ConfigError
from speed_async.launcher.gpus import actor_gpus, local_actor_gpus
from speed_async.launcher.rank import Node


def config_of(*, tensor_parallel: int = 1) -> Config:
    return Config(
        model=ModelConfig(path="model"),
        task=TaskConfig(name="arithmetic"),
        actors=ActorsConfig(engine="vllm", vllm=VllmConfig(tensor_parallel=tensor_parallel)),
    )


@pytest.mark.parametrize(
    ("num_ranks", "tensor_parallel", "num_gpus", "expected"),
    [
        (3, 1, 0, [(), ()]),
        (3, 1, 1, [(0,), (0,)]),
        (3, 1, 2, [(1,), (0,)]),
        (3, 1, 8, [(1,), (2,)]),
        (3, 2, 8, [(1, 2), (3, 4)]),
    ],
)
def test_gpus_of_the_actors_beside_the_learner(
    num_ranks: int, tensor_parallel: int, num_gpus: int, expected: list[tuple[int, ...]]
):
    learner = Node(num_ranks=num_ranks, num_nodes=2).rank(0)
    config = config_of(tensor_parallel=tensor_parallel)
    assert local_actor_gpus(config, learner, num_gpus) == expected


def test_a_node_without_a_learner_uses_its_first_gpu():
    rank = Node(num_ranks=2, index=1, num_nodes=2).rank(0)
    assert actor_gpus(config_of(), rank, 8) == (0,)


def test_a_tensor_parallel_actor_that_does_not_fit_is_a_configuration_error():
    rank = Node(num_ranks=3).rank(2)
    with pytest.raises(ConfigError, match=r"tensor_parallel.*GPUs 3 to 4 .* has 4; start fewer"):
        actor_gpus(config_of(tensor_parallel=2), rank, 4)
