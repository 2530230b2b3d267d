"""Warnings of the service: human-readable, shown while they apply, and in at least one event."""

import pytest

from speed_async.buffer.reporting.warnings import TRANSIENT_S
from speed_async.transport import messages as m
from speed_async.types import ActorCounts
from speed_async.weight_sync.process_group import describe_error
from tests.fakes.service_harness import ServiceHarness

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by "
    "peer [127.0.0.1]:10117. This is typically caused by a remote worker crashing. Check the logs "
    "of the remote worker."
)


@pytest.fixture
def harness(tmp_path) -> ServiceHarness:
    harness = ServiceHarness(tmp_path)
    harness.pass_baseline()
    return harness


def new_warnings(harness: ServiceHarness) -> list[str]:
    """Distinct warnings of the events since the last call."""
    texts = [str(event.values["warning"]) for event in harness.events]
    harness.events.clear()
    return [*dict.fromkeys(texts)]


def applied(version: int, error: str = "", *, usable: bool = True) -> m.WeightsApplied:
    return m.WeightsApplied(
        policy_version=version,
        epoch=1,
        pause_s=0.0,
        transfer_s=0.0,
        error=error,
        usable=usable,
        counts=ActorCounts(groups_leased=1, tokens_generated=1),
    )


def test_an_actor_that_dies_during_a_broadcast_is_reported(harness: ServiceHarness) -> None:
    publish = m.PublishWeights(
        policy_version=1, store_host="h", store_port=1, backend="gloo", deadline_s=1.0
    )
    harness.send("learner", publish)
    failed = m.WeightsPublished(
        policy_version=1,
        epoch=1,
        transfer_s=0.1,
        num_bytes=0,
        error=f"manifest failed after 0.0 s ({GLOO}); no response from rank 1",
        missing=["actor-1.0"],
    )
    harness.send("learner", failed)
    assert harness.service.warning == (
        "actor-1 died or was disconnected while it received version 1; its supervisor restarts it"
    )


def test_a_lost_actor_is_reported_until_it_is_back(harness: ServiceHarness) -> None:
    new_warnings(harness)
    harness.wait(harness.config.cluster.peer_timeout_s + 1)
    silent = harness.service.warning
    assert silent.startswith("actor-1 was silent for ")
    harness.wait(10 * TRANSIENT_S)
    assert harness.service.warning == silent
    harness.hello("actor-1.1", 1, incarnation=1)
    harness.wait(0.1)
    harness.wait(0.1)
    assert new_warnings(harness) == [silent, ""]


def test_an_actor_that_is_replaced_at_once_is_reported_in_at_least_one_event(
    harness: ServiceHarness,
) -> None:
    new_warnings(harness)
    harness.hello("actor-1.1", 1, incarnation=1)
    harness.wait(0.1)
    harness.wait(0.1)
    warning = "actor-1 was killed or exited; its supervisor restarts it"
    assert new_warnings(harness) == [warning, ""]


def test_two_lost_actors_have_separate_warnings(harness: ServiceHarness) -> None:
    harness.hello("actor-2.0", 2)
    harness.wait(harness.config.cluster.peer_timeout_s + 1)
    harness.hello("actor-2.1", 2, incarnation=1)
    harness.wait(0.1)
    assert "actor-1 was silent" in harness.service.warning
    assert "actor-2" not in harness.service.warning


def test_weights_that_did_not_arrive_are_reported_until_they_do(harness: ServiceHarness) -> None:
    harness.send("actor-1.0", applied(-1, "cut off"))
    harness.wait(1.0)
    assert harness.service.warning == "actor-1.0 did not apply the weights: cut off"
    harness.send("actor-1.0", applied(0))
    assert harness.service.warning == ""


def test_a_past_event_is_reported_for_a_minute(harness: ServiceHarness) -> None:
    harness.service.begin_attempt(2)
    for index in (1, 2):
        harness.hello(f"actor-{index}.1", index, incarnation=1)
    harness.wait(0.1)
    assert "restarted (attempt 2)" in harness.service.warning
    harness.wait(0.9 * TRANSIENT_S)
    assert "restarted (attempt 2)" in harness.service.warning
    harness.wait(0.2 * TRANSIENT_S)
    assert "restarted" not in harness.service.warning


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (GLOO, "the connection was closed by the peer"),
        ("[../gloo/x/pair.cc:12] Read error: reset by peer", None),
        ("[/a/b/context.cc:1] Timed out waiting 5000ms\nframe #0", "Timed out waiting 5000ms"),
        ("no reply within 5 s", "no reply within 5 s"),
        ("", "RuntimeError"),
    ],
)
def test_a_backend_error_is_reported_without_its_cpp_location(
    raised: str, expected: str | None
) -> None:
    text = describe_error(RuntimeError(raised))
    assert text == (expected or "the connection was closed by the peer")


def test_a_restart_does_not_report_the_actors_of_the_old_attempt(harness: ServiceHarness) -> None:
    harness.service.begin_attempt(1)
    harness.wait(0.1)
    assert harness.service.warning == "restarted (attempt 1) before the first update"
