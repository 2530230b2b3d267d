"""The README and the docs name only what exists."""

import os
import re
import subprocess
import sys

from tests.fakes.paths import REPOSITORY


def test_every_path_that_the_docs_name_exists() -> None:
    pattern = re.compile(
        r"(?:speed_async|tests|benchmarks|scripts|docs|examples|quickstart)/[\w./-]*\w"
    )
    missing = [
        f"{page.name}: {path}"
        for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
        for path in pattern.findall(page.read_text())
        if not ((REPOSITORY / path).exists() or path.startswith("benchmarks/results/"))
    ]
    assert missing == []


def test_the_commands_that_the_readme_begins_with_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for script in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert f"bash {script}" in text
        assert (REPOSITORY / script).is_file()


def test_the_configuration_page_is_up_to_date() -> None:
    script = REPOSITORY / "scripts" / "make_configuration_page.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, str(script), "--check"], env=environment)
    assert done.returncode == 0, "run: python scripts/make_configuration_page.py"


def test_the_readme_stays_within_200_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200
