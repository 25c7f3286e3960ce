#!/usr/bin/env bash
# Two Ray nodes on this machine, one short run across both. Usage: cluster/local.sh [JOB.yaml [--set a.b=c]…]
set -euo pipefail
cd "$(dirname "$0")/.."
job=${1:-jobs/quickstart.yaml}
shift || true
port=${PORT:-6399}
export RAY_AUTH_MODE=disabled  # a local Ray of before may have left a token, which nodes would then ask for
ray start --head --port="$port" --num-cpus=1 --include-dashboard=false --disable-usage-stats >/dev/null
trap 'ray stop >/dev/null' EXIT
ray start --address="127.0.0.1:$port" --num-cpus=1 --disable-usage-stats >/dev/null
fleetune run "$job" --address "127.0.0.1:$port" --set execution.hosts=2 --set execution.threads=1 \
  --set rounds.num_rounds=2 --set evaluation.generate=false "$@"
