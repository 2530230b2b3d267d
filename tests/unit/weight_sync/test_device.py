"""The device of a process. The number of GPUs is replaced: this machine may have none."""

import pytest
import torch

from speed_async.errors import ConfigError
from speed_async.weight_sync.device import DeviceChoice, resolve_device


@pytest.mark.parametrize(
    ("choice", "local_rank", "num_gpus", "expected"),
    [
        ("auto", "0", 0, torch.device("cpu")),
        ("cpu", "0", 8, torch.device("cpu")),
        ("auto", "0", 8, torch.device("cuda", 0)),
        ("cuda", "3", 8, torch.device("cuda", 3)),
        ("auto", "3", 1, torch.device("cuda", 0)),  # an actor that sees its own GPU only
        ("auto", None, 2, torch.device("cuda", 0)),  # a late joiner has no rank
    ],
)
def test_a_gpu_always_has_an_index(
    monkeypatch: pytest.MonkeyPatch,
    choice: DeviceChoice,
    local_rank: str | None,
    num_gpus: int,
    expected: torch.device,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device("learner.device", choice) == expected


@pytest.mark.parametrize("field", ["learner.device", "actors.device"])
def test_the_error_for_a_missing_gpu_names_the_field(monkeypatch: pytest.MonkeyPatch, field: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"{field}.*'auto' or 'cpu'"):
        resolve_device(field, "cuda")
