"""The README and the docs name only what exists."""

import ast
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


def test_the_path_of_a_group_names_functions_that_exist() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    assert len(rows) == 15
    for files, functions in rows:
        for file, function in zip(
            re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", functions), strict=True
        ):
            module = ast.parse((REPOSITORY / "speed_async" / file).read_text())
            assert defines(module, function.split(".")), f"{file}: {function}"


def defines(node: ast.AST, path: list[str]) -> bool:
    if not path:
        return True
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    children = [each for each in ast.iter_child_nodes(node) if isinstance(each, kinds)]
    return any(each.name == path[0] and defines(each, path[1:]) for each in children)
