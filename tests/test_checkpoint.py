from pathlib import Path

import pytest
import torch
from learner_samples import make_config, random_groups, save_tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from speed_async.errors import ModelError
from speed_async.learner.checkpoint import (
    CheckpointInfo,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from speed_async.learner.model import load_model
from speed_async.learner.optimizer import make_optimizer
from speed_async.learner.parallel import SingleRank
from speed_async.learner.trainer import Trainer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = save_tiny_llama(tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def make_trainer(folder: Path) -> Trainer:
    config = make_config(folder, lr=0.01, warmup_updates=3)
    return Trainer(config=config, model=load_model(folder, device="cpu"), parallel=SingleRank())


def test_training_goes_on_after_a_restore_as_if_nothing_had_happened(model_folder: Path):
    straight = make_trainer(model_folder)
    straight.update(random_groups(0))
    straight.save(1, extra={"groups_trained": 3})
    expected = straight.update(random_groups(1))

    resumed = make_trainer(model_folder)
    info = resumed.restore(straight.checkpoint_folder(1))
    actual = resumed.update(random_groups(1))

    assert info == CheckpointInfo(
        policy_version=1, num_updates=1, num_skipped=0, extra={"groups_trained": 3}
    )
    assert actual.metrics == expected.metrics
    for (name, one), (_, other) in zip(straight.weights(), resumed.weights(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_taken_before_the_first_update_can_be_restored(model_folder: Path):
    straight, resumed = make_trainer(model_folder), make_trainer(model_folder)
    straight.save(0)
    resumed.update(random_groups(5))

    resumed.restore(straight.checkpoint_folder(0))

    assert straight.update(random_groups(0)).metrics == resumed.update(random_groups(0)).metrics


def test_a_checkpoint_is_a_hugging_face_folder_without_pickles(model_folder: Path):
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    trainer.save(1)
    folder = trainer.checkpoint_folder(1)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    assert tokenizer("two one")["input_ids"] == [1, 0]
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]


def test_latest_names_the_newest_checkpoint(model_folder: Path, tmp_path: Path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    trainer = make_trainer(model_folder)
    for version in (1, 2):
        trainer.save(version)
        root = trainer.checkpoint_folder(version).parent
        assert latest_checkpoint(root) == trainer.checkpoint_folder(version)
    assert sorted(path.name for path in root.iterdir()) == [
        "latest", "version-000001", "version-000002",
    ]  # fmt: skip


def save_with_extra(trainer: Trainer, folder: Path, extra: dict[str, object]) -> None:
    optimizer = make_optimizer(trainer.model, make_config(folder).learner)
    save_checkpoint(
        folder,
        model=trainer.model,
        state=SingleRank().full_state(trainer.model, optimizer),
        tokenizer_folder=folder,
        info=CheckpointInfo(policy_version=1, num_updates=1, num_skipped=0, extra=extra),
    )


def test_a_save_that_fails_half_way_leaves_the_old_checkpoint_and_is_cleared_later(
    model_folder: Path, tmp_path: Path
):
    trainer, root = make_trainer(model_folder), tmp_path / "checkpoints"
    save_with_extra(trainer, root / "version-1", {"mark": "old"})

    for name in ("version-1", "version-2"):
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_with_extra(trainer, root / name, {"mark": object()})

    assert not (root / "version-2").exists()
    assert latest_checkpoint(root) == root / "version-1"
    assert '"mark": "old"' in (root / "version-1" / "trainer.json").read_text()
    save_with_extra(trainer, root / "version-1", {"mark": "new"})
    save_with_extra(trainer, root / "version-2", {"mark": "newer"})
    assert '"mark": "new"' in (root / "version-1" / "trainer.json").read_text()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "version-1", "version-2"]


def test_a_kill_while_replacing_a_checkpoint_loses_neither_the_old_nor_the_new(
    model_folder: Path, tmp_path: Path
):
    """The state between the two renames: the old one aside, the new one not yet in place."""
    trainer, root = make_trainer(model_folder), tmp_path / "checkpoints"
    save_with_extra(trainer, root / "version-1", {})
    (root / "version-1").rename(root / ".version-1.replaced")
    assert latest_checkpoint(root) == root / ".version-1.replaced"

    with pytest.raises(TypeError):
        save_with_extra(trainer, root / "version-1", {"mark": object()})
    assert latest_checkpoint(root) == root / "version-1"


def test_a_pointer_to_nothing_is_an_error(tmp_path: Path):
    (tmp_path / "latest").write_text("version-000009\n")
    with pytest.raises(ModelError, match="version-000009"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("broken", ["trainer.json", "optimizer.safetensors", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name(model_folder: Path, broken: str):
    trainer = make_trainer(model_folder)
    trainer.update(random_groups(0))
    trainer.save(1)
    path = trainer.checkpoint_folder(1) / broken
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match=f"{trainer.checkpoint_folder(1)}.*cannot be"):
        trainer.restore(trainer.checkpoint_folder(1))


def test_a_checkpoint_of_another_model_is_refused(model_folder: Path, tmp_path: Path):
    trainer = make_trainer(model_folder)
    trainer.save(1)
    other = load_model(save_tiny_llama(tmp_path / "other", hidden_size=32), device="cpu")
    optimizer = make_optimizer(other, make_config(model_folder).learner)
    with pytest.raises(ModelError, match="cannot be restored"):
        load_checkpoint(trainer.checkpoint_folder(1), model=other, optimizer=optimizer)
