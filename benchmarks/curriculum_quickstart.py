"""Compare uniform and posterior sampling of prompts on the quickstart, at equal updates.

Acceptance is the share of screened prompts that passed the gate. Screening tokens per accepted
group include those of refused prompts and the group's own screening samples. Coverage is the share
of all prompts screened at least once. There are two sizes of the prompt set: at the quickstart's
own size a run rarely sees a prompt twice, so there is little to predict from. Medians over seeds.

Usage: python -m benchmarks.curriculum_quickstart [num_seeds]
"""

import sys

from benchmarks.harness import QUICKSTART, medians, report, train
from speed_async.config.load import load_config

SIZES = (4096, 512)
KINDS = ("uniform", "posterior")


def run_once(kind: str, num_prompts: int, seed: int) -> dict[str, float]:
    overrides = ["--run.seed", str(seed), "--curriculum.kind", kind]
    overrides += ["--task.num_prompts", str(num_prompts)]
    gate = load_config(QUICKSTART, overrides).gate
    summary = train([QUICKSTART, *overrides]).summary
    groups, tokens = summary["ledger"]["groups"], summary["ledger"]["tokens"]
    kept = [end for end in ("trained", "stale", "evicted", "buffered") if groups[end]]
    own = gate.n_init / gate.group_size * sum(tokens[end] for end in kept)
    num_accepted = sum(groups[end] for end in kept)
    return {
        "acceptance": summary["gate_acceptance"],
        "screening_tokens_per_group": (tokens["screened_out"] + own) / num_accepted,
        "tokens_per_group": tokens["generated"] / num_accepted,
        "coverage": summary["distinct_prompts_screened"] / num_prompts,
        "distinct_prompts_trained": summary["distinct_prompts_accepted"],
        "accuracy_after": summary["accuracy_after"],
        "wall_s": summary["wall_s"],
    }


def main() -> None:
    num_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows: list[dict[str, object]] = []
    for num_prompts in SIZES:
        runs = {
            kind: [run_once(kind, num_prompts, seed) for seed in range(num_seeds)] for kind in KINDS
        }
        for kind, kind_runs in runs.items():
            rows.append({"prompts": num_prompts, "curriculum": kind, **medians(kind_runs)})
    report("curriculum_quickstart", f"The quickstart, medians of {num_seeds} seeds", rows)


if __name__ == "__main__":
    main()
