"""The marks that keep tests which share a run on one worker."""

import pytest


@pytest.mark.xdist_group("groups")
def test_tests_of_a_group_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist schedules by a suffix of the test's id. A pytest that it does not know drops it
    silently, and each worker then starts the shared runs again."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("needs --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
