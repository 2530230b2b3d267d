"""CURVE over real sockets: who has an allowed key gets in, and nobody else does."""

import asyncio
import os
import shutil
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
import zmq
from click.testing import CliRunner

from speed_async.cli import commands
from speed_async.config.schema import ClusterConfig
from speed_async.errors import ConfigError, DeadlineExceeded, SpeedAsyncError
from speed_async.observability.metrics import Event
from speed_async.transport.codec import encode
from speed_async.transport.curve import (
    AllowList,
    ClientKeys,
    ServerKeys,
    client_keys,
    load_client_keys,
    load_server_keys,
    server_keys,
)
from speed_async.transport.feed import FeedPublisher, FeedSubscriber
from speed_async.transport.key_making import add_client, make_keys
from speed_async.transport.messages import Welcome
from speed_async.transport.session import Ping
from speed_async.transport.transport import Delivery
from speed_async.transport.zeromq import ZmqHub, ZmqLink, open_hub, open_link

HOST = "127.0.0.1"
SOON_S = 10.0
REFUSED_S = 0.5
"""An allowed client on loopback is through its handshake in a hundredth of this."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """Keys of another run."""
    make_keys(tmp_path / "other")
    return tmp_path / "other"


_opened: list[ZmqHub | ZmqLink | FeedPublisher | FeedSubscriber] = []


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Runs the scene, and closes all that it opened."""

    async def bounded() -> None:
        try:
            async with asyncio.timeout(3 * SOON_S):
                await scene()
        finally:
            while _opened:
                await _opened.pop().close()

    uvloop.run(bounded())


async def hub_with(keys: ServerKeys | None) -> ZmqHub:
    _opened.append(hub := await open_hub(HOST, 0, keys=keys))
    return hub


async def link_to(port: int, name: str, keys: ClientKeys | None) -> ZmqLink:
    _opened.append(link := await open_link(HOST, port, name, keys=keys))
    return link


async def assert_served(hub: ZmqHub, keys: ClientKeys | None, name: str) -> None:
    link = await link_to(hub.port, name, keys)
    await link.send(Ping(sent=1))
    assert await hub.receive(SOON_S) == (name, Ping(sent=1))
    assert hub.offer(name, Welcome(policy_version=3)) is Delivery.QUEUED
    assert await link.receive(SOON_S) == Welcome(policy_version=3)


async def assert_refused(hub: ZmqHub, keys: ClientKeys | None, name: str, says: str) -> None:
    """It reaches nobody, and its own deadline says what may be the matter."""
    link = await link_to(hub.port, name, keys)
    await link.send(Ping(sent=1))
    with pytest.raises(DeadlineExceeded, match="any peer"):
        await hub.receive(REFUSED_S)
    with pytest.raises(DeadlineExceeded, match=says):
        await link.receive(0.0)
    assert hub.offer(name, Welcome(policy_version=3)) is Delivery.GONE


def test_an_allowed_client_is_served(folder: Path):
    async def scene() -> None:
        hub = await hub_with(load_server_keys(folder))
        await assert_served(hub, load_client_keys(folder), "actor-1.0")
        await assert_served(hub, load_client_keys(add_client(folder, "late")), "actor-2.0")

    play(scene)


def test_whoever_is_not_allowed_never_reaches_the_hub_and_nobody_notices(
    folder: Path, strangers: Path
):
    async def scene() -> None:
        hub = await hub_with(load_server_keys(folder))
        good = load_client_keys(folder)
        stays = await link_to(hub.port, "stays-1.0", good)
        await stays.send(Ping(sent=0))
        assert await hub.receive(SOON_S) == ("stays-1.0", Ping(sent=0))
        unknown = load_client_keys(strangers)
        knows_server = ClientKeys(
            server_public=good.server_public, public=unknown.public, secret=unknown.secret
        )
        wrong_server = ClientKeys(
            server_public=unknown.server_public, public=good.public, secret=good.secret
        )
        await assert_refused(hub, knows_server, "unknown-1.0", "ignores a key that is not in its")
        await assert_refused(hub, wrong_server, "wrong-1.0", r"wrong server\.key")
        await assert_refused(hub, None, "plain-1.0", r"if it requires keys \(cluster\.keys\)")
        # Under the name of one who is there as well: it does not take its place.
        impostor = await link_to(hub.port, "stays-1.0", knows_server)
        await impostor.send(Ping(sent=66))
        with pytest.raises(DeadlineExceeded):
            await hub.receive(REFUSED_S)
        assert hub.rejected == 0
        await stays.send(Ping(sent=1))
        assert await hub.receive(SOON_S) == ("stays-1.0", Ping(sent=1))
        assert hub.offer("stays-1.0", Welcome(policy_version=4)) is Delivery.QUEUED
        assert await stays.receive(SOON_S) == Welcome(policy_version=4)

    play(scene)


def test_a_client_with_keys_finds_no_plain_hub(folder: Path):
    async def scene() -> None:
        hub = await hub_with(None)
        await assert_refused(hub, load_client_keys(folder), "a-1.0", "if it runs without keys")

    play(scene)


def test_the_allow_list_may_change_while_the_hub_is_open(folder: Path):
    async def scene() -> None:
        hub = await hub_with(load_server_keys(folder))
        await assert_served(hub, load_client_keys(folder), "first-1.0")
        late = load_client_keys(add_client(folder, "late"))
        await assert_served(hub, late, "late-1.0")
        (folder / "allowed" / "late.key").unlink()
        await assert_refused(hub, late, "late-1.1", "not in its folder allowed/")
        (folder / "allowed" / "rubbish.key").write_bytes(b"\xff public-key = nothing")
        await assert_served(hub, load_client_keys(folder), "first-1.1")
        shutil.rmtree(folder / "allowed")
        await assert_refused(hub, load_client_keys(folder), "first-1.2", "not in its folder")

    play(scene)


def test_without_its_authenticator_a_hub_lets_nobody_in(folder: Path):
    async def scene() -> None:
        hub = await hub_with(load_server_keys(folder))
        authenticator = hub._socket._authenticator
        assert authenticator is not None
        authenticator.stop()
        await assert_refused(hub, load_client_keys(folder), "actor-1.0", "none received so far")

    play(scene)


def test_a_link_finds_a_restarted_hub_with_the_same_keys(folder: Path):
    async def scene() -> None:
        server, client = load_server_keys(folder), load_client_keys(folder)
        first = await hub_with(server)
        link = await link_to(first.port, "actor-1.0", client)
        await link.send(Ping(sent=1))
        assert await first.receive(SOON_S) == ("actor-1.0", Ping(sent=1))
        await first.close()
        _opened.append(second := await open_hub(HOST, first.port, keys=server))
        await link.send(Ping(sent=2))
        assert await second.receive(SOON_S) == ("actor-1.0", Ping(sent=2))

    play(scene)


def test_nothing_of_a_message_is_readable_on_the_way(folder: Path):
    """What a client sends passes through a relay that keeps a copy."""

    async def scene() -> None:
        seen = bytearray()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(HOST, hub.port)

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    seen.extend(data)
                    sink.write(data)

            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

        hub = await hub_with(load_server_keys(folder))
        server = await asyncio.start_server(relay, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        link = await link_to(port, "actor-1.0", load_client_keys(folder))
        await link.send(Ping(sent=1))
        assert await hub.receive(SOON_S) == ("actor-1.0", Ping(sent=1))
        assert b"CURVE" in seen
        assert b"actor-1.0" not in seen
        assert bytes(encode(Ping(sent=1))[0]) not in seen
        server.close()

    play(scene)


def test_a_key_that_is_written_over_is_the_one_that_counts(folder: Path, strangers: Path):
    old, new = load_client_keys(folder).public, load_client_keys(strangers).public
    allow_list, file = AllowList(folder / "allowed"), folder / "allowed" / "client.key"
    assert allow_list.callback("", old) and not allow_list.callback("", new)
    file.write_bytes((strangers / "allowed" / "client.key").read_bytes())
    assert allow_list.callback("", new) and not allow_list.callback("", old)


def test_what_is_no_key_file_holds_nobody_up(folder: Path):
    os.mkfifo(folder / "allowed" / "pipe.key")
    (folder / "allowed" / "gone.key").symlink_to(folder / "nowhere")
    (folder / "allowed" / "folder.key").mkdir()
    allow_list = AllowList(folder / "allowed")
    answers: list[bool] = []
    public = load_client_keys(folder).public
    asking = threading.Thread(
        target=lambda: answers.append(allow_list.callback("", public)), daemon=True
    )
    asking.start()
    asking.join(SOON_S)
    assert answers == [True]


@pytest.mark.parametrize("name", ["", "server.key", "allowed/client.key"])
def test_keys_that_others_may_replace_are_refused(folder: Path, name: str):
    place = folder / name
    place.chmod(place.stat().st_mode | stat.S_IWGRP)
    with pytest.raises(ConfigError, match="is writable by other users"):
        (load_client_keys if name == "server.key" else load_server_keys)(folder)


def test_the_feed_is_for_allowed_clients_alone(folder: Path, strangers: Path):
    async def scene() -> None:
        publisher = FeedPublisher(HOST, 0, keys=load_server_keys(folder))
        _opened.append(publisher)
        good, unknown = load_client_keys(folder), load_client_keys(strangers)
        mixed = ClientKeys(
            server_public=good.server_public, public=unknown.public, secret=unknown.secret
        )
        reader = FeedSubscriber(HOST, publisher.port, keys=good)
        others = [FeedSubscriber(HOST, publisher.port, keys=keys) for keys in (mixed, None)]
        _opened.extend([reader, *others])
        event, got = Event(kind="step", values={"wall_s": 1.0}), 0
        async with asyncio.timeout(SOON_S):
            while got < 20:  # long after the first one came, the others have had their chance
                await publisher.publish(event)
                try:
                    assert await reader.receive(0.05) == event
                    got += 1
                except DeadlineExceeded:
                    continue
        for subscriber, says in zip(others, ("not in its", r"cluster\.keys"), strict=True):
            with pytest.raises(DeadlineExceeded, match=says):
                await subscriber.receive(REFUSED_S)

    play(scene)


# --- the folder ------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in folder.rglob("*")
    }


def test_the_command_makes_secrets_that_only_their_owner_can_read(tmp_path: Path):
    folder = tmp_path / "new" / "keys"
    made = CliRunner().invoke(commands, ["keys", str(folder)])
    assert made.exit_code == 0, made.output
    assert "cluster.keys" in made.output
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = modes(folder)
    assert {name: mode for name, mode in found.items() if not name.endswith(".key")} == {
        "server.key_secret": "0o600",
        "client.key_secret": "0o600",
        "allowed": "0o700",
        "clients": "0o700",
    }
    assert {name for name in found if name.endswith(".key")} == {"server.key", "allowed/client.key"}
    for name in ("server.key", "allowed/client.key"):
        assert "secret" not in (folder / name).read_text()


def test_the_command_never_overwrites(folder: Path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SpeedAsyncError, match="never overwritten: add a client"):
        make_keys(folder)
    add_client(folder, "late")
    for name in ("late", "client"):
        with pytest.raises(SpeedAsyncError, match=f"client '{name}' exists"):
            add_client(folder, name)
    assert {path: path.read_bytes() for path in before} == before


def test_a_further_client_gets_a_folder_with_all_it_needs_and_no_more(folder: Path):
    added = CliRunner().invoke(commands, ["keys", str(folder), "--client", "laptop"])
    assert added.exit_code == 0, added.output
    place = folder / "clients" / "laptop"
    assert str(place) in added.output
    assert modes(place) == {"client.key_secret": "0o600", "server.key": "0o644"}
    assert load_client_keys(place).public != load_client_keys(folder).public
    with pytest.raises(ConfigError, match=r"no server\.key_secret"):
        load_server_keys(place)


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 65, "ä"])
def test_a_client_s_name_stays_in_its_folder(folder: Path, name: str):
    with pytest.raises(SpeedAsyncError, match="is not a valid client name"):
        add_client(folder, name)


def test_clients_are_added_to_keys_only(tmp_path: Path):
    with pytest.raises(SpeedAsyncError, match="speed-async keys"):
        add_client(tmp_path, "late")


def test_secrets_that_others_may_read_are_refused(folder: Path):
    for name, load in (("client", load_client_keys), ("server", load_server_keys)):
        secret = folder / f"{name}.key_secret"
        secret.chmod(0o640)
        with pytest.raises(ConfigError, match=r"\(mode 0640\); chmod 600") as refused:
            load(folder)
        assert (refused.value.field, refused.value.value) == ("cluster.keys", str(folder))
        secret.chmod(0o600)
        load(folder)
    (folder / "allowed").chmod(0o777)
    with pytest.raises(ConfigError, match="could add keys; chmod go-w"):
        load_server_keys(folder)


def test_broken_keys_are_named(folder: Path, strangers: Path):
    (folder / "client.key_secret").write_bytes((folder / "server.key").read_bytes())
    with pytest.raises(ConfigError, match=r"client\.key_secret does not contain a valid key pair"):
        load_client_keys(folder)
    mixed = (folder / "server.key_secret").read_text().splitlines()[:3]
    mixed += (strangers / "server.key_secret").read_text().splitlines()[3:]
    (folder / "server.key_secret").write_text("\n".join(mixed))
    with pytest.raises(ConfigError, match=r"server\.key_secret does not contain a valid"):
        load_server_keys(folder)
    (strangers / "server.key").write_text('public-key = "short"')
    with pytest.raises(ConfigError, match=r"server\.key does not have 40 characters"):
        load_client_keys(strangers)


def test_keys_do_not_show_in_errors_or_logs(folder: Path):
    keys = load_server_keys(folder)
    assert keys.secret.decode() not in repr(keys)
    client = load_client_keys(folder)
    assert client.secret.decode() not in repr(client)


@pytest.mark.parametrize(
    ("host", "security", "has_keys"),
    [
        (HOST, "auto", False),
        ("::1", "auto", False),
        ("localhost", "auto", False),
        (HOST, "curve", True),
        ("10.0.0.1", "auto", True),
        ("0.0.0.0", "auto", True),
        ("node0", "auto", True),
        ("10.0.0.1", "insecure", False),
    ],
)
def test_which_sockets_have_keys(folder: Path, host: str, security: str, has_keys: bool):
    cluster = ClusterConfig.model_validate(
        {"host": host, "security": security, "keys": str(folder)}
    )
    assert (client_keys(cluster) is not None) == has_keys
    assert (server_keys(cluster) is not None) == has_keys


def test_libzmq_here_has_curve():
    assert zmq.has("curve")
