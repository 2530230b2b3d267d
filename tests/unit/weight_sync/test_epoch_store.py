"""The messages of one epoch, in a real store."""

import threading

import pytest

from speed_async.weight_sync.epoch_store import EpochStore, run_bounded
from speed_async.weight_sync.process_group import MemberLeft, host_store

SHORT_S, LONG_S = 0.05, 60.0


@pytest.fixture
def messages() -> EpochStore:
    """Of rank 0 and two receivers."""
    return EpochStore(host_store("127.0.0.1", LONG_S), epoch=3, world_size=3)


def test_one_value_of_every_receiver_is_gathered_and_deleted(messages: EpochStore) -> None:
    messages.set("verdict", 0, 1, value="")
    messages.set("verdict", 0, 2, value="too large")
    gathered = messages.gather("verdict", 0, absence="did not answer", timeout_s=LONG_S, lost=())
    assert gathered == {1: "", 2: "too large"}
    messages.delete_gathered("verdict", 0)
    assert not messages.has("verdict", 0, 1) and not messages.has("verdict", 0, 2)


def test_a_receiver_without_a_value_is_named_at_the_timeout(messages: EpochStore) -> None:
    messages.set("joined", 0, 1, value="")
    with pytest.raises(MemberLeft, match="rank 2 never joined") as raised:
        messages.gather("joined", 0, absence="never joined", timeout_s=SHORT_S, lost=())
    assert raised.value.ranks == (2,)


def test_a_lost_receiver_without_a_value_ends_the_wait_at_once(messages: EpochStore) -> None:
    with pytest.raises(MemberLeft, match="rank 1 never joined"):
        messages.gather("joined", 0, absence="never joined", timeout_s=LONG_S, lost={1})


def test_receivers_that_have_ended_another_transfer_are_unresponsive(messages: EpochStore) -> None:
    messages.set("ended", 1, value="7")
    messages.set("ended", 2, value="6")
    assert messages.ranks_without("7", "ended", timeout_s=SHORT_S) == [2]


def test_epochs_in_one_store_have_messages_of_their_own() -> None:
    store = host_store("127.0.0.1", LONG_S)
    old, new = (EpochStore(store, epoch=epoch, world_size=2) for epoch in (1, 2))
    old.set("go", value="old")
    assert old.wait_for("go", absence="none", timeout_s=LONG_S) == b"old"
    with pytest.raises(RuntimeError, match="the sender did not start"):
        new.wait_for("go", absence="the sender did not start", timeout_s=SHORT_S)


def test_a_call_that_never_returns_is_abandoned() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        run_bounded(never.wait, SHORT_S)
    never.set()
