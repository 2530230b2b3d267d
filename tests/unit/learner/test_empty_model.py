"""Models without values, which followers have until they get their parts of the parameters."""

from pathlib import Path

import pytest

from speed_async.learner.model import empty_model, load_model
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
