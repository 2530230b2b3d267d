"""What a rank reads from torchrun."""

import pytest

from speed_async.errors import SpeedAsyncError
from speed_async.launcher import rank


@pytest.mark.parametrize(
    "options", [["--nnodes", "1:2"], ["--nnodes=1:2"], ["--nn", "1:2"], ["PET_NNODES=1:2"]]
)
def test_elastic_number_of_nodes_is_rejected_in_each_form(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    if options[0].startswith("PET"):
        monkeypatch.setenv("PET_NNODES", "1:2")
        options = []
    command = ["python", "-m", "torch.distributed.run", *options, "-m", "speed_async.launch"]
    monkeypatch.setattr(rank, "_command_of", lambda _: command)
    with pytest.raises(SpeedAsyncError, match="--nnodes 1:2: the number of nodes of a run cannot"):
        rank.reject_elastic()


def test_options_of_this_package_are_not_torchrun_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.delenv("PET_NNODES", raising=False)
    command = ["python", "-m", "torch.distributed.run", "-m", "speed_async.launch", "--nn", "1:2"]
    monkeypatch.setattr(rank, "_command_of", lambda _: command)
    rank.reject_elastic()
