"""Sessions: what is said comes once and in order, whatever is lost on the way."""

import random
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from speed_async.transport.messages import Message, Welcome
from speed_async.transport.session import Receipt, Session


def said(session: Session, *versions: int) -> None:
    for version in versions:
        session.say(Welcome(policy_version=version))


def sent(session: Session) -> list[Message]:
    """All that is not yet with the transport, handed to it."""
    messages = []
    while session.has_unsent:
        messages.append(session.next_unsent())
        session.queued_one()
    return messages


def versions(messages: list[Message]) -> list[int]:
    return [message.policy_version for message in messages if isinstance(message, Welcome)]


def test_messages_are_numbered_from_one_and_kept_until_heard() -> None:
    session = Session()
    said(session, 7, 8)
    assert [message.number for message in sent(session)] == [1, 2]
    assert session.num_unacked == 2
    session.arrived(Welcome(policy_version=0, number=1, heard=1))
    assert session.num_unacked == 1
    assert session.heard == 1


def test_what_comes_again_or_too_early_is_known_by_its_number() -> None:
    session = Session()
    assert session.arrived(Welcome(policy_version=0, number=1)) is Receipt.NEW
    assert session.arrived(Welcome(policy_version=0, number=1)) is Receipt.AGAIN
    assert session.arrived(Welcome(policy_version=0, number=3)) is Receipt.GAP
    assert session.arrived(Welcome(policy_version=0)) is Receipt.OUTSIDE
    assert session.heard == 1


def test_a_side_that_misses_something_is_told_everything_after_it() -> None:
    session = Session()
    said(session, 1, 2, 3)
    sent(session)
    assert session.rewind(1)
    assert versions(sent(session)) == [2, 3]


def test_what_was_heard_long_ago_cannot_be_said_again() -> None:
    session = Session()
    said(session, 1, 2)
    sent(session)
    session.arrived(Welcome(policy_version=0, heard=2))
    assert not session.rewind(1)


@given(seed=st.integers(0, 2**32), num_messages=st.integers(1, 40))
def test_a_line_that_loses_whole_connections_delivers_each_message_once(
    seed: int, num_messages: int
) -> None:
    rng = random.Random(seed)
    here, there = Session(), Session()
    line: deque[Message] = deque()
    got: list[int] = []
    next_version = 0
    while len(got) < num_messages:
        match rng.choice(["say", "send", "deliver", "cut", "ask"]):
            case "say" if next_version < num_messages:
                said(here, next_version)
                next_version += 1
            case "send" if here.has_unsent:
                line.append(here.next_unsent())
                here.queued_one()
            case "deliver" if line:
                message = line.popleft()
                if there.arrived(message) is Receipt.NEW:
                    got += versions([message])
            case "cut":  # whatever is under way is lost, a part at random
                for _ in range(rng.randint(0, len(line))):
                    line.popleft()
            case "ask":  # as Nack or Ack do
                assert here.rewind(there.heard)
    assert got == list(range(num_messages))
