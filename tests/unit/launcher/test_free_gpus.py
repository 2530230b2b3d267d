"""Which GPUs an actor takes that joins a run, by a real query of a script named nvidia-smi."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from speed_async.config.schema import Config
from speed_async.config.sections.actors import ActorsConfig, VllmConfig
from speed_async.config.sections.model import ModelConfig
from speed_async.config.sections.task import TaskConfig
from speed_async.errors import ConfigError
from speed_async.launcher.free_gpus import GpuChoice, claim_gpus
from speed_async.launcher.roles.joiner import choose_gpus, gpu_environment

FREE_MIB = {"0": "1200", "1": "70000", "2": "80000", "3": "[N/A]"}
ALL = list(FREE_MIB)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose nvidia-smi reports FREE_MIB. Returns the folder of claims."""
    rows = "".join(f"{i}, GPU-{i}a7f, {free}\n" for i, free in FREE_MIB.items())
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "--query-gpu=index,uuid,memory.free --format=csv,noheader,nounits" ] || exit 2\n'
        f"printf '{rows}'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def config_of(*, tensor_parallel: int = 1) -> Config:
    vllm = VllmConfig(tensor_parallel=tensor_parallel)
    return with_actors(ActorsConfig(engine="vllm", vllm=vllm))


def with_actors(actors: ActorsConfig) -> Config:
    return Config(
        model=ModelConfig(path="model"), task=TaskConfig(name="arithmetic"), actors=actors
    )


def claim(folder: Path, claims: ExitStack, num: int = 1, visible: list[str] = ALL) -> GpuChoice:
    return claim_gpus(num, visible, folder, claims)


def test_joiners_take_the_gpus_with_the_most_free_memory_and_not_the_same(machine: Path) -> None:
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        assert claim(machine, first).gpus == ("2",)
        assert claim(machine, second, visible=["GPU-2", "GPU-1"]).gpus == ("GPU-1",)
        assert claim(machine, third, num=2) == GpuChoice(gpus=("0", "3"), shared=False)
    with ExitStack() as later:  # the claims ended with their supervisors
        assert claim(machine, later).gpus == ("2",)


def test_with_too_few_gpus_the_one_with_the_most_free_memory_is_shared(machine: Path) -> None:
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        claim(machine, first, visible=["0", "1"])
        assert claim(machine, second, 2, ["0", "1"]) == GpuChoice(gpus=("1", "0"), shared=True)
        assert claim(machine, third, 1, ["0", "1"]) == GpuChoice(gpus=("0",), shared=False)
        assert claim(machine, second, 1, ["0", "1"]) == GpuChoice(gpus=("1",), shared=True)


@pytest.mark.parametrize("script", ["exit 9", "echo broken", ""])
def test_without_a_usable_nvidia_smi_claims_still_differ(machine: Path, script: str) -> None:
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    with ExitStack() as first, ExitStack() as second:
        assert claim(machine, first).gpus == ("0",)
        assert claim(machine, second).gpus == ("1",)


def test_the_actor_sees_its_gpus_first_and_the_others_after_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3")
    with ExitStack() as first, ExitStack() as second:
        assert choose_gpus(config_of(tensor_parallel=2), 3, first) == ["1", "0", "3"]
        assert choose_gpus(config_of(), 3, second) == ["3", "0", "1"]
        assert capsys.readouterr().out == "this actor uses GPU 1, 0\nthis actor uses GPU 3\n"
        choose_gpus(config_of(), 3, second)
        shared = "warning: other actors that joined have claimed all GPUs; this one shares 1\n"
        assert capsys.readouterr().out == shared


def test_cuda_numbers_the_gpus_of_the_actor_as_nvidia_smi_does() -> None:
    assert gpu_environment(["2", "0", "1"]) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "2,0,1",
    }
    assert gpu_environment([]) == {}


def test_no_gpu_is_taken_by_an_actor_on_a_cpu() -> None:
    torch_on_cpu = with_actors(ActorsConfig(engine="torch", device="cpu"))
    with ExitStack() as claims:
        assert choose_gpus(config_of(), 0, claims) == []
        assert choose_gpus(torch_on_cpu, 4, claims) == []


def test_an_actor_that_needs_more_gpus_than_the_machine_has_is_refused() -> None:
    with ExitStack() as claims, pytest.raises(ConfigError, match="join from one with at least 8"):
        choose_gpus(config_of(tensor_parallel=8), 4, claims)
