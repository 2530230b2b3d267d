#!/usr/bin/env bash
# Makes .venv, installs, and trains the shipped tiny model on arithmetic; ends with a summary.
# Overrides are passed on: bash scripts/quickstart.sh --run.updates 50
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
cd "$here"
exec "$root/.venv/bin/speed-async" train "$root/quickstart/config.toml" "$@"
