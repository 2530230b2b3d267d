"""What a run tells about itself: five kinds of event, flat and plain, torch-free.

- `status`: gauges of this moment, a few times a second; only the live feed carries it.
- `step`: one line for each optimiser update; kept in metrics.jsonl.
- `evaluation`: held-out accuracy of one policy version; kept in metrics.jsonl.
- `sample`: one completion with its prompt and reward, for people; kept in samples.jsonl.
- `end`: how the run ended; kept in metrics.jsonl.
"""

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["status", "step", "evaluation", "sample", "end"]
Value = float | int | str | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`values` keys use slashes for families: `actor/tokens_per_s`, `learner/loss`.

    Keys every consumer may rely on, where the kind has them:
    all: `wall_s` (seconds that the run has gone on for, in all its lives: without those between
      lives, while its service was dead, or while it waited for room on the disk),
      `policy_version`.
    status and step (a value that nobody has measured is None; so is `gate_acceptance` without a
      gate): `updates_total`, `generated_tokens_per_s`, `trained_tokens_per_s`,
      `gate_acceptance` (share of screened prompts continued, running window),
      `buffer_groups`, `buffer_capacity`, `in_flight_groups`, `credits`, `staleness_mean`,
      `staleness_max`, `actors_alive`, `accuracy` (last held-out, or None),
      `accuracy_version` (that it was measured of), `reward_mean` (pass rate of the last prompts
      before the gate selects: of screening samples, or of whole groups where there is no gate),
      `bottleneck` ("actor" | "buffer" | "learner" | "sync" | "starting"), `eta_s`,
      `share_actor`, `share_buffer`, `share_learner`, `share_sync` (of the learner's last updates),
      `ledger_closes`, `phase` ("starting" | "training" | "evaluating" | "stopping" | "draining").
      `credits` is how many training leases may be in flight now, those that are included.
      `loop_lag_s` is how late the service came to its last tick; None where nobody measures it.
    Shown where they are told: `max_staleness` (the bound), `accuracy_before` (first held-out),
      `actors_total` (wanted: the ranks, and actors that joined and have not left),
      `learner_here` (it has loaded the model), `evaluated_prompts` and `evaluation_prompts` (done,
      and in all, of the evaluation under way; else None),
      `warning` (what is the matter now, for people; a line each),
      `diagnoses` (why the run cannot learn, while it
      cannot: one sentence a line, each with what, how much, since when and what to change; empty
      when there is nothing to say), `messages_refused` (malformed, or not to be
      believed) and `peers_muted` (not listened to any more, for having sent one).
    status and step, of weights: `weights/pause_s` and `weights/pause_max_s` (mean and longest over
      the actors that hold the newest version any of them has), `weights/transfer_s` and
      `weights/bytes_per_s` (of the last broadcast that reached anyone), `weights/publishing_s` (age
      of a broadcast under way, else 0), `weights/failed` (broadcasts so far), `weights/newest`
      (actors that hold the last version published), `weights/lag/actor-N` and `weights/lag_max`
      (`policy_version` minus the version the actor has applied; a step is told before its own
      version is published, so that 1 is as good as it gets there). What is not known is None.
    step: also `loss`, `grad_norm`, `ratio_mean`, `ratio_max`, `kl_k1`, `kl_k3`, ... (learner's).
    evaluation: `accuracy`, `num_passed`, `num_completions`, `oldest_version`, `newest_version`.
    sample: `policy_version` (the newest among its tokens), `actor`, `prompt_id`, `held_out`,
      `decision` ("continued" | "screened out" | "kept" | "evaluated"), `reward`, `extracted` (what
      the verifier took for the answer, or None), `truncated` (cut off by a length limit),
      `num_tokens`, `prompt`, `completion` (long texts are shortened in the middle).
    end: `reason`, `outcome` ("completed" | "stopped" | "nothing_learned" | "failed"), `ok` (whether
      the outcome is "completed").
    """

    kind: EventKind
    values: dict[str, Value]
