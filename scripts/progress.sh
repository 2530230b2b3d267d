# Sourced by the scripts: says what they are at, with the seconds since they began.

step() {
  printf '%4d s  %s\n' "$SECONDS" "$1"
}

# Installs into the environment of $python. On a terminal pip shows what it does; elsewhere a line
# every ten seconds says that it is still at it.
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
