"""`speed-async check`, and the same checks before `train`: their output and side effects."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from speed_async.actors.model_folder import load_tokenizer
from speed_async.actors.prompt_codec import PromptCodec
from speed_async.config.schema import Config
from speed_async.launcher.preflight import devices
from speed_async.launcher.preflight import task as task_check
from speed_async.launcher.preflight.findings import Findings
from speed_async.launcher.preflight.machine import check_ports
from speed_async.launcher.preflight.tokenizer import check_tokenizer
from speed_async.types import Prompt
from tests.fakes.command_line import run_command
from tests.fakes.paths import MODEL
from tests.fakes.run_process import start_torchrun, write_config

MINIMAL = """
[model]
path = "{model}"
[task]
name = "arithmetic"
max_digits = 4
[actors]
max_new_tokens = 8
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def check(folder: Path, *overrides: str, text: str = MINIMAL) -> tuple[int, list[str]]:
    """Run `speed-async check` with the model in `folder`; returns exit status and output lines."""
    config = write_config(folder, text, folder / "model")
    before = everything_in(folder)
    status, out, err = run_command(folder, "check", str(config), *overrides)
    assert everything_in(folder) == before
    return status, (out + err).splitlines()


def everything_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def the_error(status: int, lines: list[str]) -> str:
    assert status == 1
    assert lines[-1] == "1 error", lines
    return next(line for line in lines if line.startswith("error: "))


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("warning: ")]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write a data file and return the overrides that select it."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task.name", "jsonl", "--task.path", str(data), "--task.num_held_out", "2"]


def edit(path: Path, **values: object) -> None:
    record = json.loads(path.read_text())
    record.update(values)
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def test_check_shows_first_prompt_scores_lengths_and_memory_and_ends_with_ok(
    model: Path, tmp_path: Path
) -> None:
    status, lines = check(tmp_path)
    assert (status, lines[-1]) == (0, "ok")
    out = "\n".join(lines)
    assert "11 tokens: '<bos>'" in out
    assert "token ids: 1 " in out
    assert "scores 1\n  an empty completion scores 0" in out
    assert "training: 4,096 prompts of 11 to 11 tokens, median 11" in out
    assert "353,920 parameters" in out
    # 1.5 x 64 slots x 128 tokens x 2 layers x (keys, values) x 4 heads x 32 values x 4 bytes
    assert "at most 24.0 MiB of KV cache (64 slots x 128 tokens)" in out
    assert not warnings(lines)


def test_check_reports_all_errors_together(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:-1])
    edit(model / "tokenizer_config.json", eos_token=None)
    (tmp_path / "taken").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, lines = check(
            tmp_path,
            *("--learner.lr", "fast", "--buffer.credits", "1", "--lr", "1"),
            *("--cluster.feed_port", str(port), "--run.folder", "taken/run"),
            *("--actors.device", "cuda", "--learner.device", "cuda"),
            *write_rows(tmp_path, [{"prompt": "a"}, {"answer": "b"}]),
        )
    errors = "\n".join(line for line in lines if not line.startswith("warning"))
    assert status == 1
    for message in (
        "'--lr' = '1': no such override; did you mean --learner.lr 1?",
        "'learner.lr' = 'fast'",
        "'buffer.credits' = 1",
        f"'cluster.feed_port' = {port}: it is in use",
        "'run.folder' = 'taken/run': cannot be created",
        "it is damaged or incompletely downloaded",
        "has no EOS token",
        "2 unusable lines",
    ):
        assert message in errors
    num_devices = 2 if devices.why_no_gpu() else 0
    assert lines[-1] == f"{8 + num_devices} errors"


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")


def remove_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def remove_weight_of_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    files = {"absent.weight": "model-00001-of-00001.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")


def remove_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def break_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def remove_model_type(model: Path) -> None:
    edit(model / "config.json", model_type=None)


def add_sliding_window(model: Path) -> None:
    edit(model / "config.json", sliding_window=16)


def cap_logits(model: Path) -> None:
    edit(model / "config.json", final_logit_softcapping=30.0)


def add_state_space_layer(model: Path) -> None:
    edit(model / "config.json", layer_types=["full_attention", "mamba"])


def require_system_message(model: Path) -> None:
    template = "{{ raise_exception('a system message is needed') }}"
    (model / "chat_template.jinja").write_text(template)


OPEN = ("--cluster.security", "insecure")
CHAT = ("--model.chat_template", "true")


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (remove_weights, (), "other.safetensors: not a name that loaders recognise"),
        (remove_shard, (), "lacks 1 of the 2 files that model.safetensors.index.json names: model"),
        (remove_weight_of_shard, (), "lack 1 of the weights"),
        (write_lfs_pointer, (), "git lfs pull"),
        (remove_tokenizer, (), "has no tokenizer"),
        (break_tokenizer, (), "tokenizer.json' cannot be read"),
        (remove_model_type, (), "has no model_type"),
        (add_sliding_window, (), "set model.context_length to at most 16"),
        (add_state_space_layer, (), "layers of type mamba"),
        (cap_logits, (), "final_logit_softcapping = 30.0 changes its logits after the head"),
        (None, CHAT, "'model.chat_template' = True: this model's tokenizer has no chat template"),
        (require_system_message, CHAT, "a system message is needed"),
        (None, ("--actors.max_new_tokens", "128"), "no space for a prompt in the model's context"),
        (None, ("--model.context_length", "256"), "supports 128 tokens; set at most 128"),
        (None, ("--model.context_length", "11"), "the model: use shorter prompts, or a"),
        (None, ("--cluster.host", "192.0.2.1", *OPEN), "not an address of this machine"),
        (None, ("--task.name", "arithmetics"), "did you mean arithmetic?"),
    ],
)  # fmt: skip
def test_check_reports_the_fault_and_its_remedy(
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], None] | None,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    if damage is not None:
        damage(model)
    status, lines = check(tmp_path, *overrides)
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 1
    assert any(message in line for line in errors), lines


def test_chat_template_is_rendered_before_tokens_are_counted(model: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% generation %}{% if add_generation_prompt %}=={% endif %}{% endgeneration %}"
    )
    (model / "chat_template.jinja").write_text(template)
    status, lines = check(tmp_path, *CHAT)
    assert (status, lines[-1]) == (0, "ok")
    [tokens] = [line for line in lines if " tokens: " in line]
    assert tokens.strip().startswith("13 tokens: '<bos>'")
    assert tokens.endswith("'=' '=' '='")


@pytest.mark.parametrize("chat_template", [False, True])
def test_prompts_are_encoded_exactly_like_in_the_actors(model: Path, chat_template: bool) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}\n  {% if message.role == 'user' %}\n"
        "{{ message['content'] | tojson }}{% endif %}\n{% endfor %}\n"
        "{% if tools is not none or documents %}9{% endif %}{% if add_generation_prompt %}"
        "{% generation %}={% endgeneration %}{% endif %}{{ eos_token }}"
    )
    (model / "chat_template.jinja").write_text(template)
    config = Config.model_validate(
        {
            "model": {"path": str(model), "chat_template": chat_template},
            "task": {"name": "arithmetic"},
        }
    )
    tokenizer = check_tokenizer(config, Path(config.model.path), Findings())
    codec = PromptCodec(load_tokenizer(model), chat_template=chat_template)
    prompts = ["12+34=", "<eos>", "", " 7 \n", "8\u00e9"]
    assert tokenizer is not None
    assert tokenizer.encode(prompts) == [codec.encode(prompt).tolist() for prompt in prompts]


def test_unusable_prompts_are_counted_by_reason_with_the_first_example(
    model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(20)]
    rows += [{"prompt": "9" * 200 + str(n), "answer": 1} for n in range(5)]
    rows += [{"prompt": "8" * 121 + str(n), "answer": 1} for n in range(4)]
    status, lines = check(tmp_path, *write_rows(tmp_path, rows))
    assert (status, lines[-1]) == (0, f"ok, but {len(warnings(lines))} warnings")
    text = "\n".join(warnings(lines))
    unusable = r"(\d) of \d+ [-\w]+ prompts (?:cannot be trained on|count as wrong) \(too long\)"
    assert sum(map(int, re.findall(unusable, text))) == 5
    assert "202 tokens, no space for a completion" in text
    limited = r"(\d) of \d+ [-\w]+ prompts leave less space than actors.max_new_tokens = 8"
    assert sum(map(int, re.findall(limited, text))) == 4
    assert "5 tokens for the longest prompt that fits" in text  # 128 - (1 + 121 + 1)


def test_many_prompts_are_checked_by_a_reported_sample(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n:0120d}"[:120], "answer": 1} for n in range(70_000)]
    status, lines = check(tmp_path, *write_rows(tmp_path, rows))
    assert status == 0
    assert any("69,998 prompts" in line and "in a sample of" in line for line in lines)


def test_configuration_without_a_required_section_is_one_error(tmp_path: Path) -> None:
    error = the_error(*check(tmp_path, text='[task]\nname = "arithmetic"\n'))
    assert "'model' = None: is required; set model.path in the file" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--actors.max_new_tokens", "500"), "leaves no space for a prompt"),
        (("--cluster.host", "192.0.2.1"), "not a loopback address"),
        pytest.param(
            ("--actors.device", "cuda"),
            "'actors.device' = 'cuda'",
            marks=pytest.mark.skipif(not devices.why_no_gpu(), reason="there is a GPU"),
        ),
    ],
)
def test_invalid_run_is_rejected_before_torch_loads_and_creates_no_folder(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    arguments = ["train", str(write_config(tmp_path)), *overrides]
    code = (
        "import sys\nfrom speed_async.cli import main\n"
        f"sys.argv = ['speed-async', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "AssertionError" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_under_torchrun_the_checks_precede_the_run_folder(tmp_path: Path) -> None:
    run = start_torchrun(tmp_path, 2, "--actors.max_new_tokens", "500")
    status, _, err = run.finish()
    assert status == 1
    assert "leaves no space for a prompt" in err
    assert not run.folder.exists()
    assert run.processes() == {}


def test_settings_that_need_more_gpus_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rejected(num_gpus: int, **sections: dict[str, Any]) -> list[str]:
        monkeypatch.setattr(devices, "torch_build", lambda: "cuda")
        monkeypatch.setattr(devices, "num_cuda_gpus", lambda: num_gpus)
        base = {"model": {"path": str(MODEL)}, "task": {"name": "arithmetic"}}
        findings = Findings()
        config = Config.model_validate(base | sections)
        devices.check_devices(config, findings, num_learners=config.cluster.learners)
        return [getattr(error, "field", "") for error in findings.errors]

    nccl, both = {"backend": "nccl"}, ["learner.device", "actors.device"]
    cuda = {"learner": {"device": "cuda"}, "actors": {"device": "cuda"}}
    assert rejected(0, **cuda) == both
    assert rejected(1, **cuda) == []
    assert rejected(0, weights=nccl) == rejected(1, weights=nccl) == ["weights.backend"]
    assert rejected(2, weights=nccl) == []
    assert rejected(2, weights=nccl, learner={"device": "cpu"}) == ["weights.backend"]
    split = {"engine": "vllm", "vllm": {"tensor_parallel": 4}}
    assert rejected(2, actors=split) == ["actors.vllm.tensor_parallel"]
    assert rejected(4, actors=split) == rejected(0, actors=split) == []
    several = {"learners": 3}
    assert rejected(2, cluster=several) == ["cluster.learners"]
    assert rejected(3, cluster=several) == rejected(0, cluster=several) == []
    assert rejected(2, cluster=several, learner={"device": "cpu"}) == []


@pytest.mark.parametrize(("node_rank", "has_error"), [("0", True), ("1", False)])
def test_learner_ranks_are_counted_by_node(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_rank: str, has_error: bool
) -> None:
    monkeypatch.setattr(devices, "torch_build", lambda: "cuda")
    monkeypatch.setattr(devices, "num_cuda_gpus", lambda: 1)
    options = ["--nnodes", "2", "--node-rank", node_rank, "--nproc-per-node", "2", *OPEN]
    options += ["--cluster.host", "192.0.2.1", "--cluster.service_port", "29411"]
    _, lines = check(
        tmp_path, *options, "--cluster.learner_port", "29412", "--cluster.learners", "3"
    )
    errors = [line for line in lines if "'cluster.learners' = 3" in line]
    assert len(errors) == has_error, lines
    assert all("this node has 2 of them and 1 visible GPUs" in error for error in errors)


@pytest.mark.parametrize(("learners", "fields"), [(1, []), (2, ["cluster.learner_port"])])
def test_the_port_of_several_learners_must_be_free(learners: int, fields: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, findings = taken.getsockname()[1], Findings()
        cluster = {"learners": learners, "learner_port": port}
        tree = {"model": {"path": str(MODEL)}, "task": {"name": "arithmetic"}, "cluster": cluster}
        check_ports(Config.model_validate(tree), findings)
    assert [getattr(error, "field", "") for error in findings.errors] == fields


def test_gpu_is_detected_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_build", lambda: "cuda")
    monkeypatch.setattr(devices, "num_cuda_gpus", lambda: 0)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    assert "no CUDA device is visible (CUDA_VISIBLE_DEVICES = '')" in devices.why_no_gpu()
    monkeypatch.setattr(devices, "num_cuda_gpus", lambda: 1)
    assert devices.why_no_gpu() == ""


class Scoring:
    """A task of three prompts whose verifier calls the given function."""

    held_out_prompts: ClassVar[list[Prompt]] = []
    train_prompts: ClassVar[list[Prompt]] = [
        Prompt(prompt_id=n, text="?", answer="1") for n in range(3)
    ]

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score

    def extract(self, completion: str) -> str | None:
        return completion

    def score(self, prompt: Prompt, completion: str) -> float:
        return self._score(completion)


def fail(completion: str) -> float:
    raise RuntimeError("broken scorer")


def hang(completion: str) -> float:
    threading.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda completion: 1.0, "scores an empty completion 1 for training prompt 0"),
        (lambda completion: 0.0, "rejects the reference answer of each of the first 3 prompts"),
        (lambda completion: 2.0, "is not a finite number in [0, 1]"),
        (fail, "raised RuntimeError: broken scorer"),
        (hang, "returned no result within 0.2 s"),
        (lambda completion: float(completion == "1"), ""),
    ],
)
def test_verifier_must_distinguish_the_reference_answer_from_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, score: Callable[[str], float], message: str
) -> None:
    monkeypatch.setattr(task_check, "make_task", lambda _: Scoring(score))
    config = Config.model_validate(
        {
            "model": {"path": str(MODEL)},
            "task": {"name": "arithmetic"},
            "actors": {"verifier_timeout_s": 0.2},
        }
    )
    findings = Findings()
    task_check.check_task(config, findings)
    assert [message in str(error) for error in findings.errors] == ([True] if message else [])


def test_all_errors_of_a_section_are_listed_at_once(model: Path, tmp_path: Path) -> None:
    status, lines = check(tmp_path, "--task.name", "jsonl", "--task.match", "exakt")
    assert (status, lines[-1]) == (1, "2 errors")
    text = "\n".join(lines)
    assert "'task.match' = 'exakt'" in text and "did you mean 'exact'" in text
    assert "'task.path' = None: task.name = 'jsonl' needs a data file" in text


def test_an_unknown_name_in_a_format_is_an_error(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(8)]
    overrides = [*write_rows(tmp_path, rows), "--task.name", "dataset"]
    status, lines = check(tmp_path, *overrides, "--task.format", "Q: {promt}")
    [error] = [line for line in lines if line.startswith("error: ")]
    assert status == 1
    assert "format has {promt}, which is neither {prompt} nor one of its columns" in error
