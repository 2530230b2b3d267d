"""Parity of the formulas with other libraries, on the vectors in tests/fakes/parity.

Each file was written by a script that runs the library (scripts/make_parity_vectors_*.py), and
names the version of the library. The tests do not require the libraries.

Shape legend: G groups, S sequences, N tokens of all sequences, one sequence after another.
"""

import json
import re
from collections import defaultdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_async.algorithms import advantages, aggregation, corrections, losses, rewards
from speed_async.algorithms.diagnostics import Diagnostics
from speed_async.algorithms.loss_tokens import LossTokens
from speed_async.algorithms.objective import (
    SELF_NORMALIZED,
    GroupSignal,
    compute_signals,
    make_objective,
)
from speed_async.algorithms.regularization import Regularization, k1
from speed_async.config.sections.objective import ADVANTAGES, POLICY_LOSSES, ObjectiveConfig
from tests.fakes.learner_samples import make_completion, make_config, make_group
from tests.fakes.paths import FAKES, REPOSITORY

ROOT = REPOSITORY
FILES = sorted((FAKES / "parity").glob("*.json"))
VERSIONS = {"trl": "1.16.0", "verl": "0.9.1"}
WITHOUT_REFERENCE = {
    "aggregation": {"prompt_mean"},
    "advantage": {"shrunken"},
    "correction": {"geometric_tis"},
}
NOT_COMPARED = {"screening_samples"}
"""Fields of the objective that no library has."""
COMPARED_OTHERWISE = {"prior_weight", "overlong_share", "overlong_penalty"}
"""Options of a formula without a reference, and those of the overlong penalty, which has a test of
its own."""
ANCHORED_AT_MU = {"none", "negative_sequence_mask"}
NO_LIMIT = {
    "min_ratio": 0.0,
    "max_ratio": 1e9,
    "max_negative_kl": 1e9,
    "max_probability_change": 1.0,
    "clip_low": 1e9,
    "clip_high": 1e9,
    "dual_clip": 1e9,
}
TOLERANCE = 1e-6
Case = dict[str, Any]
Batch = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def cases_with(result: str) -> list[Any]:
    """Every (batch, case) with this result, with an id of library, version and formula."""
    return [
        pytest.param(
            vectors["batches"][case["batch"]],
            case,
            id=f"{vectors['library']} {vectors['version']}: {case['formula']} {case['batch']}",
        )
        for vectors in map(read, FILES)
        for case in vectors["cases"]
        if result in case
    ]


def assert_close(ours: Any, theirs: Any) -> None:
    """Compares with a relative tolerance of 1e-6 per element: a gradient of 1e-3 must match to
    1e-9."""
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE**2)


def bound(module: Any, choice: list[Any]) -> Any:
    name, options = choice
    return partial(getattr(module, name), **options)


def flat(rows: list[list[float]]) -> Tensor:
    """(S, ragged) -> (N,) float64."""
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.float64)


def grouped(values: list[Any], batch: Batch) -> list[np.ndarray]:
    """(S,) -> (G, ragged)."""
    return np.split(np.asarray(values), np.cumsum(batch["group_sizes"])[:-1])


def signals_of(batch: Batch, ours: dict[str, Any]) -> list[GroupSignal]:
    """The signals of the batch as groups, from the rewards."""
    chosen = ObjectiveConfig(
        advantage=ours["advantage"][0],
        aggregation=ours.get("aggregation", ["token_mean"])[0],
        mask_truncated=ours.get("mask_truncated", False),
        **ours.get("regularization", {}),
    )
    limit = ours.get("aggregation", ["", {}])[1].get("max_new_tokens", 64)
    config = make_config(Path("unused"), objective=chosen, max_new_tokens=limit)
    lengths, truncated = batch["lengths"], batch.get("truncated", [False] * len(batch["lengths"]))
    completions = [
        make_completion([2] * n, reward, finish_reason="length" if is_truncated else "stop")
        for n, reward, is_truncated in zip(lengths, batch["rewards"], truncated, strict=True)
    ]
    kl_S = [
        float(k1(flat([pi_T]), flat([reference_T])).sum())
        for pi_T, reference_T in zip(batch["logprobs"], batch["reference_logprobs"], strict=True)
    ]
    objective = make_objective(config)
    return compute_signals(
        objective,
        [make_group([1], *group) for group in split(completions, batch)],
        grouped(kl_S, batch) if objective.regularization.kl_in_reward else None,
    )


def split(values: list[Any], batch: Batch) -> list[list[Any]]:
    """(S,) -> (G, ragged)."""
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in batch["group_sizes"]]


def loss_tokens(batch: Batch, advantages_S: Tensor) -> LossTokens:
    lengths_S = torch.tensor(batch["lengths"])
    num_sequences = len(lengths_S)
    return LossTokens(
        logprobs_N=flat(batch["logprobs"]).requires_grad_(),
        behaviour_logprobs_N=flat(batch["behaviour_logprobs"]),
        advantages_N=advantages_S.repeat_interleave(lengths_S),
        ages_N=flat(batch["ages"]).long(),
        sequence_ids_N=torch.arange(num_sequences).repeat_interleave(lengths_S),
        num_sequences=num_sequences,
        reference_logprobs_N=flat(batch["reference_logprobs"]),
    )


def loss_and_gradients(batch: Batch, ours: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    """Loss of the batch as one update, and its gradients with respect to log pi (N,) and to the
    entropies (N,)."""
    advantages_S = np.asarray(batch["advantages"])
    weights_S = np.concatenate(
        bound(aggregation, ours["aggregation"])(grouped(batch["lengths"], batch))
    )
    if "advantage" in ours:
        signals = signals_of(batch, ours)
        advantages_S = np.concatenate([signal.advantages_N for signal in signals])
        weights_S = np.concatenate([signal.weights_N * signal.trained_N for signal in signals])
    tokens = loss_tokens(batch, torch.from_numpy(advantages_S))
    name, limits = ours["correction"]
    is_normalized = name == SELF_NORMALIZED
    corrected = bound(corrections, ["sequence_tis" if is_normalized else name, limits])(tokens)
    token_losses = bound(losses, ours["policy_loss"])(tokens, corrected)
    weights_N = torch.from_numpy(np.repeat(weights_S, batch["lengths"]))
    regularization = Regularization(**ours.get("regularization", {}))
    entropies_N = flat(batch["entropies"]).requires_grad_()
    losses_N = token_losses.losses_N + regularization.losses(tokens, entropies_N)
    loss = (weights_N * losses_N).sum()
    if is_normalized:
        diagnostics = Diagnostics()
        diagnostics.add(tokens, corrected, token_losses, loss=loss, entropies_N=entropies_N)
        loss = loss / diagnostics.metrics()["weight_mean"]
    gradient_N, entropy_gradient_N = torch.autograd.grad(
        loss, [tokens.logprobs_N, entropies_N], materialize_grads=True
    )
    return loss.item(), gradient_N, entropy_gradient_N


def active_limits() -> list[Any]:
    """Every limit of every loss vector that the library applies. Clips are included only where the
    anchor differs from pi, because a clip has no effect at a ratio of 1."""
    return [
        pytest.param(*one.values, stage, limit, id=f"{one.id}: {limit}")
        for one in cases_with("gradient")
        for stage in ("correction", "policy_loss")
        for limit, value in one.values[1]["ours"][stage][1].items()
        if limit in NO_LIMIT and value != NO_LIMIT[limit]
        if stage == "correction" or one.values[1]["ours"]["correction"][0] in ANCHORED_AT_MU
    ]


@pytest.mark.parametrize(("batch", "case"), cases_with("advantages"))
def test_advantages_match_the_library(batch: Batch, case: Case) -> None:
    ours = bound(advantages, case["ours"]["advantage"])(grouped(batch["rewards"], batch))
    if case["ours"].keys() != {"advantage"}:
        ours = [signal.advantages_N for signal in signals_of(batch, case["ours"])]
    assert [len(group) for group in ours] == [len(group) for group in case["advantages"]]
    for ours_N, theirs_N in zip(ours, case["advantages"], strict=True):
        assert_close(ours_N, theirs_N)


@pytest.mark.parametrize(("batch", "case"), cases_with("gradient"))
def test_loss_and_gradient_match_the_library(batch: Batch, case: Case) -> None:
    loss, gradient_N, entropy_gradient_N = loss_and_gradients(batch, case["ours"])
    assert_close(gradient_N, flat(case["gradient"]))
    no_gradient = [[0.0] * n for n in batch["lengths"]]
    assert_close(entropy_gradient_N, flat(case.get("entropy_gradient", no_gradient)))
    assert_close(loss, case["loss"])


@pytest.mark.parametrize(("batch", "case", "stage", "limit"), active_limits())
def test_every_limit_affects_the_gradient(batch: Batch, case: Case, stage: str, limit: str) -> None:
    """Otherwise a missing clip or mask would not be detected."""
    name, options = case["ours"][stage]
    ours = case["ours"] | {stage: [name, options | {limit: NO_LIMIT[limit]}]}
    _, gradient_N, _ = loss_and_gradients(batch, ours)
    assert not np.allclose(gradient_N, flat(case["gradient"]), rtol=1e-3)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{vectors['library']} {vectors['version']}: {case['formula']}")
        for vectors in map(read, FILES)
        for case in vectors["cases"]
        if "punishments" in case
    ],
)
def test_the_overlong_penalty_matches_the_library(case: Case) -> None:
    ours_N = rewards.soft_overlong_punishment(np.array(case["lengths"]), **case["ours"]["overlong"])
    assert_close(ours_N, case["punishments"])


def test_weighted_policy_gradient_matches_only_the_gradient_of_trl() -> None:
    (vectors,) = (read(path) for path in FILES if path.stem == "trl")
    case = next(one for one in vectors["cases"] if one["formula"] == "ppo_clip token_tis")
    ours = case["ours"] | {"policy_loss": ["policy_gradient", {}]}
    loss, gradient_N, _ = loss_and_gradients(vectors["batches"][case["batch"]], ours)
    assert_close(gradient_N, flat(case["gradient"]))
    assert loss != pytest.approx(case["loss"], rel=1e-3)


def compared_values() -> dict[str, set[Any]]:
    """The values of each field of the objective that some vector has."""
    values: dict[str, set[Any]] = defaultdict(set)
    for ours in (case["ours"] for vectors in map(read, FILES) for case in vectors["cases"]):
        named = {name: one for name, one in ours.items() if isinstance(one, list)}
        for name, (value, options) in named.items():
            values[name].add(value)
            for option, setting in options.items():
                values[option].add(setting)
        values["mask_truncated"].add(ours.get("mask_truncated", False))
        for name, value in ours.get("regularization", {}).items():
            values[name].add(value)
    return values


@pytest.mark.parametrize(
    "choice", ["advantage", "policy_loss", "aggregation", "correction", "kl"], ids=str
)
def test_every_choice_has_a_vector_or_no_reference(choice: str) -> None:
    named = {"advantage": ADVANTAGES, "policy_loss": POLICY_LOSSES}
    offered = named.get(choice, get_args(ObjectiveConfig.model_fields[choice].annotation))
    assert offered
    assert set(offered) - compared_values()[choice] == WITHOUT_REFERENCE.get(choice, set())


def test_every_field_of_the_objective_has_a_vector_or_no_reference() -> None:
    compared = compared_values()
    assert compared["mask_truncated"] == {True, False}
    fields = set(ObjectiveConfig.model_fields)
    assert fields - compared.keys() == NOT_COMPARED | COMPARED_OTHERWISE


def test_every_library_has_vectors() -> None:
    assert {path.stem for path in FILES} == set(VERSIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_vector_files_name_the_version_and_the_script(
    path: Path,
) -> None:
    vectors = read(path)
    assert vectors["library"] == path.stem
    assert vectors["version"] == VERSIONS[path.stem]
    assert re.fullmatch(r"scripts/make_parity_vectors_\w+\.py", vectors["script"])
    script = (ROOT / vectors["script"]).read_text()
    assert f"{path.stem} {vectors['version']}" in script
    assert f"tests/fakes/parity/{path.name}" in script
