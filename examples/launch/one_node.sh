#!/usr/bin/env bash
# One learner and seven actors on the GPUs of a node. For models that one GPU cannot train:
#   bash examples/launch/one_node.sh my.toml --cluster.learners 4 --cluster.actors 4
set -euo pipefail
exec speed-async train "$1" --cluster.actors 7 --cluster.max_restarts 3 "${@:2}"
