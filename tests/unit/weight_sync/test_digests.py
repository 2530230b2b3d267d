"""The digest of tensors: what changes it, and what does not."""

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_async.errors import WeightSyncError
from speed_async.weight_sync.digests import NUM_WEIGHTS, tensor_digests, verify_digests

ODD_WEIGHTS = np.random.PCG64(0).random_raw(NUM_WEIGHTS) | np.uint64(1)


def digest(tensor: Tensor) -> int:
    return tensor_digests([("w", tensor)])["w"]


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def test_the_digest_is_the_weighted_sum_of_the_words_modulo_2_to_the_64() -> None:
    words = [7, -1, 2**31 - 1, -(2**31)]
    first = [int(weight) for weight in ODD_WEIGHTS[:4]]
    expected = signed(sum(w * x for w, x in zip(first, words, strict=True)))
    assert digest(torch.tensor(words, dtype=torch.int32)) == expected
    # 0x3F80 is 1.0 and 0xC000 is -2.0 in bfloat16; together they are one word, low half first.
    word = 0x3F80 + (0xC000 << 16) - 2**32
    assert digest(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)) == signed(word * first[0])
    # 6 bytes are no whole number of words: 0x80, 0x3F, 0x00, 0xC0, 0x80, 0x3F.
    odd = [0x80, 0x3F, 0x00, 0xC0, 0x80, 0x3F]
    weights = [int(weight) for weight in ODD_WEIGHTS[:6]]
    assert digest(torch.tensor([1.0, -2.0, 1.0], dtype=torch.bfloat16)) == signed(
        sum(w * x for w, x in zip(weights, odd, strict=True))
    )
    assert digest(torch.empty(0, 8)) == 0


def test_several_rows_have_the_digest_of_their_sums() -> None:
    words = torch.randint(-(2**31), 2**31, (2 * NUM_WEIGHTS + 3,), dtype=torch.int32)
    sums = [digest(part) for part in words.split(NUM_WEIGHTS)]
    assert digest(words) == digest(torch.tensor(sums))


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, NUM_WEIGHTS), (33, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_change_of_one_element_by_one_ulp_changes_the_digest(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape).to(dtype)
    before, flat = digest(tensor), tensor.view(-1)
    bits = flat.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for place in {0, len(flat) // 2, len(flat) - 1}:
        bits[place] ^= 1
        assert digest(tensor) != before, place
        bits[place] ^= 1
    assert digest(tensor) == before


@pytest.mark.parametrize("size", [3, 64, 300])  # 300 x 300 words have several rows
def test_order_and_sign_matter(size: int) -> None:
    matrix = torch.randn(size, size)
    others = [matrix.t(), matrix.flip(0), matrix.flip(1), -matrix, matrix.roll(1, 0)]
    # Sign bits are the highest of their words: two of them must not cancel each other.
    signs = torch.ones(size, size)
    signs[0, -1] = signs[1, -1] = -1
    others.append(matrix * signs)
    assert len({digest(each) for each in (matrix, *others)}) == 1 + len(others)


def test_rows_of_words_in_another_order_have_another_digest() -> None:
    first, second = torch.randn(2, NUM_WEIGHTS)
    assert digest(torch.cat([first, second])) != digest(torch.cat([second, first]))


def test_strides_and_storage_do_not_matter() -> None:
    matrix = torch.randn(6, 4).to(torch.bfloat16)
    columns = matrix.t().contiguous().t()  # the same values in another memory layout
    inside = torch.cat([torch.zeros(1, dtype=torch.bfloat16), matrix.view(-1)])[1:]
    assert not columns.is_contiguous() and inside.storage_offset() == 1
    assert digest(columns) == digest(inside) == digest(matrix)


def test_a_mismatch_names_the_version_the_count_and_the_first_tensor() -> None:
    sent = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.zeros(2)}
    digests = tensor_digests(sent.items())
    verify_digests(digests, digests, policy_version=7)
    swapped = tensor_digests([("a", sent["a"]), ("b", sent["c"]), ("c", sent["b"])])
    with pytest.raises(
        WeightSyncError,
        match=r"policy version 7 is refused, its digest failed: 2 of 3 .* first 'b';",
    ):
        verify_digests(digests, swapped, policy_version=7)


def test_a_tensor_without_a_digest_is_refused() -> None:
    with pytest.raises(WeightSyncError, match=r"1 of 1 tensors differ .* first 'empty'"):
        verify_digests({}, {"empty": 0}, policy_version=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_and_a_cpu_have_the_same_digest() -> None:
    for shape in ((3,), (300, 300), (100, NUM_WEIGHTS)):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            tensor = (torch.randn(shape) * 9).to(dtype)
            assert digest(tensor.cuda()) == digest(tensor)
