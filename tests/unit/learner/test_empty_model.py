"""Models without values, which followers have until they get their parts of the parameters."""

from pathlib import Path

import pytest
import torch

from speed_async.errors import ModelError
from speed_async.learner.model import empty_model, load_model
from speed_async.learner.parallel.ranks import ONE_RANK, Ranks
from speed_async.learner.parallel.sharding import _check_equal_on_all_ranks
from tests.fakes.learner_samples import save_tiny_llama


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_model_has_the_tensors_of_the_loaded_one_and_no_memory(
    tmp_path: Path, tied: bool
) -> None:
    folder = save_tiny_llama(tmp_path, tie_word_embeddings=tied)
    empty, loaded = empty_model(folder, device="cpu"), load_model(folder, device="cpu")
    for kind in ("named_parameters", "named_buffers"):
        names_of_empty = dict(getattr(empty, kind)())
        names_of_loaded = dict(getattr(loaded, kind)())
        assert list(names_of_empty) == list(names_of_loaded)
        for name, tensor in names_of_empty.items():
            assert tensor.is_meta
            assert tensor.shape == names_of_loaded[name].shape
            assert tensor.dtype == names_of_loaded[name].dtype
            assert tensor.requires_grad == names_of_loaded[name].requires_grad
    assert not empty.training


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model folder '{tmp_path}' cannot be loaded"):
        empty_model(tmp_path, device="cpu")


def test_weights_that_do_not_fit_the_config_are_refused_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of its own in the loaded model, and none in the empty ones of the followers."""
    gathered: list[torch.Tensor] = []
    monkeypatch.setattr(
        Ranks,
        "gather",
        lambda self, value: torch.stack([*gathered, gathered.append(value) or value]),
    )
    for tied in (True, True, False):
        folder = save_tiny_llama(tmp_path / str(tied), tie_word_embeddings=tied)
        values = list(empty_model(folder, device="cpu").parameters())
        if tied:
            _check_equal_on_all_ranks(values, ONE_RANK)
        else:
            with pytest.raises(ModelError, match="set cluster"):
                _check_equal_on_all_ranks(values, ONE_RANK)
