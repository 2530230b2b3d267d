"""CURVE over real sockets: only clients with an allowed key can connect."""

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
from speed_async.config.sections.cluster import ClusterConfig
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
"""The handshake of an allowed client on loopback takes a hundredth of this."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def other_keys(tmp_path: Path) -> Path:
    """Key folder of another run."""
    make_keys(tmp_path / "other")
    return tmp_path / "other"


_opened: list[ZmqHub | ZmqLink | FeedPublisher | FeedSubscriber] = []


def run_test(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test and close everything that it opened."""

    async def bounded() -> None:
        try:
            async with asyncio.timeout(3 * SOON_S):
                await test()
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


async def assert_refused(hub: ZmqHub, keys: ClientKeys | None, name: str, hint: str) -> None:
    """The client reaches no peer, and its deadline error has a hint about the cause."""
    link = await link_to(hub.port, name, keys)
    await link.send(Ping(sent=1))
    with pytest.raises(DeadlineExceeded, match="any peer"):
        await hub.receive(REFUSED_S)
    with pytest.raises(DeadlineExceeded, match=hint):
        await link.receive(0.0)
    assert hub.offer(name, Welcome(policy_version=3)) is Delivery.GONE


def test_an_allowed_client_is_served(folder: Path):
    async def test() -> None:
        hub = await hub_with(load_server_keys(folder))
        await assert_served(hub, load_client_keys(folder), "actor-1.0")
        await assert_served(hub, load_client_keys(add_client(folder, "late")), "actor-2.0")

    run_test(test)


def test_clients_without_an_allowed_key_never_reach_the_hub(folder: Path, other_keys: Path):
    async def test() -> None:
        hub = await hub_with(load_server_keys(folder))
        good = load_client_keys(folder)
        stays = await link_to(hub.port, "stays-1.0", good)
        await stays.send(Ping(sent=0))
        assert await hub.receive(SOON_S) == ("stays-1.0", Ping(sent=0))
        unknown = load_client_keys(other_keys)
        knows_server = ClientKeys(
            server_public=good.server_public, public=unknown.public, secret=unknown.secret
        )
        wrong_server = ClientKeys(
            server_public=unknown.server_public, public=good.public, secret=good.secret
        )
        await assert_refused(hub, knows_server, "unknown-1.0", "ignores a key that is not in its")
        await assert_refused(hub, wrong_server, "wrong-1.0", r"wrong server\.key")
        await assert_refused(hub, None, "plain-1.0", r"if it requires keys \(cluster\.keys\)")
        # With the name of a connected peer: it does not replace that peer.
        impostor = await link_to(hub.port, "stays-1.0", knows_server)
        await impostor.send(Ping(sent=66))
        with pytest.raises(DeadlineExceeded):
            await hub.receive(REFUSED_S)
        assert hub.rejected == 0
        await stays.send(Ping(sent=1))
        assert await hub.receive(SOON_S) == ("stays-1.0", Ping(sent=1))
        assert hub.offer("stays-1.0", Welcome(policy_version=4)) is Delivery.QUEUED
        assert await stays.receive(SOON_S) == Welcome(policy_version=4)

    run_test(test)


def test_client_with_keys_cannot_use_a_hub_without_keys(folder: Path):
    async def test() -> None:
        hub = await hub_with(None)
        await assert_refused(hub, load_client_keys(folder), "a-1.0", "if it runs without keys")

    run_test(test)


def test_allow_list_can_change_while_the_hub_is_open(folder: Path):
    async def test() -> None:
        hub = await hub_with(load_server_keys(folder))
        await assert_served(hub, load_client_keys(folder), "first-1.0")
        late = load_client_keys(add_client(folder, "late"))
        await assert_served(hub, late, "late-1.0")
        (folder / "allowed" / "late.key").unlink()
        await assert_refused(hub, late, "late-1.1", "not in its folder allowed/")
        (folder / "allowed" / "malformed.key").write_bytes(b"\xff public-key = nothing")
        await assert_served(hub, load_client_keys(folder), "first-1.1")
        shutil.rmtree(folder / "allowed")
        await assert_refused(hub, load_client_keys(folder), "first-1.2", "not in its folder")

    run_test(test)


def test_hub_without_its_authenticator_refuses_all_clients(folder: Path):
    async def test() -> None:
        hub = await hub_with(load_server_keys(folder))
        authenticator = hub._socket._authenticator
        assert authenticator is not None
        authenticator.stop()
        await assert_refused(hub, load_client_keys(folder), "actor-1.0", "none received so far")

    run_test(test)


def test_link_reconnects_to_a_restarted_hub_with_the_same_keys(folder: Path):
    async def test() -> None:
        server, client = load_server_keys(folder), load_client_keys(folder)
        first = await hub_with(server)
        link = await link_to(first.port, "actor-1.0", client)
        await link.send(Ping(sent=1))
        assert await first.receive(SOON_S) == ("actor-1.0", Ping(sent=1))
        await first.close()
        _opened.append(second := await open_hub(HOST, first.port, keys=server))
        await link.send(Ping(sent=2))
        assert await second.receive(SOON_S) == ("actor-1.0", Ping(sent=2))

    run_test(test)


def test_messages_are_encrypted_in_transit(folder: Path):
    """The data of a client passes through a relay that keeps a copy."""

    async def test() -> None:
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

    run_test(test)


def test_overwritten_key_file_is_read_again(folder: Path, other_keys: Path):
    old, new = load_client_keys(folder).public, load_client_keys(other_keys).public
    allow_list, file = AllowList(folder / "allowed"), folder / "allowed" / "client.key"
    assert allow_list.callback("", old) and not allow_list.callback("", new)
    file.write_bytes((other_keys / "allowed" / "client.key").read_bytes())
    assert allow_list.callback("", new) and not allow_list.callback("", old)


def test_special_files_do_not_block_the_allow_list(folder: Path):
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
def test_keys_writable_by_other_users_are_rejected(folder: Path, name: str):
    path = folder / name
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    with pytest.raises(ConfigError, match="is writable by other users"):
        (load_client_keys if name == "server.key" else load_server_keys)(folder)


def test_feed_requires_an_allowed_key(folder: Path, other_keys: Path):
    async def test() -> None:
        publisher = FeedPublisher(HOST, 0, keys=load_server_keys(folder))
        _opened.append(publisher)
        good, unknown = load_client_keys(folder), load_client_keys(other_keys)
        mixed = ClientKeys(
            server_public=good.server_public, public=unknown.public, secret=unknown.secret
        )
        reader = FeedSubscriber(HOST, publisher.port, keys=good)
        others = [FeedSubscriber(HOST, publisher.port, keys=keys) for keys in (mixed, None)]
        _opened.extend([reader, *others])
        event, got = Event(kind="step", values={"wall_s": 1.0}), 0
        async with asyncio.timeout(SOON_S):
            while got < 20:  # enough time for the other subscribers to connect
                await publisher.publish(event)
                try:
                    assert await reader.receive(0.05) == event
                    got += 1
                except DeadlineExceeded:
                    continue
        for subscriber, hint in zip(others, ("not in its", r"cluster\.keys"), strict=True):
            with pytest.raises(DeadlineExceeded, match=hint):
                await subscriber.receive(REFUSED_S)

    run_test(test)


# --- key folder ------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in folder.rglob("*")
    }


def test_keys_command_creates_secrets_readable_only_by_their_owner(tmp_path: Path):
    folder = tmp_path / "new" / "keys"
    result = CliRunner().invoke(commands, ["keys", str(folder)])
    assert result.exit_code == 0, result.output
    assert "cluster.keys" in result.output
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


def test_keys_are_never_overwritten(folder: Path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SpeedAsyncError, match="never overwritten: add a client"):
        make_keys(folder)
    add_client(folder, "late")
    for name in ("late", "client"):
        with pytest.raises(SpeedAsyncError, match=f"client '{name}' exists"):
            add_client(folder, name)
    assert {path: path.read_bytes() for path in before} == before


def test_additional_client_gets_a_minimal_folder(folder: Path):
    result = CliRunner().invoke(commands, ["keys", str(folder), "--client", "laptop"])
    assert result.exit_code == 0, result.output
    client_folder = folder / "clients" / "laptop"
    assert str(client_folder) in result.output
    assert modes(client_folder) == {"client.key_secret": "0o600", "server.key": "0o644"}
    assert load_client_keys(client_folder).public != load_client_keys(folder).public
    with pytest.raises(ConfigError, match=r"no server\.key_secret"):
        load_server_keys(client_folder)


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 65, "ä"])
def test_client_names_cannot_leave_the_folder(folder: Path, name: str):
    with pytest.raises(SpeedAsyncError, match="is not a valid client name"):
        add_client(folder, name)


def test_add_client_requires_a_key_folder(tmp_path: Path):
    with pytest.raises(SpeedAsyncError, match="speed-async keys"):
        add_client(tmp_path, "late")


def test_secrets_readable_by_other_users_are_rejected(folder: Path):
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


def test_invalid_key_files_are_reported(folder: Path, other_keys: Path):
    (folder / "client.key_secret").write_bytes((folder / "server.key").read_bytes())
    with pytest.raises(ConfigError, match=r"client\.key_secret does not contain a valid key pair"):
        load_client_keys(folder)
    mixed = (folder / "server.key_secret").read_text().splitlines()[:3]
    mixed += (other_keys / "server.key_secret").read_text().splitlines()[3:]
    (folder / "server.key_secret").write_text("\n".join(mixed))
    with pytest.raises(ConfigError, match=r"server\.key_secret does not contain a valid"):
        load_server_keys(folder)
    (other_keys / "server.key").write_text('public-key = "short"')
    with pytest.raises(ConfigError, match=r"server\.key does not have 40 characters"):
        load_client_keys(other_keys)


def test_secret_keys_are_not_in_repr(folder: Path):
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
def test_keys_are_required_by_host_and_security(
    folder: Path, host: str, security: str, has_keys: bool
):
    cluster = ClusterConfig.model_validate(
        {"host": host, "security": security, "keys": str(folder)}
    )
    assert (client_keys(cluster) is not None) == has_keys
    assert (server_keys(cluster) is not None) == has_keys


def test_libzmq_supports_curve():
    assert zmq.has("curve")
