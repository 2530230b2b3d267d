"""The evaluation suites of a run: their prompts, and the processes that score them."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Self

import numpy as np

from speed_async.config.schema import Config
from speed_async.config.suites import SuiteConfig
from speed_async.environments.dataset.prompts import DatasetPrompts
from speed_async.environments.dataset.rows import open_source
from speed_async.environments.matching import MatchKind
from speed_async.environments.suite_task import SuiteTask
from speed_async.environments.task import Task, fingerprint, prompt_bytes
from speed_async.environments.verifier import VerifierPool
from speed_async.types import Prompt


def open_suites(suites: Sequence[SuiteConfig]) -> dict[str, Sequence[Prompt]]:
    """The prompts of each suite; they stay on disk. Raises DataError for an unusable source."""
    return {suite.name: _open(suite) for suite in suites}


def data_fingerprint(task: Task, suites: Mapping[str, Sequence[Prompt]]) -> str:
    """Digest of all prompts of a run. Must be equal in processes that exchange prompt ids."""
    if not suites:
        return fingerprint(task)
    digest = hashlib.sha256(fingerprint(task).encode())
    for name, prompts in suites.items():
        digest.update(f"{name}\0{len(prompts)}\n".encode())
        for prompt in prompts:
            digest.update(prompt_bytes(prompt))
    return digest.hexdigest()[:16]


class SuiteVerifiers:
    """Async context manager with one verifier pool for each kind of match of the suites. A suite is
    scored by its own match only, regardless of the rewards of the task."""

    def __init__(self, config: Config) -> None:
        suites, actors = config.evaluate.suites, config.actors
        matches: set[MatchKind] = {suite.match for suite in suites}
        pools = {
            match: VerifierPool(
                partial(SuiteTask, match), actors.verifier_workers, actors.verifier_timeout_s
            )
            for match in matches
        }
        self._pools = list(pools.values())
        self.by_suite = {suite.name: pools[suite.match] for suite in suites}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises TaskError when the workers cannot start."""
        async with AsyncExitStack() as stack:
            for pool in self._pools:
                await stack.enter_async_context(pool)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


def _open(suite: SuiteConfig) -> DatasetPrompts:
    rows = open_source(suite.source, suite.match)
    num_prompts = min(len(rows), suite.num_prompts or len(rows))
    return DatasetPrompts(rows.table, np.arange(num_prompts, dtype=np.int32), held_out=True)
