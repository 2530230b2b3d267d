"""Invalid frames are rejected and leave no state.

`python -m tests.faults.fuzz` runs longer.
"""

import asyncio
import gc
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from speed_async.errors import DeadlineExceeded, ProtocolError
from speed_async.transport.codec import MAGIC, NUMBERS, decode, encode
from speed_async.transport.messages import PROTOCOL_VERSION, Goodbye, WantWork
from speed_async.transport.peer_names import new_identity
from speed_async.transport.schemas import SCHEMAS
from speed_async.transport.zeromq import open_hub, open_link
from speed_async.types import ActorCounts
from tests.faults.fuzz import fuzz
from tests.faults.fuzz_frames import DEEP_VALUE, FrameMutator, corpus
from tests.faults.fuzz_target import (
    CORRECT_ACTOR,
    FAULTY_ACTOR,
    Target,
    UnknownPeers,
    groups_balance,
)

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
SLOW_SETTINGS = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    return folder


def test_corpus_contains_every_message_of_the_protocol():
    assert {type(message).__name__ for message in corpus()} == set(SCHEMAS)
    for message in corpus():
        assert type(decode(encode(message))) is type(message)


@SLOW_SETTINGS
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_corrupted_frames_are_rejected_or_decode_to_valid_messages(seed: int, count: int):
    mutator = FrameMutator(seed)
    for _ in range(count):
        try:
            message = decode(mutator.next())
        except ProtocolError as error:
            assert len(str(error)) < 1000
            continue
        encode(replace(message))  # an accepted message can be encoded from its fields


def test_deeply_nested_values_are_rejected():
    start = bytes(NUMBERS.size) + b"\x95" + b"\xab" + MAGIC.encode() + bytes([PROTOCOL_VERSION])
    for header in (start + DEEP_VALUE + b"\x80\x90", start + b"\xa5Probe" + DEEP_VALUE + b"\x90"):
        with pytest.raises(ProtocolError):
            decode([header])


@settings(SLOW_SETTINGS, max_examples=40)
@given(seed=st.integers(0, 2**32))
@example(seed=1_596_841_420)  # one of the frames is a valid Join, which is no grant for others
def test_unknown_peers_change_nothing_and_members_only_their_own_state(model: Path, seed: int):
    mutator, peers = FrameMutator(seed), UnknownPeers(seed)
    target = Target(model)
    before = target.digest()
    for _ in range(100):
        target.receive(peers.next(), mutator.next())
    assert target.digest() == before
    sessions = len(target.machine.sessions._sessions)
    assert sessions <= 3
    leases = target.machine.service.lifecycle.leases.of_holder(CORRECT_ACTOR)
    for _ in range(20):
        target.receive(FAULTY_ACTOR, mutator.next())
    assert groups_balance(target)
    after = target.machine.service.lifecycle.leases.of_holder(CORRECT_ACTOR)
    assert [entry.lease for entry in after][: len(leases)] == [entry.lease for entry in leases]
    num_before, want = target.num_delivered, WantWork(num_prompts=1, counts=ActorCounts())
    target.receive(CORRECT_ACTOR, [bytes(frame) for frame in encode(want)])
    assert target.num_delivered == num_before + 1


def test_flood_under_new_names_does_not_grow_memory(model: Path):
    mutator, peers, target = FrameMutator(0), UnknownPeers(0), Target(model)
    frames = [mutator.next() for _ in range(500)]

    def flood() -> None:
        for number in range(5000):
            target.receive(peers.next(), frames[number % 500])
        target.reasons.clear()
        gc.collect()  # errors and their tracebacks form cycles

    tracemalloc.start()
    try:
        for _ in range(2):  # fill the bounded tables
            flood()
        before, _ = tracemalloc.get_traced_memory()
        flood()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 128 * 1024
    assert len(target.muted) == 4096


def test_command_prints_its_findings(model: Path, capsys: pytest.CaptureFixture[str]):
    assert fuzz(200, 1, model) in (True, False)  # 200 frames do not measure growth
    out = capsys.readouterr().out
    assert "state unchanged by unknown peers: True" in out
    assert "violated invariants: 0" in out


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_hub_serves_other_peers_during_a_flood(run):
    """Real sockets: many connections under new names, each with different frames."""

    async def scenario() -> None:
        hub = await open_hub(HOST, 0)
        good = await open_link(HOST, hub.port, "actor-1.0")
        context = zmq.Context()
        mutator, goodbye = FrameMutator(3), Goodbye(counts=ActorCounts())
        num_received = 0
        try:
            for number in range(150):
                bad = context.socket(zmq.DEALER)
                bad.IDENTITY = new_identity(f"bad-{number}")
                bad.connect(f"tcp://{HOST}:{hub.port}")
                for _ in range(3):
                    bad.send_multipart(mutator.next() or [b""])
                if number % 10 == 0:
                    await good.send(goodbye)
                    while True:
                        peer, message = await hub.receive(TIMEOUT_S)
                        if peer == "actor-1.0":
                            assert message == goodbye
                            num_received += 1
                            break
            while not hub.rejected:  # the others may connect late
                with suppress(DeadlineExceeded):
                    await hub.receive(0.1)
            with pytest.raises(DeadlineExceeded):
                while True:
                    await hub.receive(0.1)
            assert num_received == 15
            assert 0 < hub.rejected <= hub.muted.num_blocked
        finally:
            context.destroy(linger=0)
            await good.close()
            await hub.close()

    run(asyncio.wait_for(scenario(), 3 * TIMEOUT_S))
