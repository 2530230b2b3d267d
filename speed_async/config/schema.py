"""The configuration: one frozen tree. Units are in the names; derived values are properties."""

import ipaddress
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from speed_async.config.extensions import part_name, registered_path
from speed_async.config.presets import RATIO_LIMITS
from speed_async.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from speed_async.config.sources import PROMPT_FORMAT, TaskSource
from speed_async.config.suites import SuiteConfig

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
ADVANTAGES = ("rloo", "shrunken", "grpo", "dr_grpo", "batch")
ACROSS_GROUPS = ("shrunken", "batch")
"""Advantages that compare groups: a group with equal rewards, or of one completion, teaches too."""
REWARDS = ("correct", "boxed", "answer_tag", "overlong")
POLICY_LOSSES = ("policy_gradient", "ppo_clip", "cispo", "gspo")
MIN_CAPACITY_GROUPS = 256
Reward = Annotated[float, Field(ge=-1e6, le=1e6)]  # MAX_REWARD of types.py, which needs numpy


class RunConfig(Section):
    folder: str = "runs/default"
    """Run folder. A relative path is relative to the current directory."""
    seed: NonNegativeInt = 0
    updates: NonNegativeInt = 100
    """Updates of the whole run: batches, each of which makes one policy version. 0 only measures
    the held-out accuracy of the model."""
    overlap: bool = True
    """False: alternate generation and training, so each batch is sampled by the newest policy
    (except surplus groups of earlier rounds). For comparisons."""
    stop_at_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop the run when the held-out accuracy reaches this value."""
    accept_scoring: str | None = None
    """Digest of the scoring code, to resume a run with different scoring code. The error about the
    changed code contains its digest."""


class ModelConfig(Section):
    path: str
    """Hugging Face folder (config, safetensors, tokenizer), or the id of a model of the hub, such
    as `Qwen/Qwen2.5-Math-1.5B`. A folder of that name has precedence."""
    context_length: PositiveInt | None = None
    """Prompt plus completion tokens; None uses the limit of the model."""
    chat_template: bool = False
    """Wrap each prompt as one user message in the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message before the prompt (with `chat_template`); None: no message, so a template may
    add its own."""
    template_arguments: dict[str, object] = Field(default_factory=dict)
    """Variables for the chat template, such as `enable_thinking = false`."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Texts of further tokens that end a completion, such as `["<|im_end|>"]`, besides the EOS
    tokens of the model folder. Each must be one token of the model."""


class RewardConfig(Section):
    """One of several rewards (`[[task.rewards]]`)."""

    name: Annotated[str, part_name("reward", *REWARDS)]
    """As `task.reward`."""
    weight: float = 1.0
    """Its factor in the sum. May be negative, for a penalty."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name.rpartition(":")[2]


class TaskConfig(Section):
    name: Annotated[str, AfterValidator(partial(registered_path, "task"))]
    """`arithmetic`, `dataset`, `jsonl`, `reasoning_gym:<data set>`, `verifiers:<environment>`, or
    `<module>:<callable>`.
    `scripted` is for fault injection tests: each prompt passes at random with its own rate."""
    path: str | None = None
    """Data file of `jsonl`: one object per line with `prompt` and `answer`. Source of `dataset`:
    prepared folder, file, or hub data set (docs/data.md)."""
    split: str | None = None
    """Split of `path` (`dataset`); None: `train`."""
    subset: str | None = None
    """Subset of the hub data set `path` (`dataset`)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of `path` (`dataset`), as in `task.sources`."""
    format: str = PROMPT_FORMAT
    """Text that the model gets (`dataset`), as in `task.sources`."""
    sources: list[TaskSource] = Field(default_factory=list)
    """Sources of `dataset`, mixed by weight, instead of `path`: `[[task.sources]]`."""
    match: Literal["exact", "numeric", "math"] = "exact"
    """How `jsonl` and `dataset` compare the final answer of a completion with that of the row.
    `exact`: as text, ignoring spacing (rules: environments/exact_answer.py). `numeric`: as numbers;
    a row whose answer is not one whole number is rejected (environments/whole_number.py). `math`:
    as values of mathematical expressions, exactly, then by math-verify (docs/verifier.md)."""
    reward: Annotated[str, part_name("reward", *REWARDS)] = "correct"
    """`correct`: the task's own score. `boxed`, `answer_tag`: format only
    (environments/format_rewards.py). `<module>:<function>`: a function of prompt, completion,
    answer and metadata (docs/extending.md)."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """Several rewards, `[[task.rewards]]` with `name` and `weight`; the reward is their weighted
    sum. What passes is decided by `correct` if it is one of them, else by the first one."""
    score_truncated: bool = False
    """Whether a completion truncated by a length limit is scored like any other. False: it does not
    pass, in training and evaluation, and its reward is `truncated_reward`, whatever its text."""
    truncated_reward: Reward = 0.0
    """Reward of a truncated completion that is not scored (`score_truncated`)."""
    num_prompts: PositiveInt = 4096
    """Number of training prompts to generate (tasks that generate prompts), or to use at most
    (`verifiers:<environment>`)."""
    max_prompt_tokens: PositiveInt | None = None
    """Training prompts with more tokens (chat template included) are not trained on; None: only
    those that do not fit into the context are left out."""
    long_prompts: Literal["leave_out", "error"] = "leave_out"
    """What a training prompt over `max_prompt_tokens` or the context means: it is left out and
    counted, or the checks before a run fail. They read a sample of many prompts; a prompt that they
    missed is left out."""
    num_held_out: PositiveInt = 256
    """Prompts held out for evaluation and never trained on."""
    max_digits: PositiveInt = 6
    """Hardest level of `arithmetic`."""
    options: dict[str, object] = Field(default_factory=dict)
    """Passed to the reasoning-gym data set, or to `load_environment` of the verifiers
    environment."""
    python: str | None = None
    """Interpreter that has `verifiers` and the environment (`verifiers:<environment>`); None: that
    of the run."""
    seed: NonNegativeInt = 0
    """Seed of the data, separate from `run.seed` so that runs can share their data."""

    @property
    def weighted_rewards(self) -> tuple[RewardConfig, ...]:
        """`rewards`, or `reward` alone."""
        return tuple(self.rewards) or (RewardConfig(name=self.reward),)

    @property
    def all_sources(self) -> list[TaskSource]:
        """Sources of `dataset`: those of `sources`, or the one of `path`."""
        if self.path is None:
            return self.sources
        source = TaskSource(
            path=self.path,
            split=self.split,
            subset=self.subset,
            columns=self.columns,
            format=self.format,
        )
        return [source]


class GateConfig(Section):
    mode: Literal["screen", "filter", "off"] = "screen"
    """`screen`: n_init completions first, and n_cont more if their pass rate is moderate (SPEED).
    `filter`: the whole group at once, kept if its pass rate is moderate (dynamic sampling of DAPO).
    `off`: every prompt gets a whole group, and every group is kept."""
    n_init: PositiveInt = 4
    """Screening completions per prompt."""
    n_cont: NonNegativeInt = 20
    """Continuation completions if the pass rate is moderate. The group size is n_init + n_cont in
    all modes."""
    low: Fraction = 0.0
    high: Fraction = 1.0
    """Moderate means low < pass rate < high, both strict."""

    @property
    def group_size(self) -> int:
        return self.n_init + self.n_cont

    @property
    def num_screening(self) -> int:
        """Completions of a group that the gate evaluates."""
        return {"screen": self.n_init, "filter": self.group_size, "off": 0}[self.mode]

    def admits(self, num_passed: int, num_screening: int) -> bool:
        """The decision of the gate on a prompt with these screening completions."""
        return self.low < num_passed / num_screening < self.high

    def is_pivotal(self, num_passed: int, num_screening: int, *, passed: bool) -> bool:
        """Whether the decision would be another one if one of these screening samples, which passed
        or failed, had the other outcome."""
        flipped = num_passed - 1 if passed else num_passed + 1
        return self.admits(flipped, num_screening) != self.admits(num_passed, num_screening)


class CurriculumConfig(Section):
    kind: Literal["uniform", "posterior"] = "uniform"
    """`uniform`: shuffled epochs. `posterior`: Thompson sampling of the prompts most likely to
    pass the gate."""
    half_life_updates: PositiveFloat = 40.0
    """Updates after which the weight of an outcome is halved, because the policy changes."""
    uniform_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of prompts chosen in shuffled order regardless of their statistics, to avoid
    starvation."""
    candidates: PositiveInt = 4
    """Candidates per selected prompt. Larger values are greedier and repeat prompts sooner."""


class ObjectiveConfig(Section):
    """The objective. `algorithm` sets these fields; a value set here overrides the preset."""

    advantage: Annotated[str, part_name("advantage", *ADVANTAGES)] = "rloo"
    """`rloo`, `shrunken`, `grpo`, `dr_grpo` or `batch` (algorithms/advantages.py), or
    `<module>:<function>`."""
    prior_weight: PositiveFloat = 2.0
    """Weight of the mean reward of the other groups of the update in the baseline of `shrunken`, in
    completions of the own group."""
    policy_loss: Annotated[str, part_name("policy_loss", *POLICY_LOSSES)] = "ppo_clip"
    """`policy_gradient`, `ppo_clip`, `cispo` or `gspo` (algorithms/losses.py), or
    `<module>:<function>`. All except `policy_gradient` use the importance ratio to the behaviour
    policy. `policy_gradient` needs a `correction` unless all data is on-policy."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    """Ratios outside of [1 - clip_low, 1 + clip_high] have no gradient (cispo: the ratio is capped
    at the upper limit)."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """`ppo_clip` and `gspo`: ratios above this value have no gradient at negative advantages (c of
    dual-clip PPO). A very large value disables it."""
    aggregation: Literal["token_mean", "sequence_mean", "prompt_mean", "fixed_length"] = (
        "token_mean"
    )
    """Aggregation of token losses: equal weight per token, per completion or per prompt.
    `fixed_length` divides by completions x actors.max_new_tokens, or by the context if that is less
    (Dr. GRPO)."""
    correction: Literal[
        "none",
        "token_tis",
        "sequence_tis",
        "sequence_snis",
        "geometric_tis",
        "token_mask",
        "sequence_mask",
        "geometric_mask",
        "probability_mask",
        "negative_sequence_mask",
    ] = "none"
    """Off-policy correction for tokens sampled by an older policy mu (algorithms/corrections.py):
    the ratio pi_theta / mu of the token, of its sequence, or the geometric mean over the sequence,
    truncated (`tis`, `snis`) or masked outside of limits."""
    min_ratio: Annotated[float, Field(ge=0)] | None = None
    """`token_mask`, `sequence_mask` and `geometric_mask` keep ratios in [min_ratio, max_ratio].
    None: the default of the correction (config/presets.py)."""
    max_ratio: PositiveFloat | None = None
    """Largest ratio of every correction that uses ratios; None: the default of the correction."""
    max_probability_change: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`probability_mask` drops a token whose probability has changed by more than this value in the
    direction of its gradient."""
    max_negative_kl: PositiveFloat = 0.1
    """`negative_sequence_mask` drops a completion with negative advantage if its mean
    log(mu / pi_theta) exceeds this value."""
    overlong_share: Fraction = 0.0
    """Last share of the length limit in which the reward decreases linearly; 0 disables it. The
    limit is actors.max_new_tokens, or the context minus the prompt if that is less."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Reduction of the reward at the limit."""
    mask_truncated: bool = False
    """Take completions that a length limit truncated out of the gradient (overlong filtering of
    DAPO). Their rewards remain in the baselines."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the KL divergence from the start model (`model.path`); 0 disables it. It keeps a
    second copy of the model."""
    kl: Literal["k1", "k2", "k3"] = "k2"
    """Estimator of the KL divergence (algorithms/regularization.py). `k1`: subtracted from the
    reward, summed over the completion. `k2`, `k3`: added to the loss of each token."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the entropy that is subtracted from the loss of each token."""
    screening_samples: Literal["all", "unbiased", "none"] = "all"
    """Screening samples that enter the gradient (all are used in baselines). The gate depends on
    these samples: `unbiased` drops those whose flipped reward would flip the gate decision."""

    @model_validator(mode="before")
    @classmethod
    def _with_ratio_limits(cls, values: object) -> object:
        """Fills `min_ratio` and `max_ratio` that are not set."""
        if not isinstance(values, dict):
            return values
        limits = RATIO_LIMITS.get(str(values.get("correction")), {})
        return values | {name: limits[name] for name in limits if values.get(name) is None}


class VllmConfig(Section):
    """Options of `actors.engine = "vllm"`."""

    tensor_parallel: PositiveInt = 1
    """GPUs per actor for tensor parallelism."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU memory that vLLM uses."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of the KV cache per GPU, or per worker on a CPU. None: on a GPU the remainder of its
    share, on a CPU the size of `actors.slots` full sequences."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower decoding."""
    arguments: dict[str, object] = Field(default_factory=dict)
    """Additional arguments of `AsyncEngineArgs` of vLLM."""


class ActorsConfig(Section):
    engine: Literal["torch", "vllm", "scripted"] = "torch"
    """`torch` is built in and has no other dependencies; `vllm` is for clusters. `scripted` is for
    tests and fault injection: it samples random tokens without a model."""
    vllm: VllmConfig = VllmConfig()
    slots: PositiveInt = 64
    """Sequences that one actor decodes concurrently."""
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 64
    running_at_update: Literal["keep", "recompute"] = "keep"
    """Handling of running sequences when weights change. `keep`: they continue with their KV cache.
    `recompute`: the KV cache is recomputed with the new weights. In both cases mu is recorded as
    sampled, so importance ratios are exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one actor on a CPU."""
    verifier_workers: PositiveInt = 1
    verifier_timeout_s: PositiveFloat = 10.0
    max_restarts: NonNegativeInt = 3
    """Maximum restarts of one actor after it was killed by a signal."""

    @property
    def weight_ranks(self) -> int:
        """Weight group ranks per actor: one for each shard of its model."""
        return self.vllm.tensor_parallel if self.engine == "vllm" else 1


class BufferConfig(Section):
    capacity_groups: PositiveInt | None = None
    """Maximum number of buffered groups. Beyond it the group of lowest priority is evicted. None:
    the number of credits, at least 256."""
    capacity_bytes: PositiveInt = 1024 * 1024 * 1024
    """Maximum array bytes of buffered groups, with the same eviction."""
    credits: PositiveInt | None = None
    """Maximum number of groups that are leased, buffered or in training; None derives it (see
    `max_credits`). With a higher number, groups become stale."""
    durability: Literal["none", "batched", "every"] = "batched"
    """Durability of the journal. `batched`: a killed process loses nothing, a power failure at most
    the last second. `every`: neither loses data; each acknowledgement waits for the disk. `none`:
    no journal, and the run cannot be resumed."""
    spill: bool = False
    """Keep groups beyond `capacity_bytes` in the journal on disk instead of blocking the actors."""
    lease_timeout_s: PositiveFloat = 3600.0
    """Time after which an unfinished prompt is leased to another actor; a late result still counts
    once."""
    max_staleness: NonNegativeInt = 2
    """Maximum age in policy versions of a token used for training."""
    late_groups: Literal["wait", "drop"] = "wait"
    """Groups that are still being generated and that the next update would make stale. `wait`: the
    update waits for them, at most half of `cluster.stall_timeout_s`. `drop`: it does not, so fewer
    long completions are trained than are generated."""
    order: Literal["auto", "signal", "arrival"] = "auto"
    """Order of buffered groups whose oldest tokens are of the same version; older tokens always
    come first. `signal`: by p(1 - p) of the pass rate p of the group, the largest first. `arrival`:
    first in, first out. `auto`: `arrival` if `gate.mode` is `off`, so that groups without signal
    wait no longer than others, else `signal`."""


class LearnerConfig(Section):
    groups_per_update: PositiveInt = 16
    passes: PositiveInt = 1
    """Passes over each batch (PPO epochs). The batch makes passes x minibatches optimiser updates
    and one policy version."""
    minibatches: PositiveInt = 1
    """Mini-batches of a pass, of whole groups in random order. It divides `groups_per_update`."""
    lr: Annotated[float, Field(ge=0)] = 1e-6
    """0 leaves the weights unchanged, to test everything else."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or decreasing until `run.updates`, in updates (batches). A
    resume with another `run.updates` continues on the schedule of that length."""
    min_lr_share: Fraction = 0.0
    """Share of `lr` that `linear` and `cosine` decrease to."""
    warmup_updates: NonNegativeInt = 10
    """Updates (batches, whatever their number of optimiser updates) of the linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the optimiser's moments per optimiser update."""
    adam_eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens per forward and backward pass."""
    checkpoint_every: NonNegativeInt = 20
    """Updates between checkpoints; 0 saves only at the end (the journal then keeps all batches)."""
    keep_last: PositiveInt = 2
    """Number of kept checkpoints. A damaged one is replaced by the previous one on resume."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one learner on a CPU."""

    @property
    def optimizer_updates_per_batch(self) -> int:
        return self.passes * self.minibatches


class WeightsConfig(Section):
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """Transfer backend. `gloo`: over the network, between host memories. `nccl`: between GPUs, one
    per rank. `ipc`: within one machine, through shared memory (GPU memory if learner and actors
    share the GPU). `auto` selects a backend by the devices of the ranks."""
    bucket_bytes: PositiveInt = 64 * 1024 * 1024
    deadline_s: PositiveFloat = 60.0
    """Maximum wait in each stage of a transfer."""
    canary_tolerance: PositiveFloat | None = None
    """Maximum mean difference, in nats per token, between the canary log-probabilities of an engine
    and of the learner; beyond it the version is rejected. None uses 1e-3 if the engine computes in
    float32, else 0.3 (bfloat16 rounding in two kernels)."""


class EvaluateConfig(Section):
    """`every` and `num_samples` are those of the task's own held-out prompts, which are the suite
    `held_out`."""

    every: NonNegativeInt = 20
    """Updates between held-out evaluations; 0 runs only the first and the last."""
    num_samples: PositiveInt = 1
    """Completions per held-out prompt, at the temperature of the actors."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.04
    """Tokens of evaluations relative to those generated for training so far. Beyond it, evaluations
    wait, so it bounds how much they delay training. The first evaluation of each suite and the last
    ones are not counted, nor any without `run.overlap`, where updates wait for evaluations."""
    suites: list[SuiteConfig] = Field(default_factory=list)
    """Suites evaluated in training besides the held-out prompts."""


class ClusterConfig(Section):
    learners: PositiveInt = 1
    """Learner ranks; all other ranks are actors."""
    actors: PositiveInt = 1
    """Actor ranks of a run, unless the number of processes determines it (torchrun,
    --nproc-per-node)."""
    host: str = "127.0.0.1"
    """Address of the node of the first learner, to which the service binds."""
    service_port: NonNegativeInt = 0
    """0 picks a free port; a run on several nodes needs a fixed port, the same on all nodes."""
    advertised_port: NonNegativeInt = 0
    """Port on `host` of a forwarder in front of the service (a tunnel or proxy), used by actors and
    learner; 0: the port of the service."""
    feed_port: NonNegativeInt = 0
    """Port of the read-only metrics feed; 0 picks a free port."""
    max_restarts: NonNegativeInt = 0
    """Maximum restarts of all ranks by `speed-async train`, from the last checkpoint, after a rank
    failed (torchrun has its own --max-restarts)."""
    security: Literal["auto", "curve", "insecure"] = "auto"
    """`auto`: sockets use CURVE with the keys in `keys`, except on loopback. `curve`: always.
    `insecure`: never; sockets are unencrypted and open to every client that reaches them."""
    keys: str | None = None
    """Folder made by `speed-async keys`."""
    connect_timeout_s: PositiveFloat = 120.0
    """Maximum wait of the roles for each other at the start."""
    peer_timeout_s: PositiveFloat = 60.0
    """Time without messages after which a peer is considered dead."""
    stall_timeout_s: PositiveFloat = 600.0
    """Time without any new token of any actor after which the run fails, or ends without the result
    of its last evaluation. Also the limit of one engine start, and of the time in which none of
    `max_credits` prompts in a row enters the buffer."""
    drain_timeout_s: PositiveFloat = 20.0

    @property
    def is_loopback(self) -> bool:
        """Whether `host` is reachable only from its own machine; names other than localhost are
        assumed to be reachable from other machines."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def uses_curve(self) -> bool:
        """Whether sockets are encrypted and accept only allowed keys."""
        return self.security == "curve" or (self.security == "auto" and not self.is_loopback)


class ObserveConfig(Section):
    status_interval_s: PositiveFloat = 0.5
    breakdown: bool = False
    """Print a table of where the time went at the end (summary.json always has it)."""
    trace: str | None = None
    """Folder for traces of every group that was sent or trained; for fault injection tests."""
    wandb: bool = False
    """Log to wandb; offline without an API key."""
    wandb_project: str = "speed_async"


class Config(Section):
    algorithm: Algorithm = "speed-rloo"
    """Preset of `gate.mode` and `objective` (config/presets.py)."""
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

    def sampling(self, suite: str) -> tuple[float, float]:
        """Temperature and top-p for this suite; that of training if it is empty."""
        for each in self.evaluate.suites:
            if each.name == suite:
                return each.temperature, each.top_p
        return self.actors.temperature, 1.0

    @property
    def capacity_groups(self) -> int:
        """Maximum number of buffered groups."""
        return self.buffer.capacity_groups or max(MIN_CAPACITY_GROUPS, self.max_credits)

    @property
    def takes_by_signal(self) -> bool:
        """Whether groups of the same version are trained in the order of p(1 - p)."""
        if self.buffer.order == "auto":
            return self.gate.mode != "off"
        return self.buffer.order == "signal"

    @property
    def max_credits(self) -> int:
        """Maximum number of groups that are leased, buffered or in training: one batch per version
        in the staleness window, so that no group has to become stale."""
        if self.buffer.credits is not None:
            return self.buffer.credits
        return (self.buffer.max_staleness + 1) * self.learner.groups_per_update
