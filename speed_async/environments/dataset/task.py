"""The `dataset` task: prompts and answers of prepared folders, files and hub data sets."""

from collections.abc import Sequence

import numpy as np
import xxhash

from speed_async.config.sections.sources import TaskSource
from speed_async.environments.dataset.mixture import MixedSource, mix
from speed_async.environments.dataset.prompts import DatasetPrompts
from speed_async.environments.dataset.rows import MappedPages, open_source, summary
from speed_async.environments.matching import MatchedTask, MatchKind
from speed_async.environments.task import ContentDigest
from speed_async.types import Int32Array, Prompt, UInt64Array


class DatasetTask(MatchedTask):
    """Prompts stay on disk; this object has four bytes for each. The held-out prompts are sampled
    with the seed, from each source in proportion to its share (mixture.py)."""

    def __init__(
        self,
        sources: Sequence[TaskSource],
        *,
        match: MatchKind,
        num_held_out: int,
        seed: int,
    ) -> None:
        """Raises DataError (unusable source) or ConfigError (too many held-out prompts, weights
        too uneven)."""
        import pyarrow as pa

        super().__init__(match)
        opened = [open_source(source, match) for source in sources]
        table = pa.concat_tables([rows.table for rows in opened])
        pages = MappedPages([each for rows in opened for each in rows.pages.maps])
        mixed = [
            MixedSource(
                path=source.path,
                weight=source.weight,
                prompt_keys=rows.keys("prompt_key"),
                answer_keys=rows.keys("answer_key"),
            )
            for source, rows in zip(sources, opened, strict=True)
        ]
        mixture = mix(mixed, num_held_out=num_held_out, seed=seed)
        self.train_prompts: Sequence[Prompt] = DatasetPrompts(
            table,
            pages,
            mixture.train_T,
            held_out=False,
            digest=_chosen_digest([rows.report.digest for rows in opened], mixture.train_T),
        )
        self.held_out_prompts: Sequence[Prompt] = DatasetPrompts(
            table, pages, mixture.held_out_H, held_out=True
        )
        self.content = _content(mixed)
        self.notes = [
            f"{summary(source.path, rows.report)}; memory-mapped from {rows.file}"
            for source, rows in zip(sources, opened, strict=True)
        ]
        """Lines about each source, for display."""
        self.warnings = [
            f"data set {summary(source.path, rows.report)}; the first is {rows.report.examples[0]}"
            for source, rows in zip(sources, opened, strict=True)
            if rows.report.unusable
        ]
        if mixture.num_contradicting:
            self.warnings.append(
                f"{mixture.num_contradicting:,} rows repeat a prompt with another answer: the "
                "first row of each prompt is used"
            )
        if mixture.num_repeated:
            self.notes.append(f"{mixture.num_repeated:,} repeated prompts are used once")


def _chosen_digest(sources: Sequence[str], rows_N: Int32Array) -> str:
    """Digest of these rows of sources with these digests; no row is read."""
    digest = xxhash.xxh3_128("".join(sources).encode())
    digest.update(rows_N.tobytes())
    return digest.hexdigest()


def _content(sources: Sequence[MixedSource]) -> ContentDigest:
    """Digests of the prompts, from those of each row: no prompt is read."""
    prompts = np.concatenate([source.prompt_keys for source in sources])
    answers = np.concatenate([source.answer_keys for source in sources])
    pairs = prompts ^ (answers * np.uint64(0x9E3779B97F4A7C15))
    return ContentDigest(prompts=_unordered(prompts), answers=_unordered(pairs))


def _unordered(keys: UInt64Array) -> str:
    return xxhash.xxh3_128_hexdigest(np.sort(keys).tobytes())
