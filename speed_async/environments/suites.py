"""The evaluation suites of a run: their prompts, and the processes that score them."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Self

import numpy as np

from speed_async.config.schema import Config
from speed_async.config.sections.evaluate import SuiteConfig
from speed_async.environments.dataset.prompts import DatasetPrompts
from speed_async.environments.dataset.rows import Rows, open_source
from speed_async.environments.matching import MatchKind
from speed_async.environments.suite_task import SuiteTask
from speed_async.environments.verifier import VerifierPool
from speed_async.errors import HubDataError
from speed_async.types import Prompt


def open_suites(suites: Sequence[SuiteConfig]) -> dict[str, Sequence[Prompt]]:
    """The prompts of each suite; they stay on disk. Raises DataError or ConfigError for an unusable
    source."""
    return {suite.name: suite_prompts(suite_rows(suite), suite.num_prompts) for suite in suites}


def suite_rows(suite: SuiteConfig) -> Rows:
    """All rows of its source. Raises DataError or ConfigError."""
    try:
        return open_source(suite, suite.match)
    except HubDataError as error:
        raise error.in_field("evaluate.suites") from error


def suite_prompts(rows: Rows, num_prompts: int | None) -> DatasetPrompts:
    """The first prompts of a source, or all of them."""
    count = min(len(rows), num_prompts or len(rows))
    return DatasetPrompts(
        rows.table,
        rows.pages,
        np.arange(count, dtype=np.int32),
        held_out=True,
        digest=rows.report.digest if count == len(rows) else None,
    )


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
