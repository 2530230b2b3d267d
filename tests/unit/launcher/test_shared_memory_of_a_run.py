"""vLLM's part of a shared GPU: each actor rank computes it at each start, and only it saves it."""

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from speed_async.config.load import build_config, read_resolved
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Config
from speed_async.errors import RunFinished
from speed_async.launcher.attempt import begin_attempt
from speed_async.launcher.preflight import shared_gpu
from speed_async.launcher.preflight.memory_budget import GIB
from speed_async.launcher.rank import Node, Rank
from speed_async.launcher.rendezvous import FOLDER_VARIABLE
from speed_async.launcher.roles import actor_rank, learner_role
from speed_async.launcher.roles.join import Admitted, RunEnd
from speed_async.launcher.roles.supervisor import ActorPlan
from tests.fakes.tiny_models import save_tiny_folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(shared_gpu, "gpu_memory_bytes", lambda: (24 * GIB,))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return build_config(
        {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"path": str(save_tiny_folder(tmp_path / "model"))},
            "task": {"name": "arithmetic"},
            "actors": {"engine": "vllm", "max_new_tokens": 8},
        }
    )


def lead(config: Config, rank: Rank, monkeypatch: pytest.MonkeyPatch, *, resume: bool) -> Path:
    """Begin an attempt as the leading learner, and end it. Returns the run folder."""
    folders: list[Path] = []

    def begin(*arguments: Any, **options: Any) -> None:
        attempt = begin_attempt(*arguments, **options)
        attempt.folder.release_lock(attempt.lock)
        folders.append(attempt.folder.path)
        raise RunFinished("no training here")

    monkeypatch.setattr(learner_role, "begin_attempt", begin)
    asyncio.run(learner_role.lead_run(config, rank, resume=resume))
    return folders[0]


def start_actor(folder: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The configuration with which an actor rank of the run starts its actor."""
    found: list[Config] = []

    async def supervise(
        config: Config, plan: ActorPlan, *, run_over: Coroutine[Any, Any, RunEnd], **_: object
    ) -> None:
        run_over.close()
        found.extend([config, read_resolved(plan.config or plan.folder / "config.json")])

    monkeypatch.setattr(actor_rank, "supervise", supervise)
    monkeypatch.setattr(actor_rank, "log_to", lambda path: None)
    run_config = read_resolved(folder / "config.json")
    accepted = SimpleNamespace(config=run_config.model_dump_json(), incarnation=0, feed_port=1)
    admitted = SimpleNamespace(
        host="127.0.0.1", port=1, accepted=accepted, link=SimpleNamespace(send=None)
    )

    async def run() -> None:
        await actor_rank._run_actor(run_config, rank, cast(Admitted, admitted), asyncio.Event())

    asyncio.run(run())
    supervised, saved = found
    assert supervised == saved  # what the child process reads
    return saved


def test_a_resume_with_more_actors_divides_the_gpu_anew(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Node(num_ranks=2)
    folder = lead(config, two.rank(0), monkeypatch, resume=False)
    saved = json.loads((folder / "config.json").read_text())["actors"]["vllm"]
    assert saved == config.actors.vllm.model_dump()  # nothing that was computed
    alone = start_actor(folder, two.rank(1), monkeypatch).actors.vllm
    assert alone.gpu_memory_utilization is not None

    three = Node(num_ranks=3)
    resumed = load_resumed(folder, ["--cluster.actors", "2"])
    lead(resumed, three.rank(0), monkeypatch, resume=True)
    first, second = (start_actor(folder, three.rank(i), monkeypatch).actors.vllm for i in (1, 2))
    assert first == second
    assert first.gpu_memory_utilization == pytest.approx(alone.gpu_memory_utilization / 2, abs=0.01)
    assert first.kv_cache_bytes is not None
    assert alone.kv_cache_bytes is not None
    assert first.kv_cache_bytes < alone.kv_cache_bytes / 2


def test_what_the_user_set_is_kept(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = config.actors.vllm.model_copy(update={"gpu_memory_utilization": 0.3})
    config = config.model_copy(update={"actors": config.actors.model_copy(update={"vllm": vllm})})
    node = Node(num_ranks=2)
    folder = lead(config, node.rank(0), monkeypatch, resume=False)
    assert start_actor(folder, node.rank(1), monkeypatch).actors.vllm == vllm
    assert not (folder / "logs" / "actor-1.config.json").exists()
