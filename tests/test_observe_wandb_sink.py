import os
import subprocess
import sys
from pathlib import Path

import pytest

from speed_async.errors import ConfigError
from speed_async.observe.wandb_sink import WandbSink, choose_mode, find_api_key

KEY = "0123456789abcdef0123456789abcdef01234567"

OFFLINE_RUN = """
import sys
from pathlib import Path
from speed_async.observe.metrics import Event
from speed_async.observe.wandb_sink import WandbSink

sink = WandbSink(
    run_folder=Path(sys.argv[1]), project="tests", config={"run": {"seed": 41}},
)
assert sink.mode == "offline", sink.mode
sink.write(Event(kind="status", values={"wall_s": 0.1, "secret_gauge": 1.0}))
sink.write(Event(kind="step", values={"wall_s": 1.0, "policy_version": 1, "loss": 0.5}))
sink.write(Event(kind="evaluation", values={"wall_s": 2.0, "policy_version": 1, "accuracy": 0.25}))
sink.write(Event(kind="end", values={"ok": True, "reason": "done"}))
sink.close()
sink.close()
"""


def test_without_a_key_a_silent_offline_run_is_written_into_the_run_folder(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environ |= {"HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path / "run")],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for logged in (b"step/loss", b"evaluation/accuracy", b"end/reason", b"seed"):
        assert logged in content
    assert b"secret_gauge" not in content
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["run"]


def test_a_run_that_is_resumed_goes_on_as_the_same_run_of_wandb(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environ |= {"HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OFFLINE_RUN, str(tmp_path / "run")]
    for _ in range(2):
        done = subprocess.run(command, env=environ, capture_output=True, timeout=60, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    records = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "run" / "wandb-run-id").read_text().strip()
    assert {record.stem for record in records} == {f"run-{run_id}"}


def test_the_key_is_found_in_the_environment_or_in_netrc(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    environ = {"NETRC": str(file)}
    assert find_api_key(environ, host="wandb.example.org") == KEY
    assert find_api_key(environ, host="elsewhere.example.org") is None
    assert find_api_key(environ | {"WANDB_API_KEY": "mine"}, host="any") == "mine"
    assert find_api_key({"HOME": str(tmp_path / "nobody")}, host="wandb.example.org") is None


def test_a_default_entry_of_netrc_is_no_key(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("default login anonymous password guest\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert find_api_key({"HOME": str(tmp_path)}, host="api.wandb.ai") is None


@pytest.mark.parametrize(
    ("asked", "has_key", "mode"),
    [
        (None, False, "offline"),
        (None, True, "online"),
        ("online", False, "offline"),
        ("offline", True, "offline"),
        ("disabled", True, "disabled"),
    ],
)
def test_the_mode_follows_the_key_and_the_users_word(
    asked: str | None, has_key: bool, mode: str
) -> None:
    environ = {} if asked is None else {"WANDB_MODE": asked}
    assert choose_mode(environ, has_key=has_key) == mode


def test_a_malformed_key_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'observe\.wandb'.*WANDB_MODE=offline"):
        WandbSink(
            run_folder=tmp_path, project="tests", config={}, environ={"WANDB_API_KEY": "short"}
        )
