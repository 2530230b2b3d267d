"""`[run]`: length, folder and end of a run."""

from typing import Annotated

from pydantic import Field

from speed_async.config.sections.section import NonNegativeInt, Section


class RunConfig(Section):
    folder: str = "runs/default"
    """Run folder. A relative path is relative to the current directory. Learners on several nodes
    need one that all of them share."""
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
