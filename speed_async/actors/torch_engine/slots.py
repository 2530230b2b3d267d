"""Slots: the host-side state of every row.

Rows in use are at the front, so that a decode step uses one slice of every column. A row's newest
token is not yet in the KV cache: it is the input of the next decode step.

Shape legend: S slots, N rows in use, C positions.
"""

import numpy as np
from numpy.typing import NDArray

from speed_async.types import FinishReason, Float32Array, Int32Array, Sampled

Int64Array = NDArray[np.int64]

_INITIAL_POSITIONS = 32
"""Initial number of token positions per row."""


class SlotTable:
    """Host-side state per row: tokens, log-probabilities, versions, limits, sampling values."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_rows = 0
        """Rows that a decode step computes; some of them may be free."""
        self.num_active = 0
        self.tokens_running = 0
        self.active = np.zeros(num_slots, bool)  # (S,)
        self.keys = np.zeros(num_slots, np.int64)  # (S,)
        self.length = np.ones(num_slots, np.int64)  # (S,) prompt plus sampled tokens
        self.num_prompt = np.ones(num_slots, np.int64)  # (S,)
        self.limit = np.zeros(num_slots, np.int64)  # (S,)
        self.temperature = np.ones(num_slots, np.float32)  # (S,)
        self.top_p = np.ones(num_slots, np.float32)  # (S,)
        self.feed = np.zeros((2, num_slots), np.int64)  # (2, S) newest token, its position
        self.tokens: Int32Array = np.zeros((num_slots, _INITIAL_POSITIONS), np.int32)  # (S, C)
        self.logprobs: Float32Array = np.zeros(
            (num_slots, _INITIAL_POSITIONS), np.float32
        )  # (S, C)
        self.versions: Int32Array = np.zeros((num_slots, _INITIAL_POSITIONS), np.int32)  # (S, C)
        self._rows = np.arange(num_slots)  # (S,)

    def reserve(self, length: int) -> None:
        missing = length - self.tokens.shape[1]
        if missing > 0:
            for name in ("tokens", "logprobs", "versions"):
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, missing))))

    def occupy(
        self,
        row: int,
        key: int,
        prompt_token_ids: Int32Array,
        limit: int,
        temperature: float,
        top_p: float,
    ) -> None:
        num_prompt = len(prompt_token_ids)
        self.tokens[row, :num_prompt] = prompt_token_ids
        self.keys[row] = key
        self.length[row] = self.num_prompt[row] = num_prompt
        self.limit[row] = limit
        self.temperature[row], self.top_p[row] = temperature, top_p
        self.feed[:, row] = prompt_token_ids[-1], num_prompt - 1
        self.active[row] = True
        self.num_active += 1
        self.num_rows = max(self.num_rows, row + 1)

    def append(self, tokens_N: Int64Array, logprobs_N: Float32Array, policy_version: int) -> None:
        """Append one sampled token to every row in use (writes to free rows are not used)."""
        count = self.num_rows
        rows_N, length_N = self._rows[:count], self.length[:count]
        self.tokens[rows_N, length_N] = tokens_N
        self.logprobs[rows_N, length_N] = logprobs_N
        self.versions[rows_N, length_N] = policy_version
        self.feed[0, :count] = tokens_N
        self.feed[1, :count] += self.active[:count]
        self.length[:count] += self.active[:count]
        self.tokens_running += self.num_active

    def release(self, row: int, finish_reason: FinishReason) -> Sampled:
        """Free a row and return its completion."""
        span = slice(int(self.num_prompt[row]), int(self.length[row]))
        sampled = Sampled(
            token_ids=self.tokens[row, span].copy(),
            logprobs=self.logprobs[row, span].copy(),
            policy_versions=self.versions[row, span].copy(),
            finish_reason=finish_reason,
        )
        self._clear(row)
        self.num_active -= 1
        self.tokens_running -= sampled.num_tokens
        return sampled

    @property
    def is_sparse(self) -> bool:
        """Whether closing gaps is worth the copies.

        Moving a row costs about as much as computing a free row for a few steps.
        """
        return 8 * (self.num_rows - self.num_active) > self.num_rows

    def rearrange(self, sources: Int64Array) -> None:
        """Make row i what row `sources[i]` is, which includes all active rows."""
        end = self.num_rows
        self.num_rows = self.num_active
        for column in (
            *(self.tokens, self.logprobs, self.versions, self.keys, self.length),
            *(self.num_prompt, self.limit, self.temperature, self.top_p),
        ):
            column[: self.num_active] = column[sources]
        self.feed[:, : self.num_active] = self.feed[:, sources]
        self.active[: self.num_active] = True
        self._clear(np.arange(self.num_active, end))

    def _clear(self, rows: int | Int64Array) -> None:
        self.active[rows] = False
        # A free row is still computed until it is reused or cut off: give it minimal valid values.
        self.length[rows] = self.num_prompt[rows] = 1
        self.temperature[rows] = self.top_p[rows] = 1.0
        self.feed[1, rows] = 0
