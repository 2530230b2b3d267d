"""Metric events of a run: six kinds, with flat scalar values. Does not import torch.

- `status`: current gauges, a few times per second; only in the live feed.
- `step`: one event per update (batch); stored in metrics.jsonl.
- `evaluation`: held-out accuracy of one policy version; stored in metrics.jsonl.
- `suite`: result of another suite for one policy version; stored in metrics.jsonl.
- `sample`: one human-readable completion with prompt and reward; stored in samples.jsonl.
- `end`: outcome of the run; stored in metrics.jsonl.
"""

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["status", "step", "evaluation", "suite", "sample", "end"]
Value = float | int | str | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Keys of `values` use slashes for families: `actor/tokens_per_s`, `learner/loss`.

    Keys that consumers can rely on, by event kind. A value that was not measured is None.

    All kinds: `wall_s` (duration of the run in seconds over all attempts, excluding the time
    between attempts, while the service was down, or while it waited for disk space),
    `policy_version`. status and step: `updates_total`, `generated_tokens_per_s`,
    `trained_tokens_per_s`, `gate_acceptance` (share of screened prompts continued, running window;
    None without a gate), `buffer_groups`, `buffer_capacity`, `in_flight_groups`, `credits`
    (training leases allowed in flight now, including the current ones), `staleness_mean`,
    `staleness_max`, `actors_alive`, `accuracy` (last held-out, or None), `accuracy_version`
    (version of that accuracy), `reward_mean` (pass rate of the last prompts before the gate: of
    screening samples, or of whole groups without a gate), `bottleneck` ("actor" | "buffer" |
    "learner" | "sync" | "checkpoint" | "starting"), `eta_s`, `share_actor`, `share_buffer`,
    `share_learner`, `share_sync`, `share_checkpoint` (of the last learner updates),
    `ledger_closes`, `phase` ("starting" | "training" | "evaluating" | "stopping" | "draining"),
    `loop_lag_s` (delay of the last tick of the service).
    Optional: `max_staleness` (the bound), `accuracy_before` (first held-out), `actors_total`
    (expected: the ranks, and actors that joined and have not left), `learner_here` (whether the
    learner has loaded the model), `evaluated_prompts` and `evaluation_prompts` (done and total of
    the current evaluation, else None), `warning` (current warnings, one human-readable line each),
    `diagnoses` (reasons why the run cannot learn at present, one sentence per line with cause,
    amount, start and remedy; empty if there are none), `messages_refused` (malformed or implausible
    messages) and `peers_muted` (peers ignored after such a message). status and step, weights:
    `weights/pause_s` and `weights/pause_max_s` (mean and maximum over the actors with the newest
    applied version), `weights/transfer_s` and `weights/bytes_per_s` (of the last broadcast that
    reached an actor), `weights/publishing_s` (age of the current broadcast, else 0),
    `weights/failed` (failed broadcasts so far), `weights/newest` (actors with the last published
    version), `weights/lag/actor-N` and `weights/lag_max` (`policy_version` minus the version
    applied by the actor; a step is reported before its own version is published, so its minimum is
    1). status and step, rewards: `reward/NAME` (mean of each part of the reward over the last
    training completions of each actor, if there are several rewards or custom ones),
    `verifier/timeouts`, `verifier/errors` (completions without a verdict so far),
    `verifier/{timeout,error,scored}_tokens_mean` (their mean length),
    `verifier/{timeout,error}_length_correlation` (with the length, against scored completions),
    `truncated/{screened_out,kept,evaluated}` (share of truncated completions in the last leases
    with this end) and the same names with `_passed` (truncated completions that passed so far).
    step: also `optimizer_updates` and `skipped_updates` (steps of the optimiser so far, made and
    skipped: several per update with `learner.passes` or `learner.minibatches`), and the means over
    the optimiser updates of the batch of `loss`, `grad_norm`, `ratio_mean`, `kl_k1`, `kl_k3`, ...
    (learner's; `ratio_max` and `token_weight_max` are maxima), and the learner's seconds
    `time/wait_s`, `time/train_s`, `time/sync_s` and `time/checkpoint_s` (the last two: those since
    the update before).
    evaluation: `accuracy`, `num_passed`, `num_completions` (scored ones), `num_unscored`,
    `oldest_version`, `newest_version`. evaluation and suite: `suite` (`held_out` for evaluation),
    `mean` (mean@k), `num_samples` (k), `num_passed`, `num_completions`, `num_unscored`,
    `num_truncated`, `requested_version` (whose evaluation it is), `oldest_version` and
    `newest_version` (of the tokens), `policy_version` (the newest of the tokens). sample:
    `policy_version` (the newest of its tokens), `actor`, `prompt_id`, `held_out`, `decision`
    ("continued" | "screened out" | "kept" | "evaluated"), `reward`, `passed`, `extracted` (the
    answer found by the verifier, or None), `truncated` (by a length limit), `num_tokens`, `prompt`,
    `completion` (long texts are shortened in the middle). end: `reason`, `outcome` ("completed" |
    "stopped" | "nothing_learned" | "failed"), `ok` (whether the outcome is "completed").
    """

    kind: EventKind
    values: dict[str, Value]
