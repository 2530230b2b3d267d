"""Notices of the learner."""

import errno
import sys

import pytest

from speed_async.learner.notices import Notices


def test_the_newest_notice_is_sent_once_and_all_are_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    notices = Notices(["a checkpoint was damaged"])
    assert notices.take_unsent() == ""  # it is sent when the learner connects
    notices.add("update 3 was skipped")
    notices.log("stopping")
    assert notices.take_unsent() == "update 3 was skipped"
    assert notices.take_unsent() == ""
    assert notices.all == ["a checkpoint was damaged", "update 3 was skipped"]
    assert capsys.readouterr().err == "update 3 was skipped\nstopping\n"


def test_a_log_on_a_full_disk_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", FullDisk())
    notices = Notices()
    notices.add("update 3 was skipped")
    assert notices.take_unsent() == "update 3 was skipped"
