import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from speed_async.errors import ConfigError
from speed_async.observability.wandb_sink import WandbSink, choose_mode, find_api_key
from tests.fakes.wandb_record import history

pytestmark = pytest.mark.xdist_group("wandb run")

KEY = "0123456789abcdef0123456789abcdef01234567"

OFFLINE_RUN = """
import os
import sys
from pathlib import Path
from speed_async.observability.metrics import Event
from speed_async.observability.sinks import JsonlSink
from speed_async.observability.wandb_sink import WandbSink

lines = JsonlSink(Path(sys.argv[1]))
wandb_sink = WandbSink(
    run_folder=Path(sys.argv[1]), project="tests", config={"run": {"seed": 41}},
)

class sink:  # like the service: one sink after the other
    mode = wandb_sink.mode
    close = wandb_sink.close
    def write(event):
        lines.write(event)
        wandb_sink.write(event)

assert sink.mode == "offline", sink.mode
sink.write(Event(kind="status", values={"wall_s": 0.1, "secret_gauge": 1.0}))
sink.write(Event(kind="step", values={"wall_s": 1.0, "policy_version": 1, "loss": 0.5}))
for number in range(100):
    sample = {"policy_version": 1, "prompt_id": number, "reward": 0.5, "prompt": "1+1="}
    sink.write(Event(kind="sample", values=sample | {"extracted": "2" if number % 2 else None}))
step = {"wall_s": 1.5, "policy_version": 2, "diagnoses": "no reward: x"}
sink.write(Event(kind="step", values=step))
if len(sys.argv) > 2:
    os._exit(0)  # like a kill
sink.write(Event(kind="evaluation", values={"wall_s": 2.0, "policy_version": 1, "accuracy": 0.25}))
sink.write(Event(kind="end", values={"wall_s": 3.0, "ok": True, "reason": "done"}))
sink.close()
sink.close()
"""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process of a run, its record, and the rows it logged."""

    record: Path
    rows: list[dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture(scope="module")
def attempts(folder: Path) -> list[Attempt]:
    """Three attempts of one run in consecutive processes without a key. The first one is killed."""
    environ = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environ |= {"HOME": str(folder / "home")}
    found: dict[Path, Attempt] = {}
    for extra in (["killed"], [], []):
        result = subprocess.run(
            [sys.executable, "-c", OFFLINE_RUN, str(folder / "run"), *extra],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=240,
            cwd=folder,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        for record in (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"):
            if record not in found:
                found[record] = Attempt(record=record, rows=history(record))
    assert len(found) == 3
    return list(found.values())


def test_offline_run_without_a_key_is_written_to_the_run_folder(
    folder: Path, attempts: list[Attempt]
) -> None:
    content = attempts[-1].record.read_bytes()
    for logged in (b"step/loss", b"evaluation/accuracy", b"end/reason", b"seed"):
        assert logged in content
    assert b"secret_gauge" not in content
    assert [path.name for path in folder.iterdir() if path.name != "home"] == ["run"]


def test_resumed_run_continues_the_wandb_run_and_its_steps(
    folder: Path, attempts: list[Attempt]
) -> None:
    run_id = (folder / "run" / "wandb-run-id").read_text().strip()
    assert {attempt.record.stem for attempt in attempts} == {f"run-{run_id}"}
    _, before, resumed = attempts
    assert [row["_step"] for row in before.rows] == [2, 3, 4, 5]
    assert [row["_step"] for row in resumed.rows] == [6, 7, 8, 9]
    assert [row.get("step/loss") for row in resumed.rows] == [0.5, None, None, None]


def test_attempt_after_a_kill_overwrites_no_step(attempts: list[Attempt]) -> None:
    killed, second, _ = attempts
    steps = [row["_step"] for row in killed.rows]
    assert steps == [0, 1][: len(steps)]  # a killed wandb process may lose its last rows
    assert [row["_step"] for row in second.rows] == [2, 3, 4, 5]


def test_samples_are_a_bounded_table_and_diagnoses_are_text(attempts: list[Attempt]) -> None:
    last = attempts[-1]
    rows = last.rows
    assert rows[1]["step/diagnoses"] == "no reward: x"
    # Nested keys of a value are separate items in a row.
    assert ["samples.path" in row for row in rows] == [False, False, True, False]
    assert (rows[2]["samples.nrows"], rows[2]["samples.ncols"]) == (64, 11)
    file = last.record.parent / "files" / str(rows[2]["samples.path"])
    content = json.loads(file.read_text())
    sample = dict(zip(content["columns"], content["data"][-1], strict=True))
    assert (sample["prompt_id"], sample["prompt"], sample["extracted"]) == (99, "1+1=", "2")


def test_api_key_is_read_from_the_environment_or_netrc(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    environ = {"NETRC": str(file)}
    assert find_api_key(environ, host="wandb.example.org") == KEY
    assert find_api_key(environ, host="elsewhere.example.org") is None
    assert find_api_key(environ | {"WANDB_API_KEY": "mine"}, host="any") == "mine"
    assert find_api_key({"HOME": str(tmp_path / "nobody")}, host="wandb.example.org") is None


def test_netrc_default_entry_is_not_a_key(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("default login anonymous password guest\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert find_api_key({"HOME": str(tmp_path)}, host="api.wandb.ai") is None


@pytest.mark.parametrize(
    ("requested", "has_key", "mode"),
    [
        (None, False, "offline"),
        (None, True, "online"),
        ("online", False, "offline"),
        ("offline", True, "offline"),
        ("disabled", True, "disabled"),
    ],
)
def test_mode_depends_on_the_key_and_the_environment(
    requested: str | None, has_key: bool, mode: str
) -> None:
    environ = {} if requested is None else {"WANDB_MODE": requested}
    assert choose_mode(environ, has_key=has_key) == mode


def test_malformed_api_key_error_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'observe\.wandb'.*WANDB_MODE=offline"):
        WandbSink(
            run_folder=tmp_path, project="tests", config={}, environ={"WANDB_API_KEY": "short"}
        )
