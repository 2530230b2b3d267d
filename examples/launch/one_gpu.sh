#!/usr/bin/env bash
# The learner and one actor share a GPU; `--dry-run` prints the budget of its memory.
#   bash examples/launch/one_gpu.sh my.toml [--section.field value ...]
set -euo pipefail
exec speed-async train "$1" --cluster.actors 1 "${@:2}"
