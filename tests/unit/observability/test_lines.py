import io

from speed_async.observability.lines import Lines, evaluation_line
from speed_async.observability.metrics import Event, Value

GAUGES: dict[str, Value] = {
    "wall_s": 30.0,
    "policy_version": 12,
    "updates_total": 100,
    "reward_mean": 0.412,
    "accuracy": 0.52,
    "generated_tokens_per_s": 5300.4,
    "trained_tokens_per_s": 2100.0,
    "gate_acceptance": 0.38,
    "staleness_mean": 0.8,
    "staleness_max": 2,
    "buffer_groups": 12,
    "buffer_capacity": 64,
    "bottleneck": "actor",
    "eta_s": 62.0,
    "actors_alive": 2,
    "credits": 96,
    "ledger_closes": True,
}


def printed(*events: Event) -> list[str]:
    stream = io.StringIO()
    lines = Lines(stream)
    for event in events:
        lines.update(event)
    return stream.getvalue().splitlines()


def test_step_is_one_line_after_the_start_line() -> None:
    assert printed(Event(kind="step", values=GAUGES)) == [
        "start v12 updates 100 actors 2 credits 96 buffer 64",
        "step 12/100 v12 reward 0.41 acc 0.52 gen 5300 tok/s train 2100 tok/s accept 0.38"
        " stale 0.8/2 buffer 12/64 bound actor eta 1m02s",
    ]


def test_step_line_has_the_service_lag() -> None:
    [_, line] = printed(Event(kind="step", values=GAUGES | {"loop_lag_s": 0.0213}))
    assert line.endswith(" eta 1m02s lag 21 ms")


def test_status_prints_only_the_start_line() -> None:
    status = Event(kind="status", values=GAUGES)
    assert len(printed(status, status, status)) == 1


def test_evaluation_and_end_are_printed() -> None:
    evaluation: dict[str, Value] = {
        "policy_version": 10,
        "accuracy": 0.5196,
        "num_passed": 133,
        "num_completions": 256,
        "oldest_version": 10,
        "newest_version": 11,
        "wall_s": 3725.0,
    }
    end: dict[str, Value] = {"ok": False, "reason": "actor-1: killed\nby signal 9", "wall_s": 7.0}
    start, evaluated, ended = printed(
        Event(kind="evaluation", values=evaluation), Event(kind="end", values=end)
    )
    assert start.startswith("start ")
    assert evaluated == ("evaluation v10 accuracy 0.520 passed 133/256 versions 10..11 at 1h02m")
    unscored = evaluation_line({"num_passed": 1, "num_completions": 2, "num_unscored": 3})
    assert " passed 1/2 unscored 3 versions " in unscored
    assert ended == "end failed v- at 7s: actor-1: killed by signal 9"


def test_end_line_names_the_outcome() -> None:
    for outcome, label in (("completed", "ok"), ("stopped", "stopped"), ("failed", "failed")):
        end: dict[str, Value] = {"outcome": outcome, "ok": outcome == "completed", "reason": "x"}
        assert printed(Event(kind="end", values=end))[-1] == f"end {label} v- at -: x"


def test_diagnosis_is_printed_at_its_start_and_its_end() -> None:
    texts = (
        "no reward: none of the last 40. Change: the task.",
        "no reward: none of the last 41. Change: the task.\nNothing fits 8 tokens.",
        "Nothing fits 8 tokens.",
        "",
    )
    lines = printed(
        *(Event(kind="status", values=GAUGES | {"diagnoses": text}) for text in texts),
        Event(kind="status", values=GAUGES),
    )
    assert lines[1:] == [
        "diagnosis no reward: none of the last 40. Change: the task.",
        "diagnosis Nothing fits 8 tokens.",
        "diagnosis over: no reward",
        "diagnosis over: Nothing fits 8 tokens.",
    ]


def test_recurring_warning_is_printed_again() -> None:
    texts = ("actor-1 is lost", "actor-1 is lost", "", "actor-1 is lost")
    lines = printed(*(Event(kind="status", values=GAUGES | {"warning": text}) for text in texts))
    assert lines[1:] == ["warning actor-1 is lost"] * 2


def sample(number: int, **values: Value) -> Event:
    known: dict[str, Value] = {
        "policy_version": number,
        "reward": 1.0,
        "decision": "continued",
        "extracted": "72",
        "truncated": False,
        "prompt": f"prompt {number}",
        "completion": "24\nand 48 is 72",
    }
    return Event(kind="sample", values=known | values)


def step(version: int) -> Event:
    return Event(kind="step", values=GAUGES | {"policy_version": version})


def test_first_middle_and_last_samples_are_printed() -> None:
    events = [event for n in range(100) for event in (sample(n), step(n))]
    lines = printed(*events, Event(kind="end", values={"ok": True, "reason": "completed"}))
    samples = [line for line in lines if line.startswith("sample ")]
    assert [line.split()[1] for line in samples] == ["v0", "v52", "v99"]
    assert samples[0] == (
        'sample v0 reward 1.00 continued prompt "prompt 0" completion "24 and 48 is 72"'
        ' extracted "72"'
    )
    assert lines[-1].startswith("end ok") and lines[-2] == samples[-1]


def test_truncated_sample_without_an_answer_is_one_line() -> None:
    [line] = printed(sample(3, truncated=True, extracted=None, completion="so\n" * 1000))
    assert " TRUNCATED " in line and line.endswith("extracted -")
    assert len(line) < 400 and " ... " in line


def test_missing_values_are_dashes() -> None:
    assert printed(Event(kind="step", values={}))[1] == (
        "step -/- v- reward - acc - gen - tok/s train - tok/s accept - stale -/- buffer -/-"
        " bound - eta -"
    )


def test_unbalanced_ledger_and_new_warnings_are_printed_once() -> None:
    warned = Event(kind="status", values=GAUGES | {"warning": "actor-1.0 lost"})
    broken = Event(kind="step", values=GAUGES | {"ledger_closes": False})
    lines = printed(warned, warned, broken)
    assert lines[1] == "warning actor-1.0 lost"
    assert lines[2].endswith("eta 1m02s LEDGER DOES NOT BALANCE")
    assert len(lines) == 3


def test_ascii_stream_replaces_other_characters() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Lines(stream).update(Event(kind="end", values={"ok": True, "reason": "π done"}))
    assert raw.getvalue().decode().splitlines()[1] == "end ok v- at -: ? done"
