"""The jobs of one node's ranks: addresses, and which nodes share a folder."""

from pathlib import Path
from typing import Any

import pytest

from speed_async.config.load import build_config
from speed_async.config.schema import Config
from speed_async.launcher.doctor.jobs import CannotListen, prepared_jobs, store_port
from speed_async.launcher.rank import Node
from tests.fakes.tiny_models import save_tiny_folder


def make_config(folder: Path, **cluster: Any) -> Config:
    return build_config(
        {
            "run": {"folder": str(folder / "runs" / "run")},
            "model": {"path": str(save_tiny_folder(folder / "model"))},
            "task": {"name": "arithmetic"},
            "actors": {"max_new_tokens": 8},
            "cluster": {"security": "insecure"} | cluster,
        }
    )


@pytest.mark.parametrize(
    ("num_nodes", "cluster", "port"),
    [
        (1, {"service_port": 5}, 0),
        (2, {"service_port": 5, "host": "10.0.0.1"}, 5),
        (2, {"service_port": 5, "learner_port": 6, "host": "10.0.0.1"}, 6),
        (2, {"host": "10.0.0.1"}, None),
        (2, {"service_port": 5}, None),
    ],
)
def test_nodes_meet_at_a_port_that_all_of_them_know(
    tmp_path: Path, num_nodes: int, cluster: dict[str, Any], port: int | None
) -> None:
    node = Node(num_ranks=2, num_nodes=num_nodes)
    assert store_port(make_config(tmp_path, **cluster), node) == port


def test_without_a_configuration_the_ranks_meet_on_loopback() -> None:
    node = Node(num_ranks=2)
    assert store_port(None, node) == 0
    with prepared_jobs(None, node, port=0, timeout_s=1.0) as (jobs, listener):
        assert listener is not None
        assert listener.getsockname() == ("127.0.0.1", jobs[0].port)
        assert [(job.rank, job.listener) for job in jobs] == [(0, listener.fileno()), (1, None)]
        assert {job.port for job in jobs} == {jobs[0].port}


def test_learners_on_several_nodes_look_for_a_file_that_lasts_as_long_as_the_ranks(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, learners=3)
    nodes = [Node(num_ranks=2, index=index, num_nodes=3) for index in range(3)]
    before = {*tmp_path.iterdir()}
    with prepared_jobs(config, nodes[0], port=0, timeout_s=1.0) as (jobs, _):
        first, other = jobs
        [file] = {*tmp_path.iterdir()} - before
        # The run folder and its parent do not exist yet.
        assert (first.shared_folder, first.shared_file) == (str(tmp_path), file.name)
        assert (other.shared_folder, other.shared_file) == (None, None)
        assert first.inputs.keys() == {"model", "data"}
    assert {*tmp_path.iterdir()} == before
    with prepared_jobs(config, nodes[1], port=7, timeout_s=1.0) as (jobs, listener):
        assert (jobs[0].rank, jobs[0].port, listener) == (2, 7, None)
        assert (jobs[0].shared_folder, jobs[0].shared_file) == (str(tmp_path), None)
        assert jobs[0].inputs == first.inputs
    with prepared_jobs(config, nodes[2], port=7, timeout_s=1.0) as (jobs, _):
        assert jobs[0].shared_folder is None  # it has only actors
    assert {*tmp_path.iterdir()} == before


def test_address_of_another_machine_cannot_be_listened_at(tmp_path: Path) -> None:
    config = make_config(tmp_path, host="192.0.2.200", service_port=5)
    with (
        pytest.raises(CannotListen, match=r"cannot meet at 192\.0\.2\.200:5 .*set cluster\.host"),
        prepared_jobs(config, Node(num_ranks=1, num_nodes=2), port=5, timeout_s=1.0),
    ):
        raise AssertionError
