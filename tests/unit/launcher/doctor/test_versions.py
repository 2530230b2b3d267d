"""Installed versions against the requirements of pyproject.toml."""

import importlib.util

import pytest

from speed_async.launcher.doctor.versions import compare_with_requirements, installed_versions

REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "pyzmq<28,>=27",
    'uvloop>=0.21; sys_platform == "never"',
    'vllm==0.32.0; extra == "vllm"',
    'ruff>=0.14; extra == "dev"',
]
GOOD = {"torch": "2.13.0+cpu", "pyzmq": "27.3.0"}


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (GOOD, []),
        (GOOD | {"vllm": "0.32.0", "ruff": "0.1"}, []),
        (GOOD | {"torch": "2.14.0"}, [("torch 2.14.0 is not supported", False)]),
        (GOOD | {"torch": "2.12.0.dev20260101+cu128"}, []),
        (GOOD | {"vllm": "0.9"}, [("pip install 'vllm==0.32.0'", False)]),
        ({"torch": "2.13.0"}, [("pyzmq is not installed: pip install 'pyzmq<28,>=27'", True)]),
    ],
)
def test_unsupported_and_missing_packages_are_named_with_the_command_that_installs_them(
    versions: dict[str, str], expected: list[tuple[str, bool]]
) -> None:
    found = list(compare_with_requirements(REQUIREMENTS, versions))
    assert [is_missing for _, is_missing in found] == [is_missing for _, is_missing in expected]
    for (text, _), (part, _) in zip(found, expected, strict=True):
        assert part in text


def test_versions_include_the_packages_of_a_run() -> None:
    versions = installed_versions()
    if importlib.util.find_spec("vllm") is not None:  # also the one for CPUs
        assert versions["vllm"][0].isdigit()
    for name in ("speed_async", "python", "torch", "pyzmq", "libzmq"):
        assert versions[name][0].isdigit()
