"""The quickstart's task and initial checkpoint."""

import random

import pytest

from speed_async.environments.arithmetic import ArithmeticTask, draw_sum, level_cycle
from speed_async.environments.task import data_fingerprint
from speed_async.errors import TaskError
from speed_async.types import Prompt
from tests.fakes.paths import MODEL


def make_task(
    *, num_prompts: int = 1200, num_held_out: int = 120, max_digits: int = 4, seed: int = 0
) -> ArithmeticTask:
    return ArithmeticTask(
        num_prompts=num_prompts, num_held_out=num_held_out, max_digits=max_digits, seed=seed
    )


def count_carries(text: str) -> int:
    left, right = text.rstrip("=").split("+")
    carry, num_carries = 0, 0
    for a, b in zip(left, right, strict=True):
        carry = int(a) + int(b) + carry >= 10
        num_carries += carry
    return num_carries


def test_prompt_ids_and_held_out_flags() -> None:
    task = make_task()
    assert [p.prompt_id for p in task.train_prompts] == list(range(1200))
    assert [p.prompt_id for p in task.held_out_prompts] == list(range(120))
    assert not any(p.held_out for p in task.train_prompts)
    assert all(p.held_out for p in task.held_out_prompts)


def test_train_and_held_out_prompts_are_distinct() -> None:
    # 4,000 of 10,000 two-digit sums: sampling without a duplicate check would repeat some.
    task = make_task(num_prompts=3600, num_held_out=400, max_digits=2)
    texts = [p.text for p in (*task.train_prompts, *task.held_out_prompts)]
    assert len(set(texts)) == 4000


def test_prompts_depend_on_the_seed() -> None:
    assert data_fingerprint(make_task(seed=3), {}) == data_fingerprint(make_task(seed=3), {})
    assert data_fingerprint(make_task(seed=3), {}) != data_fingerprint(make_task(seed=4), {})


def test_held_out_prompts_are_independent_of_num_prompts() -> None:
    few, many = make_task(num_prompts=12), make_task(num_prompts=1200)
    assert few.held_out_prompts == many.held_out_prompts


def test_answers_are_sums_with_least_significant_digit_first() -> None:
    task = make_task()
    for prompt in task.train_prompts:
        left, right = prompt.text.rstrip("=").split("+")
        assert len(left) == len(right) == 4
        assert len(prompt.answer) == 5
        assert int(left[::-1]) + int(right[::-1]) == int(prompt.answer[::-1])


def test_levels_equal_carries_and_have_exact_shares() -> None:
    task = make_task()
    for prompt in task.train_prompts:
        assert prompt.level == f"carries={count_carries(prompt.text)}"
    levels = [p.level for p in task.train_prompts]
    # 1,200 prompts: a third without a carry, a sixth at each of 1, 2, 3 and 4 carries.
    assert {level: levels.count(level) for level in set(levels)} == {
        "carries=0": 400,
        "carries=1": 200,
        "carries=2": 200,
        "carries=3": 200,
        "carries=4": 200,
    }


def test_level_cycle_of_two_digits_has_two_of_each_level() -> None:
    levels = level_cycle(random.Random(0), 2)
    assert sorted(next(levels) for _ in range(6)) == [0, 0, 1, 1, 2, 2]


def test_draw_sum_has_the_requested_number_of_carries() -> None:
    rng = random.Random(0)
    for num_carries in (0, 1, 2, 3):
        for _ in range(50):
            text, answer = draw_sum(rng, num_digits=3, num_carries=num_carries)
            assert count_carries(text) == num_carries
            assert len(answer) == 4


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("5210", 1.0),  # 57 + 68 = 125, least digit first
        (" 5210\n", 1.0),
        ("0125", 0.0),  # most significant digit first
        ("521", 0.0),
        ("52100", 0.0),
        ("52 10", 0.0),
        ("5110", 0.0),  # without the carry into the tens
        ("", 0.0),
    ],
)
def test_only_the_exact_answer_is_rewarded(completion: str, reward: float) -> None:
    prompt = Prompt(prompt_id=0, text="750+860=", answer="5210")
    assert make_task(num_prompts=1, num_held_out=1).score(prompt, completion) == reward


def test_too_many_prompts_raise_with_a_remedy() -> None:
    with pytest.raises(TaskError, match="max_digits = 1 has 50 distinct prompts"):
        make_task(num_prompts=50, num_held_out=1, max_digits=1)
    assert len(make_task(num_prompts=49, num_held_out=1, max_digits=1).train_prompts) == 49


def test_quickstart_model_solves_sums_without_carries() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    task = make_task()
    easy = [p for p in task.held_out_prompts if p.level == "carries=0"]
    inputs = tokenizer([p.text for p in easy], return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert (output == model.config.eos_token_id).any(dim=1).all()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    num_right = sum(task.score(p, text) for p, text in zip(easy, texts, strict=True))
    assert num_right >= 0.9 * len(easy)


def test_quickstart_tokenizer_round_trips_printable_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = "1250+8740=  Is it 9990?\n{[ok]} ~"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text) + 1  # one per character, plus BOS
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id not in token_ids
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_quickstart_model_folder_is_small() -> None:
    num_bytes = sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    assert 0 < num_bytes < 4 * 1024 * 1024
