"""`[learner]`: batches, optimiser and checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from speed_async.config.sections.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

ActivationCheckpointing = Literal["auto", "none", "selective", "full"]


class LearnerConfig(Section):
    groups_per_update: PositiveInt = 16
    """Groups of a batch. Times the group size, it is the completions of an update."""
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
    lora_rank: NonNegativeInt = 0
    """Rank of trained low-rank adapters (LoRA) of all linear layers; the weights stay as they are.
    0 trains all weights. Actors and checkpoints get the weights with the adapters."""
    lora_alpha: PositiveFloat = 32.0
    """The product of the factors of an adapter is multiplied by lora_alpha / lora_rank."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens per forward and backward pass."""
    activation_checkpointing: ActivationCheckpointing = "auto"
    """What the backward pass computes again instead of keeping it: nothing, each layer without its
    matrix products and attention, or each layer. Less memory and more time in this order. `auto`:
    `full` for models of 300 million parameters and more on a GPU, otherwise `none`."""
    checkpoint_every: NonNegativeInt = 20
    """Updates between checkpoints; 0 saves only at the end (the journal then keeps all batches)."""
    keep_last: PositiveInt = 2
    """Number of kept checkpoints. A damaged one is replaced by the previous one on resume."""
    background_checkpoints: bool = True
    """Write a checkpoint while training continues, from a copy in host memory: 12 bytes per
    parameter; 14 for a model in half precision. Several learners divide 12 bytes, and the first one
    has the model in its own precision besides. If false, training waits for the disk."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt = 1
    """Torch threads of one learner on a CPU."""
    compile: bool = False
    """Compile the decoder layers with torch.compile. The first updates take longer, and a CPU needs
    a C++ compiler. Requires one `cluster.learners`."""
    cpu_offload: bool = False
    """Keep the sharded parameters, gradients and optimiser of GPU learners in host memory between
    uses. Requires several `cluster.learners`."""

    @property
    def optimizer_updates_per_batch(self) -> int:
        return self.passes * self.minibatches
