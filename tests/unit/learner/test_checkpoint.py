"""Checkpoints: bitwise resume, atomic writes, detection of damage, and pruning."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from speed_async.errors import ModelError, SpeedAsyncError
from speed_async.learner.checkpoint import captured as captured_module
from speed_async.learner.checkpoint import store as checkpoint_store
from speed_async.learner.checkpoint.checksums import damage, seal
from speed_async.learner.checkpoint.dtypes import read_dtypes
from speed_async.learner.checkpoint.files import load_checkpoint
from speed_async.learner.checkpoint.model_files import read_model_files
from speed_async.learner.checkpoint.store import checkpoint_folder, kept_versions, latest_valid
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import make_optimizer, named_state
from speed_async.learner.progress import Progress, Update
from speed_async.learner.trainer import Trainer
from tests.fakes.learner_samples import make_config, random_groups, save_tiny_llama
from tests.fakes.paths import REPOSITORY
from tests.fakes.tiny_models import save_tiny_folder
from tests.fakes.trainers import at, make_trainer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = save_tiny_llama(tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def root_of(model_folder: Path) -> Path:
    return model_folder / "run" / "checkpoints"


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimiser tensors, by name."""
    optimizer = trainer._optimizer  # pyright: ignore[reportPrivateUsage]
    state = named_state(optimizer, trainer.model) | dict(trainer.weights())
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def convert(model_folder: Path, dtype: torch.dtype, *, kept: str = "") -> None:
    """Store the weights in `dtype`, except those whose name contains `kept`."""
    path = model_folder / "model.safetensors"
    tensors = {
        name: tensor if kept and kept in name else tensor.to(dtype)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    add_to_json(model_folder / "config.json", dtype=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_before", [0, 1, 3, 6])
def test_training_after_a_restore_is_bitwise_identical(
    model_folder: Path, num_before: int, dtype: torch.dtype
):
    """The warm-up ends before or after the checkpoint, depending on `num_before`."""
    convert(model_folder, dtype)
    uninterrupted = make_trainer(model_folder)
    for seed in range(num_before):
        uninterrupted.update(random_groups(seed))
    uninterrupted.save(at(num_before))
    later = range(num_before, num_before + 4)
    expected = [uninterrupted.update(random_groups(seed)).metrics for seed in later]

    resumed = make_trainer(model_folder)
    resumed.update(random_groups(99))  # state that must be replaced by the restore
    resumed.restore(checkpoint_folder(root_of(model_folder), num_before))
    actual = [resumed.update(random_groups(seed)).metrics for seed in later]

    assert actual == expected
    assert len({metrics["lr"] for metrics in expected}) == {0: 4, 1: 4, 3: 2, 6: 1}[num_before]
    assert_equal(state_of(resumed), state_of(uninterrupted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_has_the_state_at_its_capture_although_training_continued(
    model_folder: Path, dtype: torch.dtype, tied: bool
):
    if tied:
        save_tiny_folder(model_folder, tied=True)
    convert(model_folder, dtype)
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    expected = state_of(trainer)
    trainer.save(at(1))
    first = checkpoint_folder(root_of(model_folder), 1)
    files = {
        path.relative_to(first): path.read_bytes()
        for path in first.rglob("*")
        if path.is_file() and path.name != "trainer.json"
    }
    captured = trainer.capture()
    trainer.update(random_groups(1))
    trainer.write(at(1), captured)

    assert damage(first) == ""
    for name, content in files.items():
        assert (first / name).read_bytes() == content, name
    resumed = make_trainer(model_folder)
    resumed.restore(first)
    assert_equal(state_of(resumed), expected)


def test_the_count_of_skipped_updates_is_restored(model_folder: Path):
    uninterrupted, resumed = make_trainer(model_folder), make_trainer(model_folder)
    saved = Progress(policy_version=7, optimizer_updates=5, num_skipped=2)
    uninterrupted.save(saved)
    assert resumed.restore(checkpoint_folder(root_of(model_folder), 7)) == saved
    metrics = resumed.update(random_groups(0)).metrics
    assert (metrics["skipped_updates"], metrics["optimizer_updates"]) == (2, 6)


def test_progress_is_restored_unchanged(model_folder: Path):
    progress = Progress(
        policy_version=3,
        service_sequence=1_234,
        optimizer_updates=11,
        num_skipped=1,
        groups_trained=4,
        completions_trained=24,
        tokens_trained=99,
        recent_updates=(
            Update(policy_version=2, lease_ids=(5, 6)),
            Update(policy_version=3, lease_ids=(9,)),
        ),
    )
    trainer = make_trainer(model_folder)
    trainer.save(progress)
    assert trainer.restore(checkpoint_folder(root_of(model_folder), 3)) == progress


def draw() -> tuple[list[float], ...]:
    """Draws from each generator. Normal samples cache a second value in the generator."""
    return (
        [random.gauss(0, 1), random.random()],
        [float(np.random.standard_normal()), float(np.random.rand())],
        torch.rand(3).tolist(),
    )


def test_random_states_are_restored(model_folder: Path):
    trainer = make_trainer(model_folder)
    draw()
    trainer.save(at(0))
    expected = draw()
    resumed = make_trainer(model_folder)
    torch.manual_seed(0)
    assert draw() != expected
    resumed.restore(checkpoint_folder(root_of(model_folder), 0))
    assert draw() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_random_states_of_gpus_are_restored(model_folder: Path):
    torch.rand(1, device="cuda")
    trainer = make_trainer(model_folder)
    trainer.save(at(0))
    expected = torch.rand(3, device="cuda")
    trainer.restore(checkpoint_folder(root_of(model_folder), 0))
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_checkpoint_is_a_hugging_face_folder_without_pickles(model_folder: Path):
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    trainer.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    assert tokenizer("two one")["input_ids"] == [1, 0]
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    first = {path.name for path in model_folder.iterdir() if path.is_file()}
    training = {f"training/{name}" for name in ("optimizer.tensors", "random.json", "trainer.json")}
    assert names == first | {"SHA256SUMS", "training"} | training
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_has_the_dtypes_of_the_initial_model(model_folder: Path, tied: bool):
    if tied:
        save_tiny_folder(model_folder, tied=True)
    convert(model_folder, torch.bfloat16, kept="norm")
    first = load_file(model_folder / "model.safetensors")
    trainer = make_trainer(model_folder)
    trainer.check_save()
    for seed in range(3):
        trainer.update(random_groups(seed))
    trainer.save(at(3))
    folder = checkpoint_folder(root_of(model_folder), 3)
    saved = load_file(folder / "model.safetensors")
    assert {name: each.dtype for name, each in saved.items()} == {
        name: each.dtype for name, each in first.items()
    }
    trained = trainer.model.state_dict()
    assert_equal(saved, {name: trained[name].to(each.dtype) for name, each in saved.items()})
    masters = load_file(folder / "training" / "weights.tensors")
    assert masters.keys() == {name for name in saved if "norm" not in name}
    assert_equal(masters, {name: trained[name] for name in masters})
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert damage(folder) == ""


def test_a_float32_model_has_no_second_copy_of_its_weights(model_folder: Path):
    make_trainer(model_folder).save(at(1))
    training = checkpoint_folder(root_of(model_folder), 1) / "training"
    assert not (training / "weights.tensors").exists()


def test_weights_that_the_initial_folder_names_otherwise_have_its_most_common_dtype(
    model_folder: Path,
):
    convert(model_folder, torch.float16)
    path = model_folder / "model.safetensors"
    renamed = {f"language_model.{name}": each for name, each in load_file(path).items()}
    save_file({**renamed, "vision": torch.zeros(2)}, path)
    dtypes = read_dtypes(model_folder)
    assert dtypes.of("lm_head.weight") == torch.float16
    assert dtypes.of("vision") == torch.float32


@pytest.mark.parametrize("version", [3, 4])
def test_a_float32_checkpoint_of_an_older_format_can_be_resumed(model_folder: Path, version: int):
    """Of a bfloat16 model: older formats have float32 weights in the model itself."""
    uninterrupted = make_trainer(model_folder)
    uninterrupted.update(random_groups(0))
    uninterrupted.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    record = json.loads((folder / "training" / "trainer.json").read_text()) | {"format": version}
    if version == 3:
        del record["optimizer_updates"]
    (folder / "training" / "trainer.json").write_text(json.dumps(record))
    seal(folder)
    convert(model_folder, torch.bfloat16)
    resumed = make_trainer(model_folder)
    assert resumed.restore(folder) == at(1)
    assert_equal(state_of(resumed), state_of(uninterrupted))
    resumed.save(at(2))
    saved = load_file(checkpoint_folder(root_of(model_folder), 2) / "model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.bfloat16}


def test_only_the_model_matches_weight_file_patterns(model_folder: Path):
    """The patterns used by vLLM and other loaders, including subfolders."""
    make_trainer(model_folder).save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    patterns = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "npz")
    found = [path for kind in patterns for path in folder.rglob(f"*.{kind}")]
    assert found == [folder / "model.safetensors"]
    saved = load_file(folder / "model.safetensors")
    assert not [name for name in saved if name not in make_trainer(model_folder).model.state_dict()]


def test_captured_respect_the_umask(model_folder: Path):
    before = os.umask(0o027)
    try:
        make_trainer(model_folder).save(at(1))
    finally:
        os.umask(before)
    folder = checkpoint_folder(root_of(model_folder), 1)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_checkpoint_of_format_2_can_be_resumed(model_folder: Path):
    """Format 2 has the training state next to the model, and no count of optimiser updates."""
    uninterrupted = make_trainer(model_folder)
    uninterrupted.update(random_groups(0))
    uninterrupted.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    for path in (folder / "training").iterdir():
        path.rename(folder / path.name)
    (folder / "training").rmdir()
    (folder / "optimizer.tensors").rename(folder / "optimizer.safetensors")
    record = json.loads((folder / "trainer.json").read_text())
    assert record.pop("optimizer_updates") == 1
    (folder / "trainer.json").write_text(json.dumps(record | {"format": 2}))
    seal(folder)
    resumed = make_trainer(model_folder)
    assert resumed.restore(folder) == at(1)
    assert_equal(state_of(resumed), state_of(uninterrupted))
    # As the initial model of another run, only its model files are copied to the checkpoints.
    assert not {"trainer.json", "random.json"} & read_model_files(folder).keys()


# --- model files -------------------------------------------------------------------------------


def add_to_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_files_that_transformers_cannot_save_are_copied(model_folder: Path):
    """Sampling flags without sampling, which are common in folders on the hub."""
    add_to_json(model_folder / "generation_config.json", do_sample=False, temperature=0.6)
    trainer = make_trainer(model_folder)
    with pytest.raises(ValueError, match="temperature"):
        trainer.model.save_pretrained(model_folder / "refused")
    trainer.check_save()
    assert not root_of(model_folder).exists()  # a run of no updates leaves no checkpoints
    trainer.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    name = "generation_config.json"
    assert (folder / name).read_bytes() == (model_folder / name).read_bytes()
    make_trainer(folder).check_save()


def test_a_checkpoint_contains_the_bytes_of_the_initial_model_files(model_folder: Path):
    add_to_json(model_folder / "config.json", dtype="bfloat16", a_key_of_some_other_tool=[1])
    (model_folder / "generation_config.json").unlink()
    templates = model_folder / "additional_chat_templates"
    templates.mkdir()
    described = {
        "config.json": (model_folder / "config.json").read_bytes(),
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        **dict.fromkeys(("spiece.model", "qwen.tiktoken", "vocab.bpe", "modeling.py"), b"\x00\xff"),
        **dict.fromkeys(("preprocessor_config.json", "LICENSE"), b"{}"),
    }
    for name, content in described.items():
        (model_folder / name).write_bytes(content)
    (model_folder / "model.safetensors.index.json").write_text("{}")
    (model_folder / "events.out").write_text("of another tool")
    trainer = make_trainer(model_folder)
    for path in model_folder.rglob("*"):  # the initial folder is not read any more
        if path.is_file():
            path.unlink()
    trainer.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    assert {name: (folder / name).read_bytes() for name in described} == described
    names = {path.name for path in folder.rglob("*")}
    assert not {"events.out", "generation_config.json", "model.safetensors.index.json"} & names
    # As in the initial folder, also where its config has another dtype.
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.float32
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_submodel_gets_its_own_config(
    model_folder: Path,
):
    convert(model_folder, torch.bfloat16)
    add_to_json(model_folder / "config.json", architectures=["LlamaForConditionalGeneration"])
    make_trainer(model_folder).save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_a_config_that_cannot_be_saved_is_reported_before_training(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(model_folder)
    monkeypatch.setattr(trainer.model.config, "validate", lambda: float("no number"))
    with pytest.raises(ModelError, match=r"refuses to save it .*no number.*; fix that file in"):
        trainer.check_save()
    assert list(root_of(model_folder).glob("*")) == []


def test_an_unwritable_folder_is_reported_before_training(model_folder: Path):
    trainer = make_trainer(model_folder)
    root_of(model_folder).parent.mkdir()
    root_of(model_folder).write_text("a file in place of the folder")
    with pytest.raises(SpeedAsyncError, match=r"could be written to '.*checkpoints'.*run\.folder"):
        trainer.check_save()


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 12), (torch.bfloat16, 14)])
def test_insufficient_disk_space_is_reported_before_training(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bytes_each: int
):
    convert(model_folder, dtype)
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    trainer.save(at(1))
    tensor_files = [*root_of(model_folder).rglob("*.safetensors")]
    tensor_files += root_of(model_folder).rglob("*.tensors")
    size = sum(path.stat().st_size for path in tensor_files)
    tensors = bytes_each * sum(each.numel() for each in trainer.model.parameters())
    assert 0 <= size - tensors < 40_000, "the estimate matches the size of the files"
    usage = shutil.disk_usage(model_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=tensors - 1))
    with pytest.raises(
        SpeedAsyncError, match=r"it needs 0\.0 GB and 0\.0 GB are free; free disk space"
    ):
        trainer.check_save()
    assert kept_versions(root_of(model_folder)) == [1]


def test_a_checkpoint_of_another_model_is_rejected(model_folder: Path, tmp_path: Path):
    make_trainer(model_folder).save(at(1))
    other = load_model(save_tiny_llama(tmp_path / "other", hidden_size=32), device="cpu")
    optimizer = make_optimizer(other, make_config(model_folder).learner)
    folder = checkpoint_folder(root_of(model_folder), 1)
    with pytest.raises(ModelError, match="cannot be restored"):
        load_checkpoint(folder, model=other, optimizer=optimizer)


# --- damage ----------------------------------------------------------------------------------


def damage_variants(path: Path) -> dict[str, Callable[[], object]]:
    content = path.read_bytes()

    def flip(index: int) -> None:
        changed = bytearray(content)
        changed[index] ^= 1 << (index % 8)
        path.write_bytes(changed)

    return {
        "deleted": path.unlink,
        "emptied": lambda: path.write_bytes(b""),
        "cut in half": lambda: path.write_bytes(content[: len(content) // 2]),
        "cut by a byte": lambda: path.write_bytes(content[:-1]),
        "cut at a line": lambda: path.write_bytes(b"".join(content.splitlines(True)[:-1])),
        "first bit": lambda: flip(0),
        "middle bit": lambda: flip(len(content) // 2),
        "last bit": lambda: flip(len(content) - 1),
        "grown": lambda: path.write_bytes(content + b"\n"),
    }


def test_damage_to_any_file_is_detected_and_reported(model_folder: Path):
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    trainer.save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    before = state_of(trainer)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(paths) >= 8
    for path in paths:
        content, file_name = path.read_bytes(), path.relative_to(folder).as_posix()
        for name, apply_damage in damage_variants(path).items():
            apply_damage()
            assert file_name in damage(folder), f"{file_name} {name}"
            with pytest.raises(ModelError, match=f"{folder}.*cannot be restored: {file_name}"):
                trainer.restore(folder)
            path.write_bytes(content)
        assert damage(folder) == ""
    assert_equal(state_of(trainer), before)


def test_verified_checksums_are_not_computed_again(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(model_folder)
    trainer.save(at(1))
    digested: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: digested.append(file.name) or digest(file, name)
    )
    found = latest_valid(root_of(model_folder), 2)
    assert found is not None
    assert found.folder is not None
    assert trainer.restore(found.folder, is_whole=True) == at(1)
    assert digested
    assert len(digested) == len(set(digested))


def test_the_checksums_are_valid_for_sha256sum(model_folder: Path):
    make_trainer(model_folder).save(at(1))
    folder = checkpoint_folder(root_of(model_folder), 1)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, capture_output=True, timeout=240).returncode == 0
    (folder / "notes.txt").write_text("additional files are ignored")
    assert damage(folder) == ""


# --- write failures ----------------------------------------------------------------------------


class FailingFileSystem:
    """Fails all file-system calls after the first `last_good` with ENOSPC, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last_good: int) -> None:
        self.num_calls = 0
        self._last_good = last_good
        self.failed_call = ""
        for owner, name in (
            (os, "fsync"),
            (os, "rename"),
            (os, "mkdir"),
            (Path, "write_text"),
            (Path, "write_bytes"),
            (captured_module, "save_file"),
        ):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **named: object) -> object:
            self.num_calls += 1
            if self.num_calls > self._last_good:
                self.failed_call = self.failed_call or name
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **named)

        return counted


def test_a_valid_checkpoint_exists_after_any_failed_call(model_folder: Path):
    trainer = make_trainer(model_folder, keep_last=2)
    root = root_of(model_folder)
    trainer.save(at(0))
    trainer.update(random_groups(0))
    failed_calls: list[str] = []
    for last_good in range(200):
        with pytest.MonkeyPatch.context() as monkeypatch:
            file_system = FailingFileSystem(monkeypatch, last_good)
            try:
                trainer.save(at(1))
            except OSError:
                failed_calls.append(file_system.failed_call)
        found = latest_valid(root, 2)
        assert found is not None
        assert found.notices == ()
        names = {path.name for path in root.iterdir()}
        assert names in ({"version-000000"}, {"version-000000", "version-000001"})
        if found.policy_version == 1 and not file_system.failed_call:
            break
    assert set(failed_calls) >= {
        "mkdir",
        "write_bytes",
        "save_file",
        "write_text",
        "fsync",
        "rename",
    }
    resumed = make_trainer(model_folder)
    resumed.restore(checkpoint_folder(root, 1))
    assert_equal(state_of(resumed), state_of(trainer))


def test_a_full_disk_raises_an_os_error_and_its_space_is_freed(model_folder: Path):
    """A limit on the size of files, which has the same effect as a full disk."""
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 5_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                trainer.save(at(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(root_of(model_folder).iterdir()) == []
    trainer.save(at(1))
    assert kept_versions(root_of(model_folder)) == [1]


SAVER = """
import os
import sys
from pathlib import Path
from tests.fakes.trainers import at, make_trainer
trainer = make_trainer(Path(sys.argv[1]), keep_last=2)
for line in sys.stdin:
    version = int(line)
    process_id = os.fork()
    while process_id == 0:
        trainer.save(at(version))
        trainer.save(at(version))  # replaces itself
        version += 1
    print(process_id, flush=True)
    os.waitpid(process_id, 0)
    print("gone", flush=True)
"""
"""Starts a process for each version on stdin, which saves this version and the following ones."""


def test_a_process_killed_at_any_time_leaves_a_valid_checkpoint(model_folder: Path):
    root, rng, version = root_of(model_folder), random.Random(5), 0
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(model_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    ) as saver:
        assert saver.stdin is not None and saver.stdout is not None
        for round_number in range(6):
            saver.stdin.write(f"{version}\n")
            saver.stdin.flush()
            process_id = int(saver.stdout.readline())
            if round_number == 0:
                while not kept_versions(root):  # a checkpoint must exist from here on
                    time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.15))
            os.kill(process_id, signal.SIGKILL)
            assert saver.stdout.readline() == "gone\n"
            found = latest_valid(root, 2)
            assert found is not None
            assert found.notices == ()
            assert found.policy_version >= version - 1
            assert not [path for path in root.iterdir() if path.name.startswith(".")]
            version = found.policy_version + 1


# --- the checkpoint store ----------------------------------------------------------------------


def test_save_prunes_old_checkpoints_and_returns_the_oldest_kept(model_folder: Path):
    trainer = make_trainer(model_folder, keep_last=3)
    oldest = [trainer.save(at(version)) for version in (2, 4, 6, 8, 1_000_000)]
    assert oldest == [0, 0, 2, 4, 6]  # 0, the start, until there are three checkpoints
    names = {path.name for path in root_of(model_folder).iterdir()}
    assert names == {"version-000006", "version-000008", "version-1000000"}


def test_old_checkpoints_are_removed_after_the_new_one_is_renamed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(model_folder, keep_last=1)
    trainer.save(at(1))
    monkeypatch.setattr(
        checkpoint_store, "flush", lambda path: (_ for _ in ()).throw(OSError("no disk"))
    )
    with pytest.raises(OSError, match="no disk"):
        trainer.save(at(2))
    assert 1 in kept_versions(root_of(model_folder))


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(model_folder: Path):
    trainer, root = make_trainer(model_folder, keep_last=3), root_of(model_folder)
    for version in (1, 2, 3):
        trainer.save(at(version))
    (root / "version-000003" / "model.safetensors").write_bytes(b"")
    (root / "version-000002" / "SHA256SUMS").unlink()
    found = latest_valid(root, 2)
    assert found is not None
    assert (found.folder, found.policy_version) == (root / "version-000001", 1)
    first, second = found.notices
    assert first.startswith(
        "checkpoint version-000003 is damaged (model.safetensors does not match"
    )
    assert "resuming from version-000001" in first
    assert second.startswith("checkpoint version-000002 is damaged (SHA256SUMS cannot be read")
    assert kept_versions(root) == [1]  # damaged checkpoints are not counted
    assert (root / "version-000003.damaged").is_dir()
    trainer.save(at(3))
    assert latest_valid(root, 2) == checkpoint_store.FoundCheckpoint(
        folder=root / "version-000003", policy_version=3, notices=()
    )


def test_an_error_lists_all_damaged_checkpoints(model_folder: Path):
    trainer, root = make_trainer(model_folder), root_of(model_folder)
    for version in (1, 2):
        trainer.save(at(version))
        (checkpoint_folder(root, version) / "training" / "trainer.json").write_text("{}")
    with pytest.raises(
        ModelError,
        match=r"every .*000002: training/trainer.json .*01: tr.* from a backup, or start a new run",
    ):
        latest_valid(root, 2)
    assert kept_versions(root) == [1, 2]


def test_fewer_than_keep_last_damaged_checkpoints_fall_back_to_the_start(model_folder: Path):
    trainer, root = make_trainer(model_folder, keep_last=3), root_of(model_folder)
    for version in (1, 2):
        trainer.save(at(version))
        (checkpoint_folder(root, version) / "training" / "trainer.json").write_text("{}")
    found = latest_valid(root, 3)
    assert found is not None
    assert (found.folder, found.policy_version) == (None, 0)
    newer, older = found.notices
    assert newer == (
        "checkpoint version-000002 is damaged (training/trainer.json does not match its checksum); "
        "resuming from the start (version 0, the initial model), the damaged one is kept as "
        "version-000002.damaged"
    )
    assert "version-000001.damaged" in older
    assert kept_versions(root) == []
    assert latest_valid(root, 3) is None


def test_latest_valid_is_none_without_checkpoints(tmp_path: Path):
    assert latest_valid(tmp_path / "nowhere", 2) is None
    (tmp_path / ".version-000001.partial").mkdir()
    assert latest_valid(tmp_path, 2) is None
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_restores_the_old_checkpoint(model_folder: Path):
    """The process is killed between the two renames."""
    root = root_of(model_folder)
    make_trainer(model_folder).save(at(1))
    (root / "version-000001").rename(root / ".version-000001.replaced")
    found = latest_valid(root, 2)
    assert found is not None
    assert found.folder == root / "version-000001"


def test_the_checkpoint_store_does_not_import_torch():
    code = "import sys, speed_async.learner.checkpoint.store\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


# --- progress ----------------------------------------------------------------------------------


def test_progress_counts_trained_groups_and_records_their_leases():
    progress = Progress().updated(
        [1, 2], optimizer_updates=3, num_skipped=1, completions=8, tokens=50
    )
    progress = progress.updated([3], optimizer_updates=0, num_skipped=4, completions=4, tokens=9)
    assert progress == Progress(
        policy_version=2,
        optimizer_updates=3,
        num_skipped=5,
        groups_trained=2,
        completions_trained=8,
        tokens_trained=50,
        recent_updates=(
            Update(policy_version=1, lease_ids=(1, 2)),
            Update(policy_version=2, lease_ids=(3,)),
        ),
    )
    assert progress.recent_lease_ids == [1, 2, 3]
    assert progress.since(1).recent_lease_ids == [3]
    assert progress.since(2).recent_lease_ids == []


def test_recent_lease_ids_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("speed_async.learner.progress.MAX_RECENT_LEASES", 5)
    progress = Progress()
    for version in range(10):
        ids = [2 * version, 2 * version + 1]
        progress = progress.updated(
            ids, optimizer_updates=1, num_skipped=0, completions=1, tokens=1
        )
    assert progress.recent_lease_ids == [16, 17, 18, 19]
