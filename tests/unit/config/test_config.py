"""Configuration: accepted input, and errors for invalid input."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from speed_async.config.load import load_config, read_resolved, save_config
from speed_async.config.presets import PRESETS
from speed_async.config.resumed import load_resumed
from speed_async.config.schema import Algorithm
from speed_async.errors import ConfigError
from speed_async.launcher.run_folder import make_run_folder
from speed_async.transport.key_making import make_keys

MINIMAL = """
algorithm = "speed-rloo"
[model]
path = "model"
[task]
name = "arithmetic"
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return path


def test_relative_paths_in_the_file_are_relative_to_its_folder(config_file: Path) -> None:
    assert load_config(config_file).model.path == str(config_file.parent / "model")


def test_relative_paths_in_overrides_are_relative_to_the_current_directory(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "other"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(config_file, ["--model.path", "other"]).model.path == str(other)


def test_overrides_accept_toml_values_in_both_forms(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["--learner.lr", "1e-4", "--run.seed=3", "--observe.wandb", "true", "--run.folder", "a/b"],
    )
    assert config.learner.lr == 1e-4
    assert config.run.seed == 3
    assert config.observe.wandb is True
    assert config.run.folder == "a/b"


def test_resolved_config_round_trip(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["--gate.n_init", "3"])
    save_config(config, tmp_path / "resolved.json")
    assert read_resolved(tmp_path / "resolved.json") == config
    assert json.loads((tmp_path / "resolved.json").read_text())["gate"]["n_init"] == 3


def test_default_credits_are_one_batch_per_version_of_the_staleness_window(
    config_file: Path,
) -> None:
    config = load_config(
        config_file, ["--buffer.max_staleness", "1", "--learner.groups_per_update", "5"]
    )
    assert config.max_credits == (1 + 1) * 5


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        (["--learner.learning_rate", "1"], "learner.learning_rate", "unknown key"),
        (["--actors.top_p", "0.9"], "actors.top_p", "the mass of the nucleus"),
        (["--learner.groups_per_updat", "1"], "learner.groups_per_updat", "groups_per_update"),
        (["--learnr.lr", "1"], "learnr", "did you mean 'learner'"),
        (["--learner.lr", "fast"], "learner.lr", "number"),
        (["--run.seed", "1.5"], "run.seed", "give a whole number"),
        (["--run.updates", '"8"'], "run.updates", "a whole number, without quotes"),
        (["--run.dir", "x"], "run.dir", "did you mean 'run.folder'"),
        (["--learner.lr", "-1"], "learner.lr", "give 0 or more"),
        (["--run.updates", "-1"], "run.updates", "give 0 or more"),
        (["--learner.lr", "nan"], "learner.lr", "finite"),
        (["--learner.lr", "inf"], "learner.lr", "finite"),
        (["--buffer.credits", "15"], "buffer.credits", "set at least 16"),
        (["--buffer.capacity_groups", "15"], "buffer.capacity_groups", "set at least 16"),
        (["--buffer.capacity_bytes", "1000"], "buffer.capacity_bytes", "takes 18432 bytes"),
        (["--gate.low", "0.9", "--gate.high", "0.5"], "gate.low", "gate.high"),
        (["--gate.n_init", "1"], "gate.n_init", "at least 2"),
        (["--gate.low", "0.3", "--gate.high", "0.4"], "gate.n_init", "widen"),
        (["--model.context_length", "64"], "actors.max_new_tokens", "no space"),
        (["--model.path", "/nowhere"], "model.path", "no such folder"),
        (
            ["--model.system_prompt", "Think."],
            "model.system_prompt",
            "with model.chat_template = true",
        ),
        (
            ["--model.chat_template", "true", "--model.template_arguments.tools", "1"],
            "model.template_arguments.tools",
            "is set by this program",
        ),
        (["--learner.cpu_offload", "true"], "learner.cpu_offload", "set cluster.learners to 2"),
        (
            ["--learner.compile", "true", "--learner.activation_checkpointing", "selective"],
            "learner.activation_checkpointing",
            "use full or none",
        ),
        (
            ["--learner.compile", "true", "--cluster.learners", "2"],
            "learner.compile",
            "set cluster.learners to 1",
        ),
        (["--actors.max_restarts", "1000"], "actors.max_restarts", "set at most 999"),
        (["--task.name", "jsonl"], "task.path", "needs a data file"),
        (["--weights.canary_tolerance", "0"], "weights.canary_tolerance", "give more than 0"),
        (["--learner.lr"], "learner.lr", "no value"),
        (["learner.lr=1"], "learner.lr=1", "--section.field"),
    ],
)
def test_invalid_value_error_has_field_value_and_remedy(
    config_file: Path, overrides: list[str], field: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, overrides)
    assert raised.value.field == field
    assert expected in str(raised.value)


def test_all_errors_are_reported_together(config_file: Path) -> None:
    """Schema, unknown keys, combinations, files and invalid overrides, in one error."""
    config_file.write_text(
        MINIMAL.replace('"model"', '"nowhere"')
        + '[learner]\nlr = "fast"\n[gate]\nlow = 0.9\nhigh = 0.1\n'
    )
    overrides = ["--lr", "1", "--buffer.credits", "1", "--actors.slot", "1"]
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, overrides)
    fields = {error.field for error in raised.value.errors}
    assert fields == {
        "--lr",
        "learner.lr",
        "gate.low",
        "model.path",
        "buffer.credits",
        "actors.slot",
    }
    assert str(raised.value).startswith("6 config values cannot be used:\n")
    assert all(str(error) in str(raised.value) for error in raised.value.errors)


def errors_of(config_file: Path, *overrides: str) -> list[str]:
    """Fields of all errors."""
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, overrides)
    return [error.field for error in raised.value.errors]


@pytest.mark.parametrize(
    ("text", "overrides", "fields"),
    [
        ("", ["--task.name=jsonl", "--task.match=exakt"], ["task.match", "task.path"]),
        (
            "",
            ["--task.reward=boxes", "--task.num_held_out=0", "--task.name=jsonl"],
            ["task.reward", "task.num_held_out", "task.path"],
        ),
        ("", ["--task.name=jsonnl", "--task.match=exakt"], ["task.match", "task.name"]),
        (
            '[[task.rewards]]\nname = "correct"\nwieght = 1.0\n',
            ["--buffer.credits=1", "--model.path=nowhere"],
            ["task.rewards.0.wieght", "buffer.credits", "model.path"],
        ),
        (
            "[[evaluate.suites]]\nsamples = 2\n",
            ["--task.name=jsonl"],
            ["evaluate.suites.0.path", "evaluate.suites.0.name", "task.path"],
        ),
        (
            "[gate]\nlow = 0.9\nhigh = 0.1\nn_init = 1\nn_cont = 0\n",
            [],
            ["gate.n_cont", "gate.low"],
        ),
    ],
)
def test_one_error_hides_no_other_of_the_same_section(
    config_file: Path, text: str, overrides: list[str], fields: list[str]
) -> None:
    config_file.write_text(MINIMAL + text)
    assert errors_of(config_file, *overrides) == fields


def test_a_missing_required_field_hides_no_other_error(config_file: Path) -> None:
    config_file.write_text(
        'algorithm = "speed-rloo"\n[task]\nname = "jsonl"\n[learner]\nlr = -1.0\n'
    )
    expected = ["learner.lr", "model", "task.path"]
    assert sorted(errors_of(config_file, "--gate.low=0.9", "--gate.high=0.1")) == [
        "gate.low",
        *expected,
    ]
    config_file.write_text('[model]\npath = "model"\n[task]\nmatch = "numeric"\n')
    assert errors_of(config_file, "--buffer.credits=1") == ["task.name", "buffer.credits"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["--cluster.host=10.1.2.3", "--cluster.kyes=keys"], "cluster.kyes"),
        (["--task.name=jsonl", "--task.pth=data.jsonl"], "task.pth"),
        (["--gate.low=0.9", "--gate.high=low"], "gate.high"),
        (["--gate.mode=of", "--gate.n_init=1"], "gate.mode"),
    ],
)
def test_an_error_that_follows_from_another_one_is_not_reported(
    config_file: Path, overrides: list[str], field: str
) -> None:
    """Such as the host that requires keys, beside the misspelt cluster.keys."""
    assert errors_of(config_file, *overrides) == [field]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--lr", "1e-4"], "did you mean --learner.lr 1e-4?"),
        (["--lr=1e-4"], "did you mean --learner.lr 1e-4?"),
        (["learner.lr=1"], "did you mean --learner.lr 1?"),
        (["learner.lr", "1"], "did you mean --learner.lr 1?"),
        (["-learner.lr", "1"], "did you mean --learner.lr 1?"),
        (["--learner-lr", "1"], "did you mean --learner.lr 1?"),
        (["--learner_lr", "1"], "did you mean --learner.lr 1?"),
        (["--max-new-tokens", "9"], "did you mean --actors.max_new_tokens 9?"),
        (["--max_new_token", "9"], "did you mean --actors.max_new_tokens 9?"),
        (["--device", "cpu"], "did you mean --actors.device cpu or --learner.device cpu?"),
        (["--learning-rate", "1"], "did you mean --learner.lr 1?"),
        (["--learner.learning_rate", "1"], "did you mean 'learner.lr'?"),
        (["--actors.lr", "1"], "did you mean 'learner.lr'?"),
        (["--learn.lr", "1"], "did you mean 'learner'?"),
        (["--model", "x"], "'model' is a section; did you mean --model.path x?"),
        (["--task", "jsonl"], "'task' is a section; did you mean --task.name jsonl?"),
        (["--actors.vllm", "3"], "a section; set its fields: tensor_parallel"),
        (["--learner.lr", "--run.seed", "3"], "'learner.lr' = '': this override has no value"),
        (["other.toml"], "not an override"),
        (["--nonsense", "3"], "`speed-async train --help` lists all fields"),
        (["--algorithm", "speed_rloo"], "did you mean 'speed-rloo'?"),
        (["--gate.mode", "screening"], "did you mean 'screen'?"),
        (["--observe.wandb", "True"], "true or false"),
    ],
)
def test_misspelt_overrides_get_suggestions(
    config_file: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, overrides)
    assert len(raised.value.errors) == 1
    assert expected in str(raised.value)


def test_field_outside_of_its_section_gets_a_suggestion(
    config_file: Path,
) -> None:
    config_file.write_text("lr = 1e-4\n" + MINIMAL)
    with pytest.raises(
        ConfigError, match=r"'lr' = 0\.0001: unknown key; did you mean 'learner.lr'"
    ):
        load_config(config_file)


@pytest.mark.parametrize("text", ["2026", "2026-11-28", "true", "1e5"])
def test_string_fields_keep_values_that_look_like_other_types(config_file: Path, text: str) -> None:
    assert load_config(config_file, ["--run.folder", text]).run.folder == text
    assert load_config(config_file, ["--run.folder", f"'{text}'"]).run.folder == text


def test_folder_instead_of_a_file_is_an_error_with_a_remedy(
    config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*/config\.toml\?"):
        load_config(tmp_path)
    run, _ = make_run_folder(load_config(config_file, ["--run.folder", str(tmp_path / "a")]))
    with pytest.raises(ConfigError, match=f"--resume {run.path}"):
        load_config(run.path)
    with pytest.raises(ConfigError, match=r"CONFIG comes first"):
        load_config("--learner.lr", ["1", str(config_file)])


def test_resolved_configuration_can_be_read_from_json(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["--gate.n_init", "3"])
    save_config(config, tmp_path / "resolved.json")
    assert load_config(tmp_path / "resolved.json") == config


def test_missing_or_invalid_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)


def test_missing_required_field_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[model]\npath = "."\n')
    with pytest.raises(ConfigError, match="'task'"):
        load_config(path)


def test_runs_with_the_same_name_get_separate_folders(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["--run.folder", str(tmp_path / "runs" / "a")])
    first, resolved = make_run_folder(config)
    second, _ = make_run_folder(config)
    assert (first.path.name, second.path.name) == ("a", "a-2")
    assert read_resolved(first.config) == resolved
    assert resolved.run.folder == str(first.path)


def test_run_folder_that_cannot_be_created_is_reported(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(config_file, ["--run.folder", str(tmp_path / "file" / "a")])
    with pytest.raises(ConfigError, match=r"run\.folder"):
        make_run_folder(config)


def test_run_folder_name_must_be_utf8(config_file: Path, tmp_path: Path) -> None:
    """Linux allows any bytes in a name; Python represents invalid UTF-8 as surrogates."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff/run")
    config = load_config(config_file, ["--run.folder", folder])
    with pytest.raises(ConfigError, match="is not UTF-8: use another folder") as raised:
        make_run_folder(config)
    str(raised.value).encode()  # it can be printed


def test_overrides_take_precedence_over_the_preset(config_file: Path) -> None:
    config = load_config(config_file, ["--algorithm", "dapo", "--objective.clip_high", "0.4"])
    assert config.gate.mode == "filter"
    assert (config.objective.advantage, config.objective.policy_loss) == ("grpo", "ppo_clip")
    assert (config.objective.clip_low, config.objective.clip_high) == (0.2, 0.4)
    assert config.objective.overlong_share == pytest.approx(1 / 6)


def test_the_default_is_rloo_with_many_small_groups(config_file: Path) -> None:
    config_file.write_text(MINIMAL.replace('algorithm = "speed-rloo"\n', ""))
    config = load_config(config_file)
    assert (config.algorithm, config.gate.mode) == ("rloo", "off")
    assert (config.gate.group_size, config.learner.groups_per_update) == (4, 96)
    wanted = load_config(config_file, ["--gate.n_cont", "20", "--learner.groups_per_update", "16"])
    assert (wanted.gate.group_size, wanted.learner.groups_per_update) == (24, 16)


ONE_COMPLETION = [
    *("--gate.mode", "off", "--gate.n_init", "1", "--gate.n_cont", "0"),
    *("--objective.advantage", "shrunken"),
]


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_every_algorithm_preset_is_applied_in_full(
    algorithm: str, config_file: Path, tmp_path: Path
) -> None:
    config = load_config(config_file, ["--algorithm", algorithm])
    assert config.algorithm == algorithm
    for section, parts in PRESETS[algorithm].items():
        resolved = getattr(config, section).model_dump()
        assert {name: resolved[name] for name in parts} == parts
    save_config(config, tmp_path / "resolved.json")
    assert read_resolved(tmp_path / "resolved.json") == config


def test_groups_of_one_completion_need_an_advantage_that_compares_groups(
    config_file: Path,
) -> None:
    assert load_config(config_file, ONE_COMPLETION).gate.group_size == 1


def test_the_buffer_has_space_for_all_credits_unless_it_is_limited(config_file: Path) -> None:
    many = ["--learner.groups_per_update", "96", "--buffer.max_staleness", "2"]
    assert load_config(config_file, ["--buffer.max_staleness", "2"]).capacity_groups == 256
    assert load_config(config_file, many).capacity_groups == 288
    limited = load_config(config_file, [*many, "--buffer.capacity_groups", "100"])
    assert limited.capacity_groups == 100


def test_ratio_limits_follow_from_the_correction(config_file: Path) -> None:
    def limits(*overrides: str) -> tuple[float | None, float | None]:
        objective = load_config(config_file, overrides).objective
        return objective.min_ratio, objective.max_ratio

    assert limits() == (None, None)
    assert limits("--objective.correction", "token_tis") == (None, 2.0)
    assert limits("--objective.correction", "token_mask") == (0.5, 5.0)
    assert limits("--objective.correction=token_mask", "--objective.max_ratio=3") == (0.5, 3.0)


def test_group_size_does_not_depend_on_the_gate_mode(config_file: Path) -> None:
    seen = {
        mode: load_config(config_file, ["--gate.mode", mode]).gate
        for mode in ("screen", "filter", "off")
    }
    assert {mode: gate.num_screening for mode, gate in seen.items()} == {
        "screen": 4,
        "filter": 24,
        "off": 0,
    }
    assert {gate.group_size for gate in seen.values()} == {24}


@pytest.mark.parametrize(
    ("overrides", "field", "remedy"),
    [
        (["--gate.n_init", "1", "--gate.n_cont", "0"], "gate.n_cont", "set n_init + n_cont to 2"),
        (["--gate.n_cont", "0"], "gate.n_cont", "gate.mode = 'filter'"),
        (
            ["--objective.correction", "token_mask", "--objective.min_ratio", "6.0"],
            "objective.min_ratio",
            "below objective.max_ratio = 5.0",
        ),
        (
            ["--objective.correction=sequence_snis", "--objective.entropy_coefficient=0.1"],
            "objective.correction",
            "set 'sequence_tis'",
        ),
        (
            ["--gate.mode", "off", "--objective.screening_samples", "none"],
            "objective.screening_samples",
            "set 'all'",
        ),
        (
            ["--gate.mode", "filter", "--objective.screening_samples", "none"],
            "objective.screening_samples",
            "would use none",
        ),
        (
            [
                *("--gate.mode", "filter", "--gate.n_init", "2", "--gate.n_cont", "2"),
                *("--gate.low", "0.25", "--gate.high", "0.75"),
                *("--objective.screening_samples", "unbiased"),
            ],
            "objective.screening_samples",
            "raise gate.n_init, or set 'all'",
        ),
        (
            ["--objective.advantage", "shrunken", "--learner.groups_per_update", "1"],
            "learner.groups_per_update",
            "set 2 or more",
        ),
        (
            [
                *("--gate.mode", "off", "--objective.advantage", "shrunken"),
                *("--buffer.order", "signal"),
            ],
            "buffer.order",
            "set 'arrival'",
        ),
        (
            [*ONE_COMPLETION, "--objective.advantage", "rloo"],
            "gate.n_cont",
            "objective.advantage = 'shrunken'",
        ),
        ([*ONE_COMPLETION, "--curriculum.kind", "posterior"], "curriculum.kind", "gate.n_init = 2"),
        ([*ONE_COMPLETION, "--gate.mode", "screen"], "gate.n_cont", "gate.mode = 'off'"),
        (
            ["--task.reward", "boxed", "--task.rewards", '[{name = "correct"}]'],
            "task.reward",
            "add it to them as one more table",
        ),
        (
            ["--task.rewards", '[{name = "a:close"}, {name = "b:close"}]'],
            "task.rewards",
            "several rewards have this name",
        ),
        (["--task.reward", "overlong"], "task.rewards", "set objective.overlong_share"),
        (["--task.reward", "boxes"], "task.reward", "'correct', 'boxed', 'answer_tag' or <"),
        (
            ["--task.rewards", '[{name = "correct", wieght = 2.0}]'],
            "task.rewards.0.wieght",
            "did you mean 'weight'?",
        ),
        (["--algorithm", "speed-grpo"], "algorithm", "input should be 'rloo'"),
        (["--objective.clip_high", "none"], "objective.clip_high", "give a number"),
    ],
)
def test_incompatible_options_are_rejected(
    overrides: list[str], field: str, remedy: str, config_file: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, overrides)
    assert field in str(raised.value)
    assert remedy in str(raised.value)


def test_non_loopback_host_without_keys_is_rejected_with_both_remedies(
    config_file: Path,
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config_file, ["--cluster.host", "10.1.2.3"])
    assert (raised.value.field, raised.value.value) == ("cluster.host", "10.1.2.3")
    assert "speed-async keys FOLDER" in raised.value.remedy
    assert "'insecure'" in raised.value.remedy
    insecure = ["--cluster.security", "insecure"]
    load_config(config_file, ["--cluster.host", "10.1.2.3", *insecure])


def test_curve_requires_keys_readable_only_by_their_owner(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.keys' = None: .* needs keys"):
        load_config(config_file, ["--cluster.security", "curve"])
    monkeypatch.chdir(tmp_path)
    curve = ["--cluster.security", "curve", "--cluster.keys", "keys"]
    with pytest.raises(ConfigError, match=r"cluster\.keys' = '/.*no such folder"):
        load_config(config_file, curve)
    make_keys(tmp_path / "keys")
    assert load_config(config_file, curve).cluster.keys == str(tmp_path / "keys")
    (tmp_path / "keys" / "client.key_secret").chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_config(config_file, curve)
    (tmp_path / "keys" / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"it has no server\.key; create a complete folder"):
        load_config(config_file, curve)


def test_byte_order_mark_is_ignored(config_file: Path) -> None:
    with_mark = config_file.with_name("marked.toml")
    with_mark.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())
    assert load_config(with_mark) == load_config(config_file)


def test_config_name_that_is_too_long_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config("x" * 5000)


SOURCES = """
[model]
path = "org/model"
[task]
name = "dataset"
[[task.sources]]
path = "here.jsonl"
[[task.sources]]
path = "org/name"
"""


def test_paths_that_do_not_exist_may_be_ids_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "config.toml").write_text(SOURCES)
    config = load_config(tmp_path / "config.toml")
    assert config.model.path == "org/model"
    assert [s.path for s in config.task.sources] == [str(tmp_path / "here.jsonl"), "org/name"]


@pytest.mark.parametrize(
    ("added", "field", "remedy"),
    [
        ("weight = 2.0", "task.sources", "no weight, and others have one"),
        ("wait = 2.0", "task.sources.1.wait", "did you mean 'weight'"),
        ("[gate]", "task.sources", "no such file or folder"),
        ("task_format", "task.format", "set it in each source"),
        ("task_path", "task.path", "list it as one of the sources"),
        ("arithmetic", "task.sources", "2 sources': has an effect only with task.name = 'dataset'"),
    ],
)
def test_errors_of_sources_name_the_field(
    tmp_path: Path, added: str, field: str, remedy: str
) -> None:
    if added != "[gate]":
        (tmp_path / "here.jsonl").touch()
    text = f"{SOURCES}{added}\n"
    overrides = {
        "task_format": ["--task.format", "{prompt}?"],
        "task_path": ["--task.path", "org/other"],
        "arithmetic": ["--task.name", "arithmetic"],
    }.get(added, [])
    (tmp_path / "config.toml").write_text(SOURCES if overrides else text)
    with pytest.raises(ConfigError, match=remedy) as error:
        load_config(tmp_path / "config.toml", overrides)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("overrides", "field", "condition"),
    [
        (["--objective.prior_weight=3"], "objective.prior_weight", "'shrunken'"),
        (["--objective.policy_loss=cispo"], "objective.clip_low", "'ppo_clip' or 'gspo'"),
        (["--objective.policy_loss=a:loss"], "objective.clip_low", "'ppo_clip' or 'gspo'"),
        (["--objective.correction=token_tis"], "objective.min_ratio", "'token_mask' or "),
        ([], "objective.max_ratio", "objective.correction = 'token_tis' or "),
        ([], "objective.max_negative_kl", "'negative_sequence_mask'"),
        (["--algorithm=speed-rloo"], "objective.overlong_penalty", "overlong_share above 0"),
        (["--objective.kl=k3"], "objective.kl", "objective.kl_coefficient above 0"),
        ([], "curriculum.candidates", "curriculum.kind = 'posterior'"),
        (["--gate.mode=off"], "gate.low", "algorithm = 'speed-rloo' or 'dapo'"),
        (["--task.path=some.jsonl"], "task.path", "task.name = 'dataset' or 'jsonl'"),
        (["--task.format=Q: {prompt}"], "task.format", "task.name = 'dataset'"),
        (
            ["--task.name=dataset", "--task.path=org/data", "--task.num_prompts=3"],
            "task.num_prompts",
            "'arithmetic' or",
        ),
        (["--task.options.length=3"], "task.options", "'reasoning_gym:...' or 'verifiers:...'"),
        (["--task.score_truncated=true"], "task.truncated_reward", "score_truncated = false"),
        ([], "learner.min_lr_share", "learner.lr_schedule = 'linear' or 'cosine'"),
        (["--buffer.durability=none", "--buffer.spill=true"], "buffer.spill", "'batched'"),
        (["--cluster.keys=keys"], "cluster.keys", "cluster.security = 'curve'"),
        (["--observe.wandb_project=mine"], "observe.wandb_project", "observe.wandb = true"),
    ],
)
def test_a_setting_without_effect_is_refused_with_what_would_use_it(
    config_file: Path, overrides: list[str], field: str, condition: str
) -> None:
    given = [] if any(each.startswith(f"--{field}") for each in overrides) else [f"--{field}=0.75"]
    given = ["--curriculum.candidates=8"] if field == "curriculum.candidates" else given
    with pytest.raises(ConfigError, match="has an effect only with") as raised:
        load_config(config_file, [*overrides, *given])
    assert [error.field for error in raised.value.errors] == [field]
    assert condition in str(raised.value)
    assert "set that, or remove this setting" in str(raised.value)


def test_a_format_without_a_name_and_a_prompt_in_the_system_prompt_are_refused(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text(SOURCES.replace("org/model", "model"))
    (config_file.parent / "here.jsonl").touch()
    formats = ["--task.sources", '[{path = "here.jsonl", format = "\\\\boxed{x}"}]']
    suites = ["--evaluate.suites", '[{name = "a", path = "here.jsonl", format = "Q:"}]']
    system = ["--model.chat_template=true", "--model.system_prompt=Solve {prompt}"]
    monkeypatch.chdir(config_file.parent)
    assert errors_of(config_file, *formats, *suites, *system) == [
        "model.system_prompt",
        "task.sources.format",
        "evaluate.suites.format",
    ]


def test_a_task_of_the_user_may_use_every_field_of_its_section(config_file: Path) -> None:
    overrides = ["--task.name=my:task", "--task.num_prompts=3", "--task.match=math"]
    assert load_config(config_file, overrides).task.num_prompts == 3


def test_values_of_a_preset_count_as_not_set(config_file: Path) -> None:
    """clip_low and clip_high of `gspo`, without the loss that uses them."""
    overrides = ["--algorithm=gspo", "--objective.policy_loss=policy_gradient"]
    config = load_config(config_file, [*overrides, "--objective.correction=token_tis"])
    assert config.objective.clip_high == 4e-4


def test_a_run_of_an_earlier_version_with_a_setting_without_effect_can_be_resumed(
    config_file: Path, tmp_path: Path
) -> None:
    config = load_config(config_file, ["--curriculum.kind=posterior", "--curriculum.candidates=8"])
    run, config = make_run_folder(
        config.model_copy(
            update={"run": config.run.model_copy(update={"folder": str(tmp_path / "a")})}
        )
    )
    uniform = config.curriculum.model_copy(update={"kind": "uniform"})
    save_config(config.model_copy(update={"curriculum": uniform}), run.config)
    assert load_resumed(run.path, ["--run.updates=200"]).run.updates == 200
    with pytest.raises(ConfigError, match=r"objective\.prior_weight.* has an effect only with"):
        load_resumed(run.path, ["--objective.prior_weight=3"])
