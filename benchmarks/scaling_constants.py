"""Inputs of docs/scaling.md: constants, models, batches and response lengths.

Units: seconds, bytes, tokens, floating-point operations. Rates are per second.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

from speed_async.actors.loop import REPORT_INTERVAL_S
from speed_async.config.checks.combinations import BYTES_PER_TOKEN as BYTES_PER_TOKEN
from speed_async.config.sections.buffer import BufferConfig
from speed_async.config.sections.weights import WeightsConfig
from speed_async.weight_sync import nccl

MIB = 1024 * 1024
GPUS_PER_NODE = 8
NCCL_POLL_S = nccl.POLL_S

# --- published ------------------------------------------------------------------------------------
PEAK_FLOPS = 989e12
HBM_BYTES_PER_S = 3.35e12
HBM_BYTES = 80e9
NIC_BYTES_PER_S = 48e9

# --- measured with this code ----------------------------------------------------------------------
PACKED_OVER_FLAT = 0.65
GENERATED_PER_TRAINED = 1.5
PAUSE_BEYOND_TRANSFER_S = 0.005
RENDEZVOUS_S = (0.0001, 0.000067)
VERDICTS_S = (0.0, 0.000034)
"""Fixed seconds, and seconds per member."""
SERVICE_BYTES_PER_S = 697e6
SERVICE_MESSAGES_PER_S = 13.9e3

# --- taken from the code --------------------------------------------------------------------------
BUCKET_BYTES = WeightsConfig().bucket_bytes
MAX_STALENESS = BufferConfig().max_staleness
REPORTS_PER_S = 1 / REPORT_INTERVAL_S

# --- assumed --------------------------------------------------------------------------------------
NVLINK_BYTES_PER_S = 300e9
CHUNK_BYTES = 512 * 1024
NODE_HOP_S, GPU_HOP_S = 5e-6, 2e-6
MFU = 0.4
TRAINING_BYTES_PER_PARAMETER = 18
USABLE_SHARE = 0.9
HBM_EFFICIENCY = 0.6
DECODE_FLOPS_EFFICIENCY = 0.5
STEP_OVERHEAD_S = 0.005
PROMPT_TOKENS = 500
CAP_OVER_MEAN = 4
LARGE_BUCKET_BYTES = 1024 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    name: str
    parameters: float
    active: float
    """Parameters used per token."""
    kv_bytes: int
    """Keys and values of one token, bf16."""
    engine_gpus: int
    """Number of GPUs that hold one copy, tensor-parallel."""
    expert_parameters: float = 0.0
    chosen_share: float = 1.0
    """Share of the experts that one token selects."""

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def learner_gpus(self) -> int:
        """Minimum GPUs for weights, gradients and optimizer state: one to eight, or whole nodes."""
        needed = TRAINING_BYTES_PER_PARAMETER * self.parameters / (USABLE_SHARE * HBM_BYTES)
        whole = math.ceil(needed)
        return whole if whole < GPUS_PER_NODE else GPUS_PER_NODE * math.ceil(whole / GPUS_PER_NODE)

    def bytes_read(self, num_running: float) -> float:
        """Bytes of weights that a decode step of `num_running` sequences reads."""
        unread = self.expert_parameters * (1 - self.chosen_share) ** num_running
        return 2 * (self.parameters - unread)


MODELS = (
    Model(name="7B", parameters=7.6e9, active=7.6e9, kv_bytes=28 * 4 * 128 * 4, engine_gpus=1),
    Model(name="32B", parameters=32.8e9, active=32.8e9, kv_bytes=64 * 8 * 128 * 4, engine_gpus=4),
    Model(
        name="235B-A22B",
        parameters=235e9,
        active=22e9,
        kv_bytes=94 * 4 * 128 * 4,
        engine_gpus=8,
        expert_parameters=94 * 128 * 3 * 4096 * 1536,
        chosen_share=8 / 128,
    ),
)
"""Shapes of Qwen2.5-7B, Qwen3-32B and Qwen3-235B-A22B."""


@dataclass(frozen=True)
class Lengths:
    """Response lengths, exponential and truncated midpoints CAP_OVER_MEAN times their mean."""

    mean: float

    @property
    def cap(self) -> float:
        return CAP_OVER_MEAN * self.mean

    @cached_property
    def scale(self) -> float:
        """Scale of the untruncated exponential: mean = scale (1 - exp(-cap / scale))."""
        scale = self.mean
        for _ in range(100):
            scale = self.mean / -math.expm1(-self.cap / scale)
        return scale

    @cache  # noqa: B019 (only a few distinct lengths)
    def longest_of(self, n: int) -> float:
        """Expected maximum of n: the integral of 1 - F(x)^n up to the cap (midpoint rule)."""
        num_parts = 4000
        width = self.cap / num_parts
        midpoints = ((part + 0.5) * width for part in range(num_parts))
        return width * sum(1 - (-math.expm1(-x / self.scale)) ** n for x in midpoints)

    @property
    def running_context(self) -> float:
        """Mean context of a running sequence: prompt + E[L^2] / (2 E[L])."""
        ratio = self.cap / self.scale
        second = 2 * self.scale**2 * (1 - math.exp(-ratio) * (1 + ratio))
        return PROMPT_TOKENS + second / (2 * self.mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    groups: int
    n_init: int
    n_cont: int

    @property
    def completions(self) -> int:
        return self.groups * (self.n_init + self.n_cont)
