"""The configuration: one frozen tree. Units are in the names; derived values are properties."""

import ipaddress
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Algorithm = Literal[
    "rloo",
    "grpo",
    "dr-grpo",
    "reinforce++",
    "cispo",
    "gspo",
    "dapo",
    "speed-rloo",
    "speed-dapo",
]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    folder: str = "runs/default"
    """Run folder; a relative path is taken from the current directory."""
    seed: NonNegativeInt = 0
    updates: NonNegativeInt = 100
    """Optimiser updates of the whole run; 0 measures the model's held-out accuracy and ends."""
    overlap: bool = True
    """False: generate and train in turns, each batch by the newest policy (but for a surplus of
    earlier rounds). For comparisons."""
    stop_at_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """End the run at the first held-out accuracy that reaches this."""
    accept_scoring: str | None = None
    """Digest of the code that scores, when a resumed run is to go on with other code than it began
    with. The refusal of that code names its digest."""


class ModelConfig(Section):
    path: str
    """Hugging Face folder (config, safetensors, tokenizer)."""
    context_length: PositiveInt | None = None
    """Prompt plus completion tokens; None takes the model's own limit."""
    chat_template: bool = False
    """Wrap each prompt as one user message in the tokenizer's chat template."""


class TaskConfig(Section):
    name: str
    """`arithmetic`, `jsonl`, or `reasoning_gym:<data set>`; `scripted` for fault drills: prompts
    that pass at random, each at its own rate."""
    path: str | None = None
    """Data file of `jsonl`: one object a line with `prompt` and `answer`."""
    match: Literal["exact", "numeric"] = "exact"
    """How `jsonl` compares the final answers of completion and row. `exact`: as text, whatever the
    spacing (rules: environments/exact_answer.py). `numeric`: as numbers; a row whose answer is not
    one whole number is refused (environments/whole_number.py)."""
    score_truncated: bool = False
    """Whether a completion that a length limit cut off is scored like any other. False: it earns 0,
    in training and in evaluation, whatever number it happens to end in."""
    num_prompts: PositiveInt = 4096
    """Training prompts to make (tasks that make their own)."""
    num_held_out: PositiveInt = 256
    """Prompts kept apart for evaluation, never trained on."""
    max_digits: PositiveInt = 6
    """Hardest level of `arithmetic`."""
    options: dict[str, object] = Field(default_factory=dict)
    """Passed to the reasoning-gym data set."""
    seed: NonNegativeInt = 0
    """Seed of the data, apart from `run.seed` so that runs share their data."""


class GateConfig(Section):
    mode: Literal["screen", "filter", "off"] = "screen"
    """`screen`: n_init completions first, n_cont more when their pass rate is moderate (SPEED).
    `filter`: the whole group at once, kept when its pass rate is moderate (DAPO's dynamic
    sampling). `off`: every prompt gets its whole group, and every group is kept."""
    n_init: PositiveInt = 4
    """Completions that screen a prompt."""
    n_cont: NonNegativeInt = 20
    """Completions added when its pass rate is moderate. A group is n_init + n_cont in any mode."""
    low: Fraction = 0.0
    high: Fraction = 1.0
    """Moderate means low < pass rate < high, both strict."""

    @property
    def group_size(self) -> int:
        return self.n_init + self.n_cont

    @property
    def num_screening(self) -> int:
        """Completions of a group that the gate looks at."""
        return {"screen": self.n_init, "filter": self.group_size, "off": 0}[self.mode]


class CurriculumConfig(Section):
    kind: Literal["uniform", "posterior"] = "uniform"
    """`uniform`: shuffled epochs. `posterior`: Thompson sampling of the prompts most likely to
    pass the gate."""
    half_life_updates: PositiveFloat = 40.0
    """Updates after which an outcome counts half (the policy has moved since)."""
    uniform_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of prompts chosen in shuffled order whatever is known of them, so that none starves."""
    candidates: PositiveInt = 4
    """Candidates drawn for each prompt chosen; more is greedier and repeats prompts sooner."""


class ObjectiveConfig(Section):
    """What is maximised. `algorithm` sets these; a value given here goes before the preset's."""

    advantage: Literal["rloo", "grpo", "dr_grpo", "batch"] = "rloo"
    policy_loss: Literal["policy_gradient", "ppo_clip", "cispo", "gspo"] = "ppo_clip"
    """All but `policy_gradient` have a ratio to the policy that sampled; that one needs a
    `correction` unless all data is of the newest policy."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    """Ratios leave [1 - clip_low, 1 + clip_high] without gradient (cispo: are cut at the top)."""
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "fixed_length"] = (
        "token_mean"
    )
    """How token losses add up: each token, each completion or each prompt counts the same;
    `fixed_length` divides by completions x actors.max_new_tokens, or the context where that is
    less (Dr. GRPO)."""
    correction: Literal[
        "none",
        "token_tis",
        "sequence_tis",
        "token_mask",
        "sequence_mask",
        "decoupled_recomputed",
        "decoupled_log_linear",
        "negative_sequence_mask",
    ] = "none"
    """What is done about tokens sampled by an older policy mu (algorithms/corrections.py)."""
    min_ratio: Annotated[float, Field(ge=0)] = 0.5
    """Masks keep pi_theta / mu in [min_ratio, max_ratio]."""
    max_ratio: PositiveFloat = 2.0
    """Cap of the importance weight (tis, decoupled), upper edge of the masks."""
    max_negative_kl: PositiveFloat = 0.1
    """`negative_sequence_mask` drops a completion of negative advantage past this mean
    log(mu / pi_theta)."""
    overlong_share: Fraction = 0.0
    """Last share of a completion's limit over which the reward falls linearly; 0 is off. The limit
    is actors.max_new_tokens, or what the context leaves after the prompt where that is less."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What the reward has lost at the limit."""
    screening_samples: Literal["all", "unbiased", "none"] = "all"
    """Which screening samples enter the gradient (all serve in baselines). The gate has looked
    at them: `unbiased` drops those whose flipped reward would have flipped the gate."""


class VllmConfig(Section):
    """Of `actors.engine = "vllm"`."""

    tensor_parallel: PositiveInt = 1
    """GPUs that one actor's model is split over."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_bytes: PositiveInt | None = None
    """Of one GPU's, or on a CPU one worker's, KV cache. None: on a GPU what is left of its share,
    on a CPU what `actors.slots` whole sequences take."""
    enforce_eager: bool = False
    """Neither compile nor capture graphs: starts sooner, decodes slower."""
    arguments: dict[str, object] = Field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`."""


class ActorsConfig(Section):
    engine: Literal["torch", "vllm", "scripted"] = "torch"
    """`torch` is embedded here and needs nothing else; `vllm` is what clusters use. `scripted` is
    for tests and fault drills: it asks no model and draws tokens at random."""
    vllm: VllmConfig = VllmConfig()
    slots: PositiveInt = 64
    """Sequences decoded at once by one actor."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 64
    running_at_update: Literal["keep", "recompute"] = "keep"
    """What becomes of running sequences when weights change. `keep`: they go on over the keys and
    values they have. `recompute`: these are computed anew under the new weights. Either way mu is
    recorded as sampled, so importance ratios are exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one actor on a CPU."""
    verifier_workers: PositiveInt = 1
    verifier_timeout_s: PositiveFloat = 10.0
    max_restarts: NonNegativeInt = 3
    """How often one actor may be restarted after it was killed by a signal."""

    @property
    def weight_ranks(self) -> int:
        """Ranks of the weight group that one actor takes: each part of its model receives."""
        return self.vllm.tensor_parallel if self.engine == "vllm" else 1


class BufferConfig(Section):
    capacity_groups: PositiveInt = 256
    """Groups held at once; past it the least useful one is evicted."""
    capacity_bytes: PositiveInt = 1024 * 1024 * 1024
    """Array bytes held at once, likewise."""
    credits: PositiveInt | None = None
    """Groups expected of leases, buffered or in training at once; None derives it (see
    `max_credits`)."""
    durability: Literal["none", "batched", "every"] = "batched"
    """What a dying service or machine may cost. `batched`: a killed process costs nothing, a power
    cut at most the last second. `every`: nothing either way; each acknowledgement waits for the
    disk. `none`: no journal, and no run can be resumed."""
    spill: bool = False
    """Groups past `capacity_bytes` wait in the journal on disk instead of holding the actors up."""
    lease_timeout_s: PositiveFloat = 3600.0
    """A prompt not finished by then is offered to another actor; the late result still counts
    once."""
    max_staleness: NonNegativeInt = 2
    """No token older than this many policy versions is trained on."""
    freshness_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on a group's priority for each version of age."""
    signal_weight: Annotated[float, Field(ge=0)] = 1.0
    """Power of p(1 - p), p the group's own pass rate, in its priority; 0 looks at age only."""
    max_passed_over: PositiveInt = 4
    """A group passed over by this many takes is taken next."""


class LearnerConfig(Section):
    groups_per_update: PositiveInt = 16
    lr: Annotated[float, Field(ge=0)] = 1e-6
    """0 changes no weight: a trial of everything else."""
    warmup_updates: NonNegativeInt = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens in one forward and backward pass."""
    checkpoint_every: NonNegativeInt = 20
    """Updates between checkpoints; 0 saves only at the end (the journal then keeps every batch)."""
    keep_last: PositiveInt = 2
    """Checkpoints kept; a damaged one falls back to the one before."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one learner on a CPU."""


class WeightsConfig(Section):
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel. `gloo`: over the network, from and to host memory. `nccl`: between GPUs,
    one for each rank. `ipc`: within one machine, through memory that all ranks there share (a GPU's
    own when learner and actors share it). `auto` chooses among them by what the ranks have."""
    bucket_bytes: PositiveInt = 64 * 1024 * 1024
    deadline_s: PositiveFloat = 60.0
    """Longest wait at any stage of one transfer."""
    canary_tolerance: PositiveFloat | None = None
    """Nats a token by which an engine's log-probabilities of the canary may differ from the
    learner's, in the mean; past it the version is refused. None takes 1e-3 where the engine
    computes in float32, and 0.3 otherwise (rounding of bfloat16 in two kernels)."""


class EvaluateConfig(Section):
    every: NonNegativeInt = 10
    """Updates between held-out evaluations; 0 keeps only the first and the last."""
    num_samples: PositiveInt = 1
    """Completions for each held-out prompt, at the actors' temperature."""


class ClusterConfig(Section):
    learners: PositiveInt = 1
    """Ranks that learn; every further rank is an actor."""
    actors: PositiveInt = 1
    """Actor ranks of a run, where the number of processes does not decide (torchrun,
    --nproc-per-node)."""
    host: str = "127.0.0.1"
    """Address of the first learner's node, at which the service binds."""
    service_port: NonNegativeInt = 0
    """0 picks a free port; a run of several nodes needs one that all of them are given."""
    advertised_port: NonNegativeInt = 0
    """Where a forwarder stands before the service (a tunnel, a proxy): its port on `host`, to which
    actors and learner are sent; 0: the service's own."""
    feed_port: NonNegativeInt = 0
    """Read-only metrics feed; 0 picks a free port."""
    max_restarts: NonNegativeInt = 0
    """How often `speed-async train` starts all ranks again, from the last checkpoint, after one
    died (torchrun has its own --max-restarts)."""
    security: Literal["auto", "curve", "plain-and-open-to-anyone-who-reaches-it"] = "auto"
    """`auto`: sockets beyond loopback speak CURVE, with the keys of `keys`; on loopback none do."""
    keys: str | None = None
    """Folder made by `speed-async keys`."""
    connect_timeout_s: PositiveFloat = 120.0
    """How long roles wait for each other at the start."""
    peer_timeout_s: PositiveFloat = 60.0
    """A peer silent for this long is taken for dead."""
    stall_timeout_s: PositiveFloat = 600.0
    """Longest wait of the learner for one batch."""
    drain_timeout_s: PositiveFloat = 20.0

    @property
    def is_loopback(self) -> bool:
        """Whether `host` is reached from its own machine alone; a name other than localhost may be
        reached from anywhere."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def speaks_curve(self) -> bool:
        """Whether sockets are encrypted, and open to allowed keys alone."""
        return self.security == "curve" or (self.security == "auto" and not self.is_loopback)


class ObserveConfig(Section):
    status_interval_s: PositiveFloat = 0.5
    breakdown: bool = False
    """Close with a table of where the time went (summary.json always has it)."""
    trace: str | None = None
    """Folder to which actors and learner write every group they sent or trained; for fault
    drills."""
    wandb: bool = False
    """Log to wandb; offline when there is no key."""
    wandb_project: str = "speed_async"


class Config(Section):
    algorithm: Algorithm = "speed-rloo"
    """Names a preset of `gate.mode` and `objective` (config/presets.py)."""
    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig
    gate: GateConfig = GateConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    actors: ActorsConfig = ActorsConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def max_credits(self) -> int:
        """Groups that may be expected from leases, buffered or in training at once: a batch for
        every version in the staleness window, so that none need grow stale."""
        if self.buffer.credits is not None:
            return self.buffer.credits
        return (self.buffer.max_staleness + 1) * self.learner.groups_per_update
