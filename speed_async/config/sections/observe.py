"""`[observe]`: status, traces and wandb."""

from speed_async.config.sections.section import PositiveFloat, Section


class ObserveConfig(Section):
    status_interval_s: PositiveFloat = 0.5
    breakdown: bool = False
    """Print a table of where the time went at the end (summary.json always has it)."""
    trace: str | None = None
    """Folder for traces of every group that was sent or trained; for fault injection tests."""
    wandb: bool = False
    """Log to wandb; offline without an API key."""
    wandb_project: str = "speed_async"
