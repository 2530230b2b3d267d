"""A learner rank on another node: it needs the run folder of the lead."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from speed_async.config.load import build_config, save_config
from speed_async.config.schema import Config
from speed_async.errors import ConfigError
from speed_async.launcher.rank import Rank
from speed_async.launcher.roles import follower_role
from speed_async.launcher.roles.follower_role import follow_run
from speed_async.launcher.run_folder import RunFolder
from speed_async.transport import messages as m
from speed_async.transport.following import Alive, LeadPlan, StopFollowing
from tests.fakes.paths import MODEL

DONE = StopFollowing()
SECOND_NODE = Rank(rank=2, local_rank=0, world_size=4, local_world_size=2)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return build_config(
        {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"path": str(MODEL)},
            "task": {"name": "arithmetic"},
            "cluster": {"learners": 3},
        }
    )


class SentMessages:
    """The link to a lead that has sent its plan and sends nothing more."""

    def __init__(self) -> None:
        self.sent: list[m.Message] = []

    async def send(self, message: m.Message) -> None:
        self.sent.append(message)

    async def close(self) -> None:
        return


def follow(config: Config, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> list[m.Message]:
    """Follow a lead with this configuration; the work ends immediately. Returns what was sent
    before it, or with the error."""
    link = SentMessages()
    plan = LeadPlan(config=config.model_dump_json(), store_host="", store_port=0)

    async def join(*_: object) -> tuple[SentMessages, LeadPlan]:
        return link, plan

    async def work(*_: object) -> None:
        link.sent.append(DONE)

    monkeypatch.setattr(follower_role, "_join", join)
    monkeypatch.setattr(follower_role, "_import_work", lambda: SimpleNamespace(follow=work))
    monkeypatch.setattr(follower_role, "log_to", lambda path: None)
    monkeypatch.setattr(follower_role, "LOOK_AGAIN_S", 0.01)
    try:
        asyncio.run(follow_run(config, rank))
    except ConfigError as error:
        [failure] = [each for each in link.sent if isinstance(each, m.Failure)]
        assert failure.message == str(error)
        raise
    return link.sent


def test_a_folder_that_other_nodes_do_not_see_is_an_error_with_a_remedy(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_role, "SHARED_FOLDER_S", 0.05)
    with pytest.raises(ConfigError, match="a file system that all of them share") as caught:
        follow(config, SECOND_NODE, monkeypatch)
    assert caught.value.field == "run.folder"
    assert caught.value.value == config.run.folder
    assert "learner-2, which runs on another node" in str(caught.value)
    assert not Path(config.run.folder).exists()


def test_a_folder_with_a_run_of_another_node_is_an_error(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_role, "SHARED_FOLDER_S", 0.05)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    folder = RunFolder(path=Path(config.run.folder))
    folder.path.mkdir()
    save_config(other, folder.config)
    with pytest.raises(ConfigError, match=r"does not find the config\.json of"):
        follow(config, SECOND_NODE, monkeypatch)


def test_a_shared_folder_is_used_and_may_appear_late(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, looks = RunFolder(path=Path(config.run.folder)), iter(range(10))
    real = follower_role._has_config

    def late(where: RunFolder, text: str) -> bool:
        if next(looks) == 2:
            folder.path.mkdir()
            save_config(config, folder.config)
        return real(where, text)

    monkeypatch.setattr(follower_role, "_has_config", late)
    sent = follow(config, SECOND_NODE, monkeypatch)
    assert sent == [Alive(), Alive(), DONE]  # the lead hears from it meanwhile


def test_the_node_of_the_lead_has_its_folder(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_node = Rank(rank=1, local_rank=1, world_size=4, local_world_size=2)
    monkeypatch.setattr(follower_role, "_has_config", lambda *_: False)
    assert follow(config, first_node, monkeypatch) == [DONE]
