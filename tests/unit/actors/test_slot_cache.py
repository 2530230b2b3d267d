"""The KV cache keeps every row's states while rows enter, grow and leave, and blocks are joined."""

import numpy as np
import pytest
import torch

from speed_async.actors.torch_engine.cache_size import block_layout
from speed_async.actors.torch_engine.slot_cache import SlotCache

HEADS, DIM = 2, 3


def states(names: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """(rows, H, positions, D): values that tell row, head and position."""
    heads = torch.arange(HEADS)[None, :, None]
    rows, columns = torch.from_numpy(names)[:, None, None], torch.from_numpy(positions)[:, None, :]
    values = rows * 1e4 + heads * 1e3 + columns
    return values[..., None].expand(-1, -1, -1, DIM).float()


def assert_holds(cache: SlotCache, names: np.ndarray, length: np.ndarray) -> None:
    """Every row holds its states below its newest position, which a decode step writes."""
    spans = cache.begin_decode(length - 1)
    newest = states(names, length[:, None] - 1)
    keys, values = cache.update(newest, -newest, 0)
    assert [span.first_row for span in spans] == [0, *(span.end_row for span in spans[:-1])]
    assert spans[-1].end_row == len(names)
    for span in spans:
        rows = range(span.first_row, span.end_row)
        start, num_vectors = HEADS * span.offset, HEADS * len(rows) * span.capacity
        shape = (len(rows), HEADS, span.capacity, DIM)
        block = keys.reshape(-1, DIM)[start : start + num_vectors].view(shape)
        negated = values.reshape(-1, DIM)[start : start + num_vectors].view(shape)
        for in_block, row in enumerate(rows):
            expected = states(names[row : row + 1], np.arange(length[row])[None])[0]
            assert torch.equal(block[in_block, :, : length[row]], expected)
            assert torch.equal(negated[in_block, :, : length[row]], -expected)


@pytest.mark.parametrize(("num_slots", "block"), [(24, 4), (24, 24), (7, 4)])
def test_rows_keep_their_states(num_slots: int, block: int) -> None:
    random = np.random.default_rng(0)
    cache = SlotCache(block_layout(num_slots, block=block, granularity=4))
    names, length, num_named, most_spans = np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0
    for step in range(300):
        if random.random() < 0.3:
            kept = random.random(len(names)) < random.choice([0.2, 0.8])
            sources = cache.keep(kept, length)
            assert sorted(sources) == np.flatnonzero(kept).tolist()
            names, length = names[sources], length[sources]
            count = (
                int(random.integers(1, num_slots - len(names) + 1)) if num_slots > len(names) else 0
            )
            entering = random.integers(2, 12 + step // 10, count)
            cache.reserve(int(entering.max(initial=1)) + 40)
            cache.append(entering)
            rows = np.arange(len(names), len(names) + count)
            names = np.append(names, np.arange(num_named, num_named + count))
            length, num_named = np.append(length, entering), num_named + count
            if count:
                cache.begin_prefill(rows, entering - 1)
                columns = np.broadcast_to(
                    np.arange(entering.max() - 1), (count, entering.max() - 1)
                )
                prefilled = states(names[rows], columns)
                cache.update(prefilled, -prefilled, 0)
        if not len(names):
            continue
        done = length >= 40 + step // 10  # within the reserved length
        if done.any():
            sources = cache.keep(~done, length)
            names, length = names[sources], length[sources]
            if not len(names):
                continue
        cache.fit(length)
        assert_holds(cache, names, length)
        most_spans = max(most_spans, len(cache.begin_decode(length - 1)))
        length = length + 1
    assert num_named > 10 * num_slots
    assert (most_spans > 1) is (block < num_slots)
