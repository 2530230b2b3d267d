# Sourced by the scripts: makes .venv beside this folder once, and installs what is asked for.
# usage: prepare_environment "[extras]"; sets $python.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/progress.sh"

prepare_environment() {
  local extras="$1" venv="$root/.venv" stamp want
  python="$venv/bin/python"
  if ! "$python" -m pip --version > /dev/null 2>&1; then # also after an interrupted first call
    step "making $venv"
    "$(find_python)" -m venv "$venv"
  fi
  # Reinstalled only when the dependencies or the extras change.
  want="$(cat "$root/pyproject.toml" "$root/scripts/environment.sh" | cksum) $extras"
  stamp="$venv/.speed_async-installed"
  if [ -f "$stamp" ] && grep -qxF "$want" "$stamp"; then
    return
  fi
  # Torch first and pinned, so that no later requirement can pull another build of it.
  step "installing torch, the largest part (about 2 minutes for all, the first time)"
  pip_install "torch==2.13.0"
  step "installing speed_async$extras and what it needs"
  pip_install --editable "$root$extras"
  step "installed"
  echo "$want" >> "$stamp"
}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" > /dev/null \
      && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed, and none was found on the PATH" >&2
  exit 1
}
