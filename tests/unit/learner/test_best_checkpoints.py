"""The best checkpoint of each suite is kept and linked."""

import json
from pathlib import Path

from speed_async.learner.checkpoint.best import BestCheckpoints
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions, prune


def save(root: Path, version: int) -> None:
    checkpoint_folder(root, version).mkdir(parents=True)


def test_the_best_checkpoint_of_a_suite_is_linked_and_not_removed(tmp_path: Path) -> None:
    best = BestCheckpoints(tmp_path)
    for version, accuracy in ((10, 0.2), (20, 0.6), (30, 0.6), (40, 0.3)):
        best.began("hard", version)
        save(tmp_path, version)
        prune(tmp_path, 1, best.kept)
        best.ended("hard", version, accuracy)
    assert kept_versions(tmp_path) == [20, 40]
    assert (tmp_path / "best-hard").readlink() == Path("version-000020")
    record = json.loads((tmp_path / "best.json").read_text())
    assert record == {"hard": {"policy_version": 20, "accuracy": 0.6}}


def test_a_checkpoint_is_kept_while_its_version_is_evaluated(tmp_path: Path) -> None:
    best = BestCheckpoints(tmp_path)
    best.began("hard", 10)
    for version in (10, 20, 30):
        save(tmp_path, version)
        oldest = prune(tmp_path, 1, best.kept)
    assert (kept_versions(tmp_path), oldest) == ([10, 30], 30)
    best.ended("hard", 10, 0.1)
    assert (tmp_path / "best-hard").resolve() == checkpoint_folder(tmp_path, 10)


def test_a_version_without_a_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    best = BestCheckpoints(tmp_path)
    save(tmp_path, 20)
    best.ended("hard", 10, 0.9)
    best.ended("hard", 20, 0.4)
    assert best.kept == {20}
    assert (tmp_path / "best-hard").readlink() == Path("version-000020")


def test_a_result_that_is_faster_than_the_checkpoint_is_taken_up_later(tmp_path: Path) -> None:
    best = BestCheckpoints(tmp_path)
    best.ended("hard", 20, 0.4)
    assert not (tmp_path / "best-hard").is_symlink()
    save(tmp_path, 20)
    best.update()
    assert (tmp_path / "best-hard").readlink() == Path("version-000020")


def test_a_later_attempt_keeps_the_best_of_earlier_ones(tmp_path: Path) -> None:
    save(tmp_path, 20)
    save(tmp_path, 40)
    BestCheckpoints(tmp_path).ended("hard", 20, 0.4)
    later = BestCheckpoints(tmp_path)
    later.ended("hard", 20, 0.4)  # sent again when the learner reconnects
    later.ended("hard", 40, 0.3)
    assert later.kept == {20}
    assert (tmp_path / "best-hard").readlink() == Path("version-000020")
    checkpoint_folder(tmp_path, 20).rename(tmp_path / "version-000020.damaged")
    assert BestCheckpoints(tmp_path).kept == set()


def test_a_result_waits_for_its_checkpoint_also_when_a_later_one_comes_first(
    tmp_path: Path,
) -> None:
    best = BestCheckpoints(tmp_path)
    for version, accuracy in ((10, 0.9), (11, 0.2)):
        best.began("hard", version)
        best.ended("hard", version, accuracy)
    assert best.kept == {10, 11}
    save(tmp_path, 10)
    best.update()
    assert (tmp_path / "best-hard").readlink() == Path("version-000010")
    save(tmp_path, 20)
    best.update()
    assert best.kept == {10}
