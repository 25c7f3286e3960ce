#!/usr/bin/env bash
#SBATCH --job-name=fleetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --output=fleetune-%j.log
# A Ray cluster for the length of a Slurm job, and one command on it. From a folder that all nodes see, with fleetune installed
# in an environment that is active (or activated below):
#   sbatch cluster/slurm.sh sweep jobs/sweeps/growth_rate.yaml
#   sbatch --nodes=4 cluster/slurm.sh run jobs/methods/devft.yaml --set rounds.num_rounds=200
# A time limit or a lost node is no loss: the same command again runs what is missing of a sweep.
set -euo pipefail
# source ~/fleetune-env/bin/activate

[ $# -gt 0 ] || { echo "usage: sbatch cluster/slurm.sh run|sweep|resume FILE [--set a.b=c]…" >&2; exit 2; }

# A token of this job alone: other users of the nodes cannot speak to its Ray. It travels in the environment, not on a command line.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
# Jobs that share a node do not meet. Ray keeps 10002 to 19999 for its workers, Linux gives 32768 and above to whoever asks.
port=${RAY_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
temp=${SLURM_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
cpus=${SLURM_CPUS_PER_TASK:-1}
one_node=(srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --overlap)

steps=()
trap '[ ${#steps[@]} = 0 ] || kill "${steps[@]}" 2>/dev/null; wait' EXIT

"${one_node[@]}" --nodelist="${nodes[0]}" ray start --head --block --node-ip-address="$address" --port="$port" \
  --num-cpus="$cpus" --include-dashboard=false --temp-dir="$temp" >/dev/null &
steps+=($!)
for _ in $(seq 120); do
  ray status --address="$address:$port" &>/dev/null && break
  kill -0 "${steps[0]}" 2>/dev/null || { echo "Ray's head ended on ${nodes[0]}" >&2; exit 1; }
  sleep 1
done

for node in "${nodes[@]:1}"; do
  "${one_node[@]}" --nodelist="$node" ray start --block --address="$address:$port" --num-cpus="$cpus" >/dev/null &
  steps+=($!)
done
python - "$address:$port" ${#nodes[@]} <<'END'
import sys, time
import ray

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 120
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {sys.argv[2]} nodes joined Ray within two minutes")
    time.sleep(0.2)
END

fleetune "$@" --address "$address:$port"
