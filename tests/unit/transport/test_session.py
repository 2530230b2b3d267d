"""Sessions: exactly-once, in-order delivery over a lossy connection."""

import random
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from speed_async.transport.messages import Message, Welcome
from speed_async.transport.session import Receipt, Session


def enqueue_versions(session: Session, *versions: int) -> None:
    for version in versions:
        session.enqueue(Welcome(policy_version=version))


def flush(session: Session) -> list[Message]:
    """Pass all unsent messages to the transport."""
    messages = []
    while session.has_unsent:
        messages.append(session.next_unsent())
        session.mark_queued()
    return messages


def versions(messages: list[Message]) -> list[int]:
    return [message.policy_version for message in messages if isinstance(message, Welcome)]


def test_messages_are_numbered_and_kept_until_acknowledged() -> None:
    session = Session()
    enqueue_versions(session, 7, 8)
    assert [message.number for message in flush(session)] == [1, 2]
    assert session.num_unacked == 2
    session.arrived(Welcome(policy_version=0, number=1, received=1))
    assert session.num_unacked == 1
    assert session.received == 1


def test_duplicates_and_gaps_are_detected_by_number() -> None:
    session = Session()
    assert session.arrived(Welcome(policy_version=0, number=1)) is Receipt.NEW
    assert session.arrived(Welcome(policy_version=0, number=1)) is Receipt.DUPLICATE
    assert session.arrived(Welcome(policy_version=0, number=3)) is Receipt.GAP
    assert session.arrived(Welcome(policy_version=0)) is Receipt.UNNUMBERED
    assert session.received == 1


def test_rewind_retransmits_all_later_messages() -> None:
    session = Session()
    enqueue_versions(session, 1, 2, 3)
    flush(session)
    assert session.rewind(1)
    assert versions(flush(session)) == [2, 3]


def test_acknowledged_messages_cannot_be_retransmitted() -> None:
    session = Session()
    enqueue_versions(session, 1, 2)
    flush(session)
    session.arrived(Welcome(policy_version=0, received=2))
    assert not session.rewind(1)


@given(seed=st.integers(0, 2**32), num_messages=st.integers(1, 40))
def test_lossy_connection_delivers_each_message_once(seed: int, num_messages: int) -> None:
    rng = random.Random(seed)
    sender, receiver = Session(), Session()
    in_transit: deque[Message] = deque()
    received: list[int] = []
    next_version = 0
    while len(received) < num_messages:
        match rng.choice(["add", "send", "deliver", "lose", "nack"]):
            case "add" if next_version < num_messages:
                enqueue_versions(sender, next_version)
                next_version += 1
            case "send" if sender.has_unsent:
                in_transit.append(sender.next_unsent())
                sender.mark_queued()
            case "deliver" if in_transit:
                message = in_transit.popleft()
                if receiver.arrived(message) is Receipt.NEW:
                    received += versions([message])
            case "lose":  # a random number of messages in transit
                for _ in range(rng.randint(0, len(in_transit))):
                    in_transit.popleft()
            case "nack":  # like Nack or Ack
                assert sender.rewind(receiver.received)
    assert received == list(range(num_messages))
