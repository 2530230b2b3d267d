#!/usr/bin/env bash
# Measures what one GPU can show, in about eight minutes and without network; prints one table.
# Uses .venv if it is there, else $PYTHON (default python3), which needs what pyproject.toml lists.
#   bash scripts/gpu_check.sh [options of benchmarks/gpu_check.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="${PYTHON:-python3}"
cd "$root"
export PYTHONPATH="$root" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchmarks.gpu_check "$@"
