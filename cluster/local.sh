#!/usr/bin/env bash
# Two Ray nodes on this machine, one short run across both. Usage: cluster/local.sh [JOB.yaml [--set a.b=c]…]
set -euo pipefail
cd "$(dirname "$0")/.."
job=${1:-jobs/quickstart.yaml}
shift || true
address=127.0.0.1:${PORT:-6399}

RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

nodes=()
trap 'kill "${nodes[@]}" 2>/dev/null; wait' EXIT
ray start --head --block --node-ip-address=127.0.0.1 --port="${address#*:}" --num-cpus=1 --include-dashboard=false >/dev/null &
nodes+=($!)
until ray status --address="$address" &>/dev/null; do
  kill -0 "${nodes[0]}" 2>/dev/null || { echo "Ray did not start; is port ${address#*:} free?" >&2; exit 1; }
  sleep 1
done
ray start --block --node-ip-address=127.0.0.1 --address="$address" --num-cpus=1 >/dev/null &
nodes+=($!)
python - "$address" <<'END'
import sys, time
import ray

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
END

fleetune run "$job" --address "$address" --set execution.workers=2 --set execution.threads=1 \
  --set rounds.num_rounds=2 --set evaluation.generate=false "$@"
