"""Which suites an evaluation takes, and with which settings."""

from pathlib import Path

import pytest

from speed_async.config.load import parse_config
from speed_async.config.sections.evaluate import SuiteConfig
from speed_async.errors import SpeedAsyncError
from speed_async.evaluation.protocols import PROTOCOLS
from speed_async.launcher.evaluation.plan import Options, plan_model, plan_run
from speed_async.launcher.evaluation.suite_names import parse_suites


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "data" / "math500").mkdir(parents=True)
    (tmp_path / "data" / "aime24").mkdir()
    (tmp_path / "own.jsonl.gz").write_bytes(b"")
    return tmp_path


def test_a_suite_is_a_prepared_folder_a_path_or_a_named_path(base: Path) -> None:
    own = base / "own.jsonl.gz"
    suites = parse_suites(["math500, aime24", str(own), f"mine={own}"], {}, base=base)
    assert [(each.name, each.path) for each in suites] == [
        ("math500", str(base / "data" / "math500")),
        ("aime24", str(base / "data" / "aime24")),
        ("own", str(own)),
        ("mine", str(own)),
    ]
    assert parse_suites(["mine=org/set"], {}, base=base)[0].path == "org/set"


def test_suites_of_a_run_keep_their_settings(base: Path) -> None:
    configured = SuiteConfig(name="math500", path="/elsewhere", samples=4)
    assert parse_suites(["math500"], {"math500": configured}, base=base) == [configured]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mat500", "did you mean math500"),
        ("nosuch", "unknown suite; give one of aime24, math500 .*, a path, or NAME=PATH"),
        ("amc23", "`speed-async data prepare amc23` makes it"),
        ("mine=nosuch.jsonl", "'nosuch.jsonl' does not exist"),
        ("some/nosuch.jsonl", "'some/nosuch.jsonl' does not exist"),
        ("math500,math500", "'math500' is given twice"),
    ],
)
def test_a_wrong_suite_is_refused_with_the_remedy(base: Path, text: str, message: str) -> None:
    with pytest.raises(SpeedAsyncError, match=message):
        parse_suites([text], {}, base=base)


def test_protocols_set_samples_by_suite_and_options_override_them(base: Path, monkeypatch) -> None:
    monkeypatch.chdir(base)
    plan = plan_model("m", Options(suites=("math500,aime24",)))
    assert [each.config.samples for each in plan.suites] == [1, 16]
    assert {each.config.temperature for each in plan.suites} == {1.0}
    assert {each.max_new_tokens for each in plan.suites} == {3072}
    assert all("\\boxed{}" in each.format for each in plan.suites)
    [target] = plan.targets
    assert target.config.model.path == str(base / "m") and target.wants_chat_template
    assert target.out == base / "runs" / "eval-m-speed-paper"

    overrides = ("--actors.slots", "7", "--model.chat_template", "false")
    changed = Options(suites=("aime24",), samples=2, max_new_tokens=9, overrides=overrides)
    plan = plan_model("m", changed)
    assert plan.suites[0].config.samples == 2 and plan.suites[0].max_new_tokens == 9
    assert plan.targets[0].config.actors.slots == 7 and not plan.targets[0].wants_chat_template

    greedy = plan_model("m", Options(suites=("aime24",), temperature=0.0))
    assert greedy.suites[0].config.samples == 1
    qwen = plan_model("m", Options(suites=("aime24",), protocol=PROTOCOLS["qwen-math"]))
    assert qwen.suites[0].config.temperature == 0 and not qwen.targets[0].wants_chat_template
    assert "<|im_start|>user\n{prompt}<|im_end|>" in qwen.suites[0].format


def test_a_run_is_evaluated_with_its_own_settings(base: Path, monkeypatch) -> None:
    monkeypatch.chdir(base)
    suite = {"name": "own", "path": str(base / "own.jsonl.gz"), "temperature": 0.5, "samples": 3}
    source = {"path": "x", "format": "Q: {prompt}"}
    tree = {
        "model": {"path": str(base), "chat_template": True},
        "task": {"name": "dataset", "sources": [source]},
        "actors": {"temperature": 0.7, "max_new_tokens": 33},
        "evaluate": {"suites": [suite]},
    }
    config = parse_config(tree)
    checkpoint = base / "run" / "checkpoints" / "version-000020"
    plan = plan_run(base / "run", config, [checkpoint], Options())
    assert plan.suites == () and plan.held_out_of == config
    assert plan.targets[0].config.model.path == str(checkpoint)
    assert plan.targets[0].out == base / "run" / "evaluation" / "version-000020"

    plan = plan_run(base / "run", config, [checkpoint], Options(suites=("own,math500",)))
    own, math500 = plan.suites
    assert (own.config.temperature, own.config.samples, own.format) == (0.5, 3, "{prompt}")
    assert (math500.config.temperature, math500.format) == (0.7, "Q: {prompt}")
    assert plan.held_out_of is None and plan.targets[0].config.model.chat_template

    # A path is not the suite of the run that has its name.
    plan = plan_run(base / "run", config, [checkpoint], Options(suites=("own=own.jsonl.gz",)))
    [own] = plan.suites
    assert (own.config.temperature, own.config.samples, own.format) == (0.7, 1, "Q: {prompt}")


def test_temperatures_that_vllm_would_raise_are_refused_for_every_suite(
    base: Path, monkeypatch
) -> None:
    monkeypatch.chdir(base)

    def check_model(engine: str, temperature: float) -> None:
        plan_model("m", Options(suites=("aime24",), engine=engine, temperature=temperature)).check()

    for engine, temperature in (("vllm", 0.0), ("vllm", 0.01), ("torch", 0.005)):
        check_model(engine, temperature)
    with pytest.raises(SpeedAsyncError, match=r"'aime24' at temperature 0.005: vLLM .* at 0.01"):
        check_model("vllm", 0.005)

    cold = {"name": "own", "path": str(base / "own.jsonl.gz"), "temperature": 0.004}
    tree = {
        "model": {"path": str(base)},
        "task": {"name": "arithmetic"},
        "actors": {"temperature": 0.003, "engine": "torch"},
        "evaluate": {"suites": [cold]},
    }
    config = parse_config(tree)
    for suites, message in (
        (("own",), "'own' at temperature 0.004: .* set --temperature"),
        ((), "'held_out' at temperature 0.003: .* set --actors.temperature"),
    ):
        plan_run(base, config, [base], Options(suites=suites)).check()
        with pytest.raises(SpeedAsyncError, match=message):
            plan_run(base, config, [base], Options(suites=suites, engine="vllm")).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(samples=2, temperature=0.0), "--samples 2: at temperature 0"),
        (Options(samples=2, protocol=PROTOCOLS["greedy"]), "--samples 2: at temperature 0"),
        (Options(format="no placeholder"), "it needs {prompt}"),
        (Options(format="{prompt} {question} \\boxed{x}"), "{question} is not replaced"),
    ],
)
def test_options_that_contradict_are_refused(options: Options, message: str) -> None:
    with pytest.raises(SpeedAsyncError, match=message):
        options.check()
