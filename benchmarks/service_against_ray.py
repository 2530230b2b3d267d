"""Compare the service with Ray on the same groups, alternating on this machine.

Usage: python -m benchmarks.service_against_ray --ray /somewhere/bin/python [--repeats 3]
The Ray arm is described in service_ray.py. The service runs with and without its journal.
"""

import argparse
import json
import os

from benchmarks.harness import output_of, report
from benchmarks.service import Arm, ratios, run_service

TARGET = 5.0


def run_ray(python: str, tokens: int, seconds: float) -> float:
    """Groups per second. RuntimeError where Ray is not installed."""
    command = [python, "benchmarks/service_ray.py", "--tokens", tokens, "--seconds", seconds]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return json.loads(output_of([*map(str, command)], environment).splitlines()[-1])["groups_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ray", required=True, help="a Python with Ray installed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096, 32_768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for tokens in arguments.tokens:
        rates: dict[str, list[float]] = {"ray": [], "none": [], "batched": []}
        for _ in range(arguments.repeats):
            rates["ray"].append(run_ray(arguments.ray, tokens, arguments.seconds))
            for kind in ("none", "batched"):
                arm = Arm(tokens_each=tokens, kind=kind, curve=False)
                measured = run_service(arm, None, arguments.seconds)
                rates[kind].append(measured.groups_per_s)
        for kind in rates:
            rows.append(
                {
                    "tokens": tokens,
                    "arm": "Ray" if kind == "ray" else f"service, journal {kind}",
                    **ratios(tokens, rates[kind], rates["ray"]),
                    "target": 1.0 if kind == "ray" else TARGET,
                }
            )
    report("service_against_ray", f"Against Ray, medians of {arguments.repeats}", rows)


if __name__ == "__main__":
    main()
