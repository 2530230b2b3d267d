"""README and docs keep their promises about what is where."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_list_of_modules_names_every_module_in_its_folder() -> None:
    listed: set[str] = set()
    folder = ""
    for line in (ROOT / "docs" / "modules.md").read_text().splitlines():
        if line.startswith("speed_async") and line.endswith("/"):
            folder = line
        elif folder and line.startswith("  ") and line.split()[0].endswith(".py"):
            listed.add(folder + line.split()[0])
        elif not line.startswith("  "):
            folder = ""
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "speed_async").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == there


def test_the_commands_it_begins_with_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for script in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert f"bash {script}" in text
        assert (ROOT / script).is_file()
