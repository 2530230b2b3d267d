"""Random inputs of the parity vectors, and the files that store them with a library's results.

Inputs come from Python's own generator and are rounded, so that any version of any library gets
the same inputs. A vector file (tests/fakes/parity/<library>.json) names the library, its version
and the script that created it. `batches` are the inputs, `cases` the results.

Shape legend: G groups, S sequences, T tokens of one sequence (ragged: lists of lists).
"""

import importlib.metadata
import json
import random
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fakes" / "parity"
MAX_TOKENS = 9
MAX_AGE = 3
GRPO_STD_FLOOR = 1e-4
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
Batch = dict[str, Any]
Case = dict[str, Any]


def make_batch(seed: int, *, group_sizes: list[int], num_empty: int = 0) -> Batch:
    """Sequences of 1 to 9 tokens in groups of the given sizes. The first `num_empty` have no
    tokens.

    log mu is uniform in [-3, -0.05]. log (pi / mu) is normal with deviation 0.45 plus a shift per
    sequence, so that clips and masks of tokens and of sequences each affect some and not all.
    log (ref / pi) is normal with deviation 0.5. `advantages` (S,) have both signs; `ages` are
    versions.
    """
    draw = random.Random(seed)
    lengths = [0 if i < num_empty else draw.randint(1, MAX_TOKENS) for i in range(sum(group_sizes))]
    behaviour = [[round(draw.uniform(-3, -0.05), 6) for _ in range(n)] for n in lengths]
    shifts = [draw.gauss(0, 0.2) for _ in lengths]
    batch: Batch = {
        "group_sizes": group_sizes,
        "lengths": lengths,
        "rewards": [draw.choice([0.0, 0.25, 1.0]) for _ in lengths],
        "advantages": [round(draw.gauss(0, 1), 6) for _ in lengths],
        "behaviour_logprobs": behaviour,
        "logprobs": [
            [round(min(mu + draw.gauss(shift, 0.45), -0.01), 6) for mu in row]
            for row, shift in zip(behaviour, shifts, strict=True)
        ],
        "ages": [[draw.randint(0, MAX_AGE) for _ in range(n)] for n in lengths],
    }
    return batch | {
        "reference_logprobs": [
            [round(min(pi + draw.gauss(0, 0.5), -0.01), 6) for pi in row]
            for row in batch["logprobs"]
        ],
        "entropies": [[round(draw.uniform(0.1, 2.5), 6) for _ in range(n)] for n in lengths],
    }


def on_policy(batch: Batch, *, shift: float = 0.0) -> Batch:
    """The batch with mu = pi, where ours and other libraries weight the KL loss alike. Both are
    `shift` lower, and the reference is not."""
    logprobs = [[round(pi - shift, 6) for pi in row] for row in batch["logprobs"]]
    return batch | {"logprobs": logprobs, "behaviour_logprobs": logprobs}


def truncated(batch: Batch) -> Batch:
    """The batch with every third completion truncated at the length limit."""
    return batch | {"truncated": [i % 3 == 0 for i in range(len(batch["lengths"]))]}


def short(value: Any) -> Any:
    """Nested lists of floats, rounded to 12 significant digits."""
    if isinstance(value, list):
        return [short(one) for one in value]
    return float(f"{value:.12g}")


def grouped(flat: list[float], group_sizes: list[int]) -> list[list[float]]:
    """(S,) -> (G, ragged)."""
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in group_sizes]


def without_padding(rows: list[list[float]], lengths: list[int]) -> list[list[float]]:
    """(S, max T) -> (S, ragged)."""
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def save(library: str, *, batches: dict[str, Batch], cases: list[Case]) -> None:
    """Write tests/fakes/parity/<library>.json with the library's version and the running script."""
    vectors = {
        "library": library,
        "version": importlib.metadata.version(library),
        "script": f"scripts/{Path(sys.argv[0]).name}",
        "torch": importlib.metadata.version("torch"),
        "batches": batches,
        "cases": cases,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{library}.json"
    lines = json.dumps({**vectors, "batches": None, "cases": None}, indent=1)
    body = json.dumps(batches)
    case_lines = ",\n  ".join(json.dumps(case) for case in cases)
    lines = lines.replace('"batches": null', f'"batches": {body}')
    path.write_text(lines.replace('"cases": null', f'"cases": [\n  {case_lines}\n ]') + "\n")
    print(f"{path.name}: {len(cases)} cases of {library} {vectors['version']}")
