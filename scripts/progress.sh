# Sourced by the scripts: prints their progress, with the seconds since their start.

step() {
  printf '%4d s  %s\n' "$SECONDS" "$1"
}

# Installs into the environment of $python. On a terminal pip shows its progress; elsewhere a line is
# printed every ten seconds.
pip_install() {
  if [ -t 1 ]; then
    "$python" -m pip install --disable-pip-version-check "$@"
    return
  fi
  local ticker status=0
  while sleep 10 > /dev/null 2>&1 && kill -0 $$ 2> /dev/null; do step "still installing"; done &
  ticker=$!
  "$python" -m pip install --quiet --disable-pip-version-check "$@" || status=$?
  kill "$ticker" 2> /dev/null || true
  wait "$ticker" 2> /dev/null || true
  return "$status"
}
