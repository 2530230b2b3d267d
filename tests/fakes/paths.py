"""Files of the repository that tests use."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "quickstart" / "model"
FAKES = Path(__file__).resolve().parent
