"""The service's conversations: what is confirmed was taken in, and what was told is known."""

from speed_async.buffer.sessions import FORGOTTEN, Sessions
from speed_async.transport import messages as m
from speed_async.transport.session import Ack


def talking(num_said: int = 3) -> Sessions:
    """With one peer whose first message was taken in, and to whom so much was said."""
    conversations = Sessions()
    hello = m.Hello(number=1, role="actor", index=1, incarnation=0, fingerprint="f", process_id=1)
    assert conversations.admit("actor-1.0", hello, 0.0)
    conversations.record_received("actor-1.0", hello)
    for _ in range(num_said):
        conversations.enqueue("actor-1.0", m.Welcome(policy_version=0))
        assert conversations.next_unsent("actor-1.0") is not None
        conversations.queued_one("actor-1.0")
    return conversations


def test_a_peer_that_heard_more_than_was_said_is_refused_for_the_tail_is_lost() -> None:
    conversations = talking(num_said=3)
    for message in (m.TakeBatch(number=2, heard=4, policy_version=0, num_groups=1), Ack(heard=4)):
        assert not conversations.admit("actor-1.0", message, 0.0)
        assert conversations.replies.pop() == ("actor-1.0", m.Rejected(reason=FORGOTTEN))
    known = m.TakeBatch(number=2, heard=3, policy_version=0, num_groups=1)
    assert conversations.admit("actor-1.0", known, 0.0)
    assert conversations.replies == []


def test_what_is_overheard_is_not_confirmed_and_what_its_sender_heard_is_noted() -> None:
    conversations = talking(num_said=3)
    late = m.TakeBatch(number=2, heard=2, policy_version=0, num_groups=1)
    assert conversations.admit("actor-1.0", late, 0.0)
    conversations.record_ack("actor-1.0", late)
    assert conversations.num_unacked("actor-1.0") == 1
    assert conversations.due_acks({"actor-1.0"}) == []  # nothing new to be told of
    assert conversations.admit("actor-1.0", late, 0.0)  # it would be taken in still


def test_what_is_held_leaves_in_the_order_of_its_seals() -> None:
    conversations = talking(num_said=1)
    conversations.holding = True
    peer = "actor-1.0"

    def take_in(number: int) -> None:
        message = m.TakeBatch(number=number, heard=1, policy_version=0, num_groups=1)
        assert conversations.admit(peer, message, 0.0)
        conversations.record_received(peer, message)
        conversations.enqueue(peer, m.Welcome(policy_version=number))

    take_in(2)
    assert conversations.next_unsent(peer) is None
    first = conversations.seal()
    take_in(3)
    conversations.enqueue("stranger", m.Rejected(reason="no"))
    second = conversations.seal()
    assert conversations.next_unsent(peer) is None
    assert conversations.due_acks({peer}) == []
    conversations.release(first)
    said = conversations.next_unsent(peer)
    assert said == m.Welcome(policy_version=2, number=2, heard=2)
    conversations.queued_one(peer)
    assert conversations.next_unsent(peer) is None
    assert conversations.due_acks({peer}) == []
    assert not conversations.has_unsent("stranger")
    conversations.release(second)
    assert conversations.next_unsent(peer) == m.Welcome(policy_version=3, number=3, heard=3)
    assert conversations.next_unsent("stranger") == m.Rejected(reason="no")


def test_a_peer_first_heard_behind_a_seal_is_not_confirmed_with_it() -> None:
    conversations = talking(num_said=0)
    conversations.holding = True
    sealed = conversations.seal()
    late = m.TakeBatch(number=2, policy_version=0, num_groups=1)
    conversations.record_received("actor-1.0", late)
    conversations.enqueue("actor-1.0", m.Welcome(policy_version=7))
    conversations.release(sealed)
    assert conversations.next_unsent("actor-1.0") is None
    word = conversations.due_acks({"actor-1.0"})
    assert [heard for _, heard in word] in ([], [Ack(heard=1)])
