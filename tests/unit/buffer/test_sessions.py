"""The sessions of the service: acknowledgements, holding and release of messages."""

from speed_async.buffer.sessions import MESSAGES_LOST, Sessions, SessionsState
from speed_async.transport import messages as m
from speed_async.transport.session import Ack


def connected(num_sent: int = 3) -> Sessions:
    """Sessions with one peer whose Hello was processed and to which `num_sent` messages were
    sent."""
    sessions = Sessions(SessionsState())
    hello = m.Hello(number=1, role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
    assert sessions.admit("actor-1.0", hello, 0.0)
    sessions.record_received("actor-1.0", hello)
    for _ in range(num_sent):
        sessions.enqueue("actor-1.0", m.Welcome(policy_version=0))
        assert sessions.next_unsent("actor-1.0") is not None
        sessions.mark_queued("actor-1.0")
    return sessions


def test_peer_that_acknowledges_lost_messages_is_rejected() -> None:
    sessions = connected(num_sent=3)
    for message in (
        m.TakeBatch(number=2, received=4, policy_version=0, num_groups=1),
        Ack(received=4),
    ):
        assert not sessions.admit("actor-1.0", message, 0.0)
        assert sessions.replies.pop() == ("actor-1.0", m.Rejected(reason=MESSAGES_LOST))
    known = m.TakeBatch(number=2, received=3, policy_version=0, num_groups=1)
    assert sessions.admit("actor-1.0", known, 0.0)
    assert sessions.replies == []


def test_record_ack_records_the_acknowledgement_without_acknowledging_the_message() -> None:
    sessions = connected(num_sent=3)
    late = m.TakeBatch(number=2, received=2, policy_version=0, num_groups=1)
    assert sessions.admit("actor-1.0", late, 0.0)
    sessions.record_ack("actor-1.0", late)
    assert sessions.num_unacked("actor-1.0") == 1
    assert sessions.due_acks({"actor-1.0"}) == []  # no new acknowledgement is due
    assert sessions.admit("actor-1.0", late, 0.0)  # it was not processed


def test_held_messages_are_released_in_the_order_of_their_seals() -> None:
    sessions = connected(num_sent=1)
    sessions.holding = True
    peer = "actor-1.0"

    def process(number: int) -> None:
        message = m.TakeBatch(number=number, received=1, policy_version=0, num_groups=1)
        assert sessions.admit(peer, message, 0.0)
        sessions.record_received(peer, message)
        sessions.enqueue(peer, m.Welcome(policy_version=number))

    process(2)
    assert sessions.next_unsent(peer) is None
    first = sessions.seal()
    process(3)
    sessions.enqueue("unknown", m.Rejected(reason="no"))
    second = sessions.seal()
    assert sessions.next_unsent(peer) is None
    assert sessions.due_acks({peer}) == []
    sessions.release(first)
    message = sessions.next_unsent(peer)
    assert message == m.Welcome(policy_version=2, number=2, received=2)
    sessions.mark_queued(peer)
    assert sessions.next_unsent(peer) is None
    assert sessions.due_acks({peer}) == []
    assert not sessions.has_unsent("unknown")
    sessions.release(second)
    assert sessions.next_unsent(peer) == m.Welcome(policy_version=3, number=3, received=3)
    assert sessions.next_unsent("unknown") == m.Rejected(reason="no")


def test_message_after_a_seal_is_not_acknowledged_with_it() -> None:
    sessions = connected(num_sent=0)
    sessions.holding = True
    sealed = sessions.seal()
    late = m.TakeBatch(number=2, policy_version=0, num_groups=1)
    sessions.record_received("actor-1.0", late)
    sessions.enqueue("actor-1.0", m.Welcome(policy_version=7))
    sessions.release(sealed)
    assert sessions.next_unsent("actor-1.0") is None
    acks = sessions.due_acks({"actor-1.0"})
    assert [ack for _, ack in acks] in ([], [Ack(received=1)])
