"""Texts for people: of any length and content they never make a message be refused."""

from dataclasses import replace

import pytest

from speed_async.buffer.validation_rules import MAX_TEXT
from speed_async.transport import messages as m
from speed_async.transport.codec import decode, encode
from speed_async.transport.fields import truncate_middle
from speed_async.types import ActorCounts

COUNTS = ActorCounts()
MESSAGES = [
    (m.Failure(role="learner", message=""), "message"),
    (
        m.LeaseFailed(lease_id=1, reason="", num_completions=0, num_tokens=0, counts=COUNTS),
        "reason",
    ),
    (
        m.Resumed(
            policy_version=1,
            service_sequence=1,
            groups_trained=1,
            completions_trained=1,
            tokens_trained=1,
            recent_lease_ids=[],
        ),
        "notice",
    ),
    (m.Drain(reason=""), "reason"),
    (m.Rejected(reason=""), "reason"),
    (m.FinishRun(policy_version=1, evaluate=False, stopped=False, reason=""), "reason"),
    (m.MembershipChanged(reason="", lost=[]), "reason"),
    (m.Abort(role="learner", message=""), "message"),
]


@pytest.mark.parametrize(("message", "field"), MESSAGES)
def test_long_text_reaches_the_peer_without_its_middle(message: m.Message, field: str) -> None:
    """25 damaged checkpoints made a notice so long that the service refused the resume."""
    sent = replace(message, **{field: "first " + "x" * 100_000 + " last"})
    text = getattr(decode(encode(sent)), field)
    assert len(text) == MAX_TEXT
    assert (
        text.startswith("first ") and text.endswith(" last") and "more characters omitted" in text
    )


@pytest.mark.parametrize(("message", "field"), MESSAGES)
def test_text_that_utf8_cannot_encode_reaches_the_peer(message: m.Message, field: str) -> None:
    sent = replace(message, **{field: "a\ud800b"})
    assert getattr(decode(encode(sent)), field) == "a?b"


def test_middle_of_a_long_text_is_removed() -> None:
    text = truncate_middle("a" * 100 + "b" * 1000 + "c" * 100, 200)
    assert len(text) == 200 and text.startswith("a" * 70) and text.endswith("c" * 70)
    assert "(1000 or more characters omitted)" in text
    assert truncate_middle("short", 200) == "short"
