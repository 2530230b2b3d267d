import numpy as np
import pytest

from speed_async.learner.parallel.shares import FILLER, Part, even_parts
from speed_async.learner.rows import LayoutCost, make_row

COST = LayoutCost(per_token=1.0, per_pair=0.0)


def part(*prompt_lengths: int) -> Part:
    return [make_row(np.zeros(length, np.int32), FILLER.samples) for length in prompt_lengths]


def lengths(parts: list[Part]) -> list[list[int]]:
    return [[len(row.prompt_token_ids) for row in each] for each in parts]


@pytest.mark.parametrize(
    ("parts", "num_ranks", "expected"),
    [
        ([part(*[3] * 16)], 4, [[3] * 4] * 4),
        ([part(2), part(9), part(5)], 2, [[9], [5], [2]]),  # single rows are not split
        ([part(4, 4, 4), part(9), part(2)], 2, [[9], [4, 4], [4], [2]]),
        ([part(1), part(2)], 2, [[2], [1]]),
        ([], 3, []),
    ],
)
def test_costliest_parts_are_split_until_ranks_have_equally_many(
    parts: list[Part], num_ranks: int, expected: list[list[int]]
) -> None:
    assert lengths(even_parts(parts, num_ranks, COST)) == expected
