"""Runs that are resumed after one of their inputs has changed: rejected by name, left unchanged."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from speed_async.buffer.durability.journal import Journal, segments
from speed_async.environments.arithmetic import ArithmeticTask
from speed_async.launcher.identity.content import NUM_SAMPLES, SAMPLE_BYTES, sample_digest
from tests.fakes.command_line import run_command
from tests.fakes.paths import MODEL, REPOSITORY
from tests.fakes.run_process import SMALL, Run, resume_train, start_torchrun, start_train

pytestmark = pytest.mark.xdist_group("changed run")

# Without a gate every group is trained on, regardless of its pass rate.
CONFIG = SMALL.replace('"speed-rloo"', '"rloo"').replace(
    'name = "arithmetic"\nmax_digits = 4\nnum_prompts = 512\n',
    'name = "jsonl"\npath = "data.jsonl"\n',
)
NUM_TRAIN, NUM_HELD_OUT = 47, 8
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


FLAGS = {"do_sample": False, "temperature": 0.6}
"""Sampling flags: transformers loads a model with them, but cannot save it."""
SCORING = "the scoring code (speed_async.environments.jsonl.JsonlTask)"


def make_parts(folder: Path) -> None:
    """Create a configuration with its own data and model in `folder`."""
    shutil.copytree(MODEL, folder / "model")
    for name, values in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("generation_config.json", FLAGS),
    ):
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    task = ArithmeticTask(
        num_prompts=NUM_TRAIN + NUM_HELD_OUT, num_held_out=1, max_digits=4, seed=1
    )
    rows = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in task.train_prompts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(model="model"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A completed run of three updates with a chat template."""
    folder = tmp_path_factory.mktemp("ended")
    make_parts(folder)
    chat = ("--model.chat_template", "true")
    run = start_train(folder, *chat, config=folder / "config.toml")
    run.wait_for_steps(1)
    status, _, err = run.finish()
    assert status == 0, err
    return run


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def changed(path: Path, new: bytes) -> Iterator[None]:
    old = path.read_bytes()
    assert new != old
    path.write_bytes(new)
    try:
        yield
    finally:
        path.write_bytes(old)


def refusal(run: Run, *overrides: str) -> str:
    """Resume the run and return the error; asserts that the run folder is unchanged."""
    before = content(run.folder)
    folder = str(run.folder)
    ended = run_command(
        run.folder.parent, "train", "--resume", folder, "--run.updates", "9", *overrides
    )
    return checked_error(run, ended, before)


def refusal_of_this_package(run: Run, *overrides: str) -> str:
    """Like `refusal`, by the package beside the run folder: Python looks there first."""
    before = content(run.folder)
    ended = resume_train(run, "--run.updates", "9", *overrides).finish()
    return checked_error(run, ended, before)


def checked_error(
    run: Run, ended: tuple[int, str, str], before: dict[str, tuple[int, bytes]]
) -> str:
    status, out, err = ended
    assert (status, out) == (1, "")
    assert content(run.folder) == before
    assert len(err.splitlines()) == 1
    return err


def without_a_line(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(lines[:4] + lines[5:])


def reversed_lines(data: bytes) -> bytes:
    return b"".join(reversed(data.splitlines(keepends=True)))


def with_another_answer(data: bytes) -> bytes:
    first, rest = data.split(b"\n", 1)
    return json.dumps(json.loads(first) | {"answer": "1"}).encode() + b"\n" + rest


def with_another_prompt(data: bytes) -> bytes:
    first, rest = data.split(b"\n", 1)
    return json.dumps(json.loads(first) | {"prompt": "1+1="}).encode() + b"\n" + rest


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (without_a_line, "different numbers of prompts"),
        (reversed_lines, "the same prompts in a different order"),
        (with_another_answer, "the same prompts with different answers"),
        (with_another_prompt, "different prompts"),
    ],
)
def test_changed_data_are_rejected_with_the_difference(
    ended: Run, change: Callable[[bytes], bytes], how: str
) -> None:
    path = ended.folder.parent / "data.jsonl"
    with changed(path, change(path.read_bytes())):
        error = refusal(ended)
    assert f"error: the run in '{ended.folder}' cannot be resumed, and was left unchanged" in error
    assert f"the data in '{path}' changed ({how}): {NUM_TRAIN} prompts and {NUM_HELD_OUT}" in error
    assert "(if they were moved: --task.path FILE)" in error
    assert f"--model.path '{ended.folder / 'checkpoints' / 'version-000003'}'" in error


def test_data_reduced_below_the_minimum_are_rejected_as_changed(ended: Run) -> None:
    with changed(ended.folder.parent / "data.jsonl", b'{"prompt": "1+1=", "answer": "2"}\n'):
        assert f"the data of the run in '{ended.folder}' cannot be loaded again" in refusal(ended)


def weights_times_two(folder: Path) -> bytes:
    """Weights of another model with the same shapes, in a file of the same size."""
    path = folder / "twice.safetensors"
    tensors = load_file(folder / "model" / "model.safetensors")
    save_file({name: 2 * value for name, value in tensors.items()}, path, {"format": "pt"})
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("model.safetensors", None, "model"),
        ("config.json", lambda old: old + b" ", "model"),
        ("generation_config.json", lambda old: old + b" ", "model"),
        ("tokenizer.json", lambda old: old + b" ", "tokenizer"),
        (
            "tokenizer_config.json",
            lambda old: json.dumps(json.loads(old) | {"add_bos_token": True}).encode(),
            "tokenizer",
        ),
        (
            "tokenizer_config.json",
            lambda old: json.dumps(
                json.loads(old) | {"chat_template": "Solve: " + TEMPLATE}
            ).encode(),
            "chat template",
        ),
    ],
)
def test_changed_model_tokenizer_or_template_is_rejected_by_file(
    ended: Run, file: str, change: Callable[[bytes], bytes] | None, part: str
) -> None:
    path = ended.folder.parent / "model" / file
    old = path.read_bytes()
    new = change(old) if change is not None else weights_times_two(ended.folder.parent)
    with changed(path, new):
        error = refusal(ended)
    assert f"the {part} in '{path.parent}' changed: {file} was " in error
    assert "(if they were moved: --model.path FOLDER)" in error
    saved = json.loads((ended.folder / "identity.json").read_text())["things"][part]
    assert f"{file} was {saved['parts'][file][:8]}, is " in error


def test_full_weights_are_compared_not_only_samples(ended: Run) -> None:
    path = ended.folder.parent / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    step = (len(content) - SAMPLE_BYTES) // (NUM_SAMPLES - 1)
    assert step > 2 * SAMPLE_BYTES
    content[step + step // 2] ^= 1  # between two samples
    before = sample_digest(path)
    with changed(path, bytes(content)):
        assert sample_digest(path) == before
        error = refusal(ended)
    assert f"the model weights in '{path.parent}' changed: model.safetensors was " in error


def test_all_differences_are_reported_together(ended: Run) -> None:
    data, tokenizer = (
        ended.folder.parent / name for name in ("data.jsonl", "model/tokenizer.json")
    )
    before = content(ended.folder)
    with (
        changed(data, without_a_line(data.read_bytes())),
        changed(tokenizer, tokenizer.read_bytes() + b" "),
    ):
        command = ("train", "--resume", str(ended.folder), "--run.updates", "9")
        _, _, err = run_command(ended.folder.parent, *command)
    assert content(ended.folder) == before
    assert "\n  the data in " in err
    assert "\n  the tokenizer in " in err


@pytest.mark.parametrize(
    ("name", "option"), [("data.jsonl", "--task.path"), ("model", "--model.path")]
)
def test_another_path_with_other_content_is_rejected(ended: Run, name: str, option: str) -> None:
    path = ended.folder.parent / name
    other = ended.folder.parent / "elsewhere"
    if path.is_dir():
        shutil.copytree(path, other)
        (other / "config.json").write_text((other / "config.json").read_text() + " ")
    else:
        other.write_bytes(without_a_line(path.read_bytes()))
    try:
        error = refusal(ended, option, str(other))
    finally:
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    assert f"in '{other}' (previously in '{path}') changed" in error


def test_configuration_edited_in_the_run_folder_is_rejected(ended: Run) -> None:
    path = ended.folder / "config.json"
    tree = json.loads(path.read_text())
    tree["gate"]["n_cont"] = 4
    with changed(path, json.dumps(tree).encode()):
        error = refusal(ended)
    assert error == (
        f"error: config field 'gate.n_cont' = 4: this run started with 2, and '{path}' was edited "
        "since; restore the value, or start a new run\n"
    )


def test_checkpoint_of_another_run_is_rejected(ended: Run) -> None:
    """Its versions would match; only its run id differs."""
    folder = ended.folder / "checkpoints" / "version-000003"
    trainer = folder / "training" / "trainer.json"
    record = json.loads(trainer.read_text())
    assert record["run_id"] == json.loads((ended.folder / "identity.json").read_text())["run_id"]
    with changed(trainer, json.dumps(record | {"run_id": 32 * "0"}).encode()):
        assert f"checkpoint '{folder}' belongs to another run (00000000, " in refusal(ended)


def test_unreadable_identity_is_an_error_with_a_remedy(ended: Run) -> None:
    path = ended.folder / "identity.json"
    with changed(path, path.read_bytes()[:-9]):
        assert f"error: '{path}' cannot be read" in refusal(ended)


def test_without_an_identity_the_journal_identifies_data_and_model(ended: Run) -> None:
    path, data = ended.folder / "identity.json", ended.folder.parent / "data.jsonl"
    tokenizer = ended.folder.parent / "model" / "tokenizer.json"
    identity = path.read_bytes()
    path.unlink()
    try:
        with changed(data, reversed_lines(data.read_bytes())):
            assert "was written with another data (fingerprint" in refusal(ended)
        with changed(tokenizer, tokenizer.read_bytes() + b" "):
            assert "was written with another model (fingerprint" in refusal(ended)
    finally:
        path.write_bytes(identity)


def test_journal_with_the_format_of_another_release_is_rejected(ended: Run) -> None:
    [*_, newest] = sorted((ended.folder / "journal").glob("*.journal"))
    with changed(newest, b"saj1" + newest.read_bytes()[4:]):
        assert "was written by another release (it has format saj1" in refusal(ended)


def test_journal_with_the_protocol_of_another_release_is_rejected(ended: Run) -> None:
    folder = ended.folder / "journal"
    journal = Journal.begin(folder, max(segments(folder)) + 1, 0)
    try:
        journal.append("opened", 0.0, text=json.dumps({"protocol": 99}), frames=[b"{}"])
        journal.write()
        journal.close()
        assert "was written by another release (it has protocol version 99" in refusal(ended)
    finally:
        journal.remove()


def test_torchrun_rejects_changed_data(ended: Run) -> None:
    path = ended.folder.parent / "data.jsonl"
    before = content(ended.folder)
    with changed(path, without_a_line(path.read_bytes())):
        run = start_torchrun(ended.folder.parent, 2, "--run.updates", "5", resume=True)
        status, _, err = run.finish()
    assert status != 0
    assert f"the data in '{path}' changed (different numbers of prompts)" in err
    assert content(ended.folder) == before
    assert run.processes() == {}


def test_restarted_ranks_reject_data_changed_in_the_meantime(tmp_path: Path) -> None:
    make_parts(tmp_path)
    often = ("--run.updates", "100000", "--learner.checkpoint_every", "2")
    run = start_train(
        tmp_path, *often, "--cluster.max_restarts", "1", config=tmp_path / "config.toml"
    )
    run.wait_for_steps(3)
    data = tmp_path / "data.jsonl"
    data.write_bytes(without_a_line(data.read_bytes()))
    os.kill(run.learner(), signal.SIGKILL)
    status, _, err = run.finish()
    assert status == 1
    assert f"the data in '{data}' changed (different numbers of prompts)" in err
    assert json.loads((run.folder / "attempt.json").read_text()) == {"attempt": 0}
    assert run.processes() == {}


def test_moved_parts_and_accepted_scoring_code_are_found_when_it_is_resumed_again(
    ended: Run, tmp_path: Path
) -> None:
    """Whitespace in the data file and a model that transformers refuses to save are no obstacle."""
    shutil.copytree(ended.folder, tmp_path / "run")
    moved = Run(process=ended.process, folder=tmp_path / "run")
    parts = ended.folder.parent
    shutil.copytree(parts / "model", tmp_path / "other-model")
    flags = tmp_path / "other-model" / "generation_config.json"
    data = (parts / "data.jsonl").read_bytes()
    rewritten = data.replace(b'": "', b'":"').replace(b"\n", b"\r\n\r\n")
    assert rewritten != data
    (tmp_path / "other-data").write_bytes(rewritten)
    (parts / "model").rename(parts / "gone")
    try:
        error = refusal(moved)
        assert "config field 'model.path'" in error
        assert "if it was moved, set the new path: --model.path FOLDER" in error
        paths = ("--model.path", "other-model", "--task.path", "other-data")
        answers = copied_scoring_code(tmp_path)
        answers.write_text(answers.read_text() + "# fixed\n")
        option, value = accepting_option(moved, *paths)
        status, _, err = resume_train(moved, "--run.updates", "4", *paths, option, value).finish()
        assert status == 0, err
        # The new paths have been saved, and only this code has been accepted.
        (parts / "data.jsonl").rename(parts / "gone-data")
        answers.write_text(answers.read_text() + "# and again\n")
        assert f"{SCORING} changed: final_answer.py" in refusal_of_this_package(moved)
    finally:
        (parts / "gone").rename(parts / "model")
        if (parts / "gone-data").exists():
            (parts / "gone-data").rename(parts / "data.jsonl")
    assert moved.versions() == [1, 2, 3, 4]
    assert "a new journal was started" not in (moved.folder / "logs" / "service.log").read_text()
    saved = moved.folder / "checkpoints" / "version-000004" / "generation_config.json"
    assert json.loads(saved.read_text()) == json.loads(flags.read_text())


def copied_scoring_code(folder: Path) -> Path:
    """Copy this package to `folder`; returns the module of the copy that scores answers."""
    shutil.copytree(REPOSITORY / "speed_async", folder / "speed_async")
    return folder / "speed_async" / "environments" / "final_answer.py"


def accepting_option(run: Run, *overrides: str) -> tuple[str, str]:
    """The option and its value that the refusal of changed scoring code names."""
    error = refusal_of_this_package(run, *overrides)
    assert f"{SCORING} changed: final_answer.py" in error
    option, value = error.partition("add ")[2].partition(")")[0].split()
    assert option == "--run.accept_scoring"
    wrong = (option, "code-00000000")
    assert "changed: final_answer.py" in refusal_of_this_package(run, *overrides, *wrong)
    return option, value


def test_without_a_gate_the_step_reward_covers_whole_groups(ended: Run) -> None:
    steps = ended.events("step")
    assert any(step["trained_reward_mean"] > 0 for step in steps)
    assert any(step["reward_mean"] > 0 for step in steps)
    assert {step["gate_acceptance"] for step in steps} == {None}
    assert steps[0]["time/sync_s"] == pytest.approx(0.0, abs=0.1)  # no broadcast before it
    assert ended.summary()["gate_acceptance"] is None
