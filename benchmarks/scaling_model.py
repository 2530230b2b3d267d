"""An analytical model of a run on clusters of H100 GPUs.

Three bounds limit the update rate; the slowest one decides:

- the learner: training on a batch, then sending weights (it does not train meanwhile);
- the engines: the tokens of a batch at full rate, plus the pause of every update;
- the response: a screened group takes the longest of its screening samples and then the longest
  of its continuations, in sequence. Its tokens may be at most `staleness` versions old, and credits
  admit no more groups than fit into that window.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks import scaling_constants as c
from benchmarks.scaling_constants import Batch, Lengths, Model

NUM_HALVINGS = 30
"""Bisection steps per solved equation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One copy of a model that generates responses of these lengths."""

    model: Model
    lengths: Lengths
    copies: int = 1
    """Copies of the weights in its memory."""

    @property
    def max_running(self) -> float:
        """Sequences whose KV cache fits. Negative when the weights do not fit."""
        held = self.copies * self.model.weight_bytes
        free = self.model.engine_gpus * c.USABLE_SHARE * c.HBM_BYTES - held
        return free / (self.model.kv_bytes * self.lengths.running_context)

    def step_s(self, num_running: float) -> float:
        """Time of one decode step: memory reads or arithmetic, plus the overhead."""
        model, gpus = self.model, self.model.engine_gpus
        keys = num_running * model.kv_bytes * self.lengths.running_context
        read_s = (model.bytes_read(num_running) + keys) / (
            gpus * c.HBM_BYTES_PER_S * c.HBM_EFFICIENCY
        )
        flops = 2 * model.active * num_running
        compute_s = flops / (gpus * c.PEAK_FLOPS * c.DECODE_FLOPS_EFFICIENCY)
        return max(read_s, compute_s) + c.STEP_OVERHEAD_S

    def rate(self, num_running: float) -> float:
        """Tokens per second."""
        return num_running / self.step_s(num_running)

    def running_at(self, rate: float) -> float:
        """Running sequences at a token rate of `rate`, at most `max_running`."""
        low, high = 0.0, self.max_running
        if self.rate(high) <= rate:
            return high
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < rate else (low, middle)
        return high

    @property
    def recompute_s(self) -> float:
        """Time to recompute the KV cache of all running sequences with every slot in use."""
        tokens = self.max_running * self.lengths.running_context
        flops = 2 * self.model.active * tokens
        return flops / (self.model.engine_gpus * c.PEAK_FLOPS * c.DECODE_FLOPS_EFFICIENCY)


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A method of sending weights."""

    name: str
    bucket_bytes: int
    by_shard: bool = False
    """Every learner rank broadcasts its shard in a group of its own, all at once."""
    point_to_point: bool = False
    """Learner ranks write what each node needs to one GPU of it, once, over all network cards of
    the node; NVLink distributes it. No group, no buckets, no ring."""
    while_sampling: bool = False
    """Received concurrently with sampling into a second copy, which reduces KV cache memory. Only
    the local copy into place pauses the engine."""
    free: bool = False
    """Takes no time. Comparing with it shows the cost of sending."""


PRESENT = Scheme(name="present", bucket_bytes=c.BUCKET_BYTES)
LARGE_BUCKETS = Scheme(name="1 GiB buckets", bucket_bytes=c.LARGE_BUCKET_BYTES)
SHARDS = Scheme(name="by shard", bucket_bytes=c.LARGE_BUCKET_BYTES, by_shard=True)
DIRECT = Scheme(name="point to point", bucket_bytes=c.LARGE_BUCKET_BYTES, point_to_point=True)
FREE = replace(PRESENT, name="for nothing", free=True)
WHILE_SAMPLING = replace(SHARDS, name="by shard, while sampling", while_sampling=True)


def ring_fill_s(num_ranks: int) -> float:
    """Time until the first chunk of a broadcast has passed all ranks, node by node."""
    nodes = math.ceil(num_ranks / c.GPUS_PER_NODE)
    node_hops = nodes - 1
    gpu_hops = num_ranks - 1 - node_hops
    return node_hops * (c.CHUNK_BYTES / c.NIC_BYTES_PER_S + c.NODE_HOP_S) + gpu_hops * (
        c.CHUNK_BYTES / c.NVLINK_BYTES_PER_S + c.GPU_HOP_S
    )


def linear_s(line: tuple[float, float], members: int) -> float:
    return line[0] + line[1] * members


def transfer_s(scheme: Scheme, model: Model, learner_gpus: int, actor_gpus: int) -> float:
    """Time to transfer all weights to every actor GPU, including verdicts on the manifest."""
    if scheme.free:
        return 0.0
    num_bytes = model.weight_bytes
    one_node = learner_gpus + actor_gpus <= c.GPUS_PER_NODE
    into_node = c.NVLINK_BYTES_PER_S if one_node else c.GPUS_PER_NODE * c.NIC_BYTES_PER_S
    link = c.NVLINK_BYTES_PER_S if one_node else c.NIC_BYTES_PER_S
    verdicts_s = linear_s(c.VERDICTS_S, actor_gpus)
    if scheme.point_to_point:
        nodes = math.ceil(actor_gpus / c.GPUS_PER_NODE)
        return verdicts_s + max(nodes * num_bytes / (learner_gpus * link), num_bytes / into_node)
    senders = learner_gpus if scheme.by_shard else 1
    bandwidth = min(senders * link, into_node, c.NVLINK_BYTES_PER_S) * c.PACKED_OVER_FLAT
    num_buckets = math.ceil(num_bytes / senders / scheme.bucket_bytes)
    each_s = ring_fill_s(actor_gpus + 1) + c.NCCL_POLL_S / 2
    return verdicts_s + num_bytes / bandwidth + num_buckets * each_s


# --- the complete run -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The workload and the cluster."""

    model: Model
    gpus: int
    batch: Batch
    lengths: Lengths
    scheme: Scheme = PRESENT
    staleness: int = c.MAX_STALENESS


LEARNER, ENGINES, RESPONSE = "learner", "engines", "response"


@dataclass(frozen=True)
class Split:
    """A plan with a given number of learner GPUs, and its resulting performance."""

    plan: Plan
    learner_gpus: int

    @cached_property
    def engine(self) -> Engine:
        copies = 2 if self.plan.scheme.while_sampling else 1
        return Engine(model=self.plan.model, lengths=self.plan.lengths, copies=copies)

    @property
    def num_engines(self) -> int:
        return (self.plan.gpus - self.learner_gpus) // self.plan.model.engine_gpus

    @cached_property
    def full_rate(self) -> float:
        """Tokens per second of all engines with every slot in use."""
        return self.num_engines * self.engine.rate(self.engine.max_running)

    @property
    def trained_tokens(self) -> float:
        """Tokens trained per update."""
        return self.plan.batch.completions * self.plan.lengths.mean

    @property
    def generated_tokens(self) -> float:
        """Tokens generated per update, including refused prompts and evaluation."""
        return c.GENERATED_PER_TRAINED * self.trained_tokens

    @property
    def train_s(self) -> float:
        flops = 6 * self.plan.model.active * self.trained_tokens
        return flops / (self.learner_gpus * c.PEAK_FLOPS * c.MFU)

    @cached_property
    def transfer_s(self) -> float:
        model = self.plan.model
        actor_gpus = self.num_engines * model.engine_gpus
        return transfer_s(self.plan.scheme, model, self.learner_gpus, actor_gpus)

    @cached_property
    def pause_s(self) -> float:
        """Pause of an engine per update."""
        model = self.plan.model
        memory = model.engine_gpus * c.HBM_BYTES_PER_S * c.HBM_EFFICIENCY
        copy_s = 2 * model.weight_bytes / memory
        stopped_s = copy_s if self.plan.scheme.while_sampling else self.transfer_s
        return stopped_s + c.PAUSE_BEYOND_TRANSFER_S

    @property
    def learner_s(self) -> float:
        """The learner's bound on the update time."""
        return self.train_s + self.transfer_s

    @property
    def engines_s(self) -> float:
        """The engines' bound on the update time."""
        return self.generated_tokens / self.full_rate + self.pause_s

    def running_at(self, update_s: float) -> float:
        """Running sequences per engine at this update time."""
        needed = self.generated_tokens / (update_s - self.pause_s) / self.num_engines
        return self.engine.running_at(needed)

    def group_at(self, update_s: float) -> float:
        """Seconds per group: its longest screening sample, then its longest continuation."""
        batch, lengths = self.plan.batch, self.plan.lengths
        tokens = lengths.longest_of(batch.n_init) + lengths.longest_of(batch.n_cont)
        sampling_share = 1 - self.pause_s / update_s
        return tokens * self.engine.step_s(self.running_at(update_s)) / sampling_share

    def fits(self, update_s: float) -> bool:
        """Whether groups finish within the window. Half a batch waits in the buffer on average, so
        half a version more is in flight."""
        return self.group_at(update_s) + self.learner_s <= (self.plan.staleness + 0.5) * update_s

    @cached_property
    def update_s(self) -> float:
        """Seconds between updates. Longer times always fit better; bisection finds the minimum."""
        low = max(self.learner_s, self.engines_s)
        if self.fits(low):
            return low
        high = 2 * low
        while not self.fits(high):
            low, high = high, 2 * high
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(middle) else (middle, high)
        return high

    @property
    def limit(self) -> str:
        if self.update_s > max(self.learner_s, self.engines_s):
            return RESPONSE
        return LEARNER if self.learner_s > self.engines_s else ENGINES

    @property
    def paused_share(self) -> float:
        return self.pause_s / self.update_s

    @property
    def engine_share(self) -> float:
        """Token rate relative to full engines that never pause."""
        return self.generated_tokens / self.update_s / self.full_rate

    @property
    def learner_wait_share(self) -> float:
        """Share of time without training or sending."""
        return max(0.0, 1 - self.learner_s / self.update_s)

    @property
    def group_versions(self) -> float:
        """Updates during the generation of one group."""
        return self.group_at(self.update_s) / self.update_s


def best(plan: Plan) -> Split | None:
    """The split with the shortest update time (the fewest learner GPUs within 1 %). None when the
    model does not fit."""
    fewest, engine_gpus = plan.model.learner_gpus, plan.model.engine_gpus
    step = c.GPUS_PER_NODE if plan.gpus > c.GPUS_PER_NODE else 1
    found = [
        Split(plan, gpus)
        for gpus in range(step, plan.gpus - engine_gpus + 1, step)
        if gpus >= fewest and Split(plan, gpus).engine.max_running > 0
    ]
    if not found:
        return None
    shortest_s = min(split.update_s for split in found)
    return next(split for split in found if split.update_s <= 1.01 * shortest_s)
