"""The reasoning-gym task, with the real library."""

import importlib.util
import os
import random
import subprocess
import sys

import pytest

from speed_async.environments.gym import ReasoningGymTask
from speed_async.environments.task import data_fingerprint
from speed_async.errors import ConfigError, TaskError
from speed_async.types import Prompt

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
    ),
    # Only one worker imports the library, which takes seconds.
    pytest.mark.xdist_group("reasoning gym"),
]


def make(
    data_set: str = "chain_sum",
    options: dict[str, object] | None = None,
    num_prompts: int = 30,
    num_held_out: int = 10,
    seed: int = 0,
) -> ReasoningGymTask:
    return ReasoningGymTask(
        data_set=data_set,
        options=options or {},
        num_prompts=num_prompts,
        num_held_out=num_held_out,
        seed=seed,
    )


def chain_prompt(answer: str) -> Prompt:
    """A prompt for the base scorer, which gives partial credit for substrings."""
    entry: dict[str, object] = {"answer": answer, "metadata": {}}
    return Prompt(prompt_id=0, text="1 + 2 =", answer=answer, metadata=entry)


def test_oracle_answers_score_one_plain_tagged_and_boxed() -> None:
    task = make()
    for prompt in (*task.train_prompts, *task.held_out_prompts):
        assert task.score(prompt, f" {prompt.answer}\n") == 1.0
        assert task.score(prompt, f"<answer>0.5</answer> <answer>{prompt.answer}</answer>") == 1.0
        assert task.score(prompt, rf"so \boxed{{0.5}} no, \boxed{{{prompt.answer}}}") == 1.0
        assert task.score(prompt, rf"<answer>\boxed{{{prompt.answer}}}</answer>") == 1.0


def test_partial_credit_of_the_library_scores_zero() -> None:
    task = make()
    prompt = chain_prompt("3")
    entry = {"question": prompt.text, **prompt.metadata}
    import reasoning_gym

    library = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    assert library.score_answer("31", entry) == 0.5
    assert task.score(prompt, "31") == 0.0
    assert task.score(prompt, "the answer is 3") == 0.0
    assert task.score(prompt, "") == 0.0
    assert task.score(prompt, "3 <answer>4</answer>") == 0.0
    assert task.score(prompt, "3") == 1.0


def test_train_and_held_out_questions_are_distinct_in_a_small_data_set() -> None:
    options: dict[str, object] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = make(options=options, num_prompts=80, num_held_out=40)
    texts = [prompt.text for prompt in (*task.train_prompts, *task.held_out_prompts)]
    assert len(set(texts)) == len(texts) == 120
    assert [prompt.prompt_id for prompt in task.train_prompts] == list(range(80))
    assert [prompt.prompt_id for prompt in task.held_out_prompts] == list(range(40))
    assert all(prompt.held_out for prompt in task.held_out_prompts)


def test_prompts_depend_on_seed_and_held_out_prompts_only_on_their_number() -> None:
    assert (
        data_fingerprint(make(seed=3), {})
        == data_fingerprint(make(seed=3), {})
        != data_fingerprint(make(seed=4), {})
    )
    small, large = make(num_prompts=5), make(num_prompts=30)
    assert list(small.held_out_prompts) == list(large.held_out_prompts)
    assert list(small.train_prompts) == list(large.train_prompts)[:5]


def test_options_are_passed_to_the_data_set() -> None:
    options: dict[str, object] = {"min_terms": 7, "max_terms": 7}
    prompts = make(options=options).train_prompts
    num_operators = [p.text.count(" + ") + p.text.count(" - ") for p in prompts]
    assert set(num_operators) == {6}


def test_too_few_distinct_questions_raise() -> None:
    options: dict[str, object] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ConfigError) as caught:
        _ = make(options=options, num_prompts=400).train_prompts
    assert caught.value.field == "task.num_prompts"
    assert "distinct questions in 8000 tries" in str(caught.value)


def test_unknown_data_set_suggests_similar_names() -> None:
    with pytest.raises(ConfigError) as caught:
        make("chain_sums")
    assert caught.value.field == "task.name"
    assert "'reasoning_gym:chain_sums'" in str(caught.value)
    assert "did you mean chain_sum" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_term": 3}, "unexpected keyword argument 'num_term'"),
        ({"min_terms": 5, "max_terms": 2}, "max_terms must be >= min_terms"),
        ({"seed": 3}, "'seed' is not supported here: use task.seed"),
    ],
)
def test_invalid_options_raise(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(options=options)
    assert caught.value.field == "task.options"
    assert text in str(caught.value)


def test_missing_library_raises_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"pip install 'speed_async\[reasoning-gym\]'"):
        make()


def test_text_that_breaks_the_scorer_scores_zero() -> None:
    task = make("prime_factorization", num_prompts=2, num_held_out=1)
    prompt = task.train_prompts[0]
    import reasoning_gym

    library = reasoning_gym.create_dataset("prime_factorization", size=1, seed=0)
    with pytest.raises(ValueError):
        library.score_answer("import os", {"question": prompt.text, **prompt.metadata})
    assert task.score(prompt, "import os") == 0.0
    assert task.score(prompt, prompt.answer) == 1.0


def test_scorer_that_fails_on_its_own_answer_raises() -> None:
    task = make("n_queens", num_prompts=2, num_held_out=1)
    entry: dict[str, object] = {
        "answer": "2",
        "metadata": {},
    }  # lacks keys that the scorer requires
    with pytest.raises(KeyError):
        task.score(Prompt(prompt_id=0, text="?", answer="2", metadata=entry), "2")


def test_data_set_without_oracle_answers_is_scored() -> None:
    task = make("graph_color", num_prompts=2, num_held_out=1)
    prompt = task.train_prompts[0]
    assert prompt.answer == ""
    assert task.score(prompt, "") == 0.0
    assert task.score(prompt, "not a colouring") == 0.0


def test_global_random_state_is_preserved() -> None:
    random.seed(11)
    expected = random.random()
    random.seed(11)
    one = make("list_functions", num_prompts=5, num_held_out=2)
    texts = [prompt.text for prompt in one.train_prompts]
    assert random.random() == expected
    other = make("list_functions", num_prompts=5, num_held_out=2)
    assert [prompt.text for prompt in other.train_prompts] == texts


def test_hash_ordered_data_set_requires_a_fixed_hash_seed() -> None:
    program = (
        "from speed_async.environments.gym import ReasoningGymTask\n"
        "from speed_async.environments.task import data_fingerprint\n"
        "from speed_async.errors import TaskError\n"
        "try:\n"
        "    task = ReasoningGymTask(data_set='ransom_note', options={}, num_prompts=20,\n"
        "                            num_held_out=5, seed=0)\n"
        "    print(data_fingerprint(task, {}))\n"
        "except TaskError as error:\n"
        "    print(error)\n"
    )

    def output(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        ).stdout.strip()

    assert "set the environment variable PYTHONHASHSEED=0" in output("random")
    assert output("0") == output("0")
