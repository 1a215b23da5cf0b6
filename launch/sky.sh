#!/usr/bin/env bash
# Runs a configuration by SkyPilot (pip install "skypilot[gcp]"), on a TPU slice or on machines with GPUs, wherever one of
# your clouds has them. With --managed SkyPilot takes a new machine after a preemption, where the run goes on from its
# workdir, and gives it back at the end.
#
#   launch/sky.sh --name=sft-6b --type=tpu-v5p-128 --managed --spot -- --config=configs/sft_6b.py \
#       --workdir=gs://bucket/sft_6b --config.data.demonstrations=jsonl:gs://bucket/demonstrations.jsonl
#   launch/sky.sh --name=sft-1b3 --type=H100:8 --nodes=2 -- …
#
#   --name=NAME        of the cluster, or of the managed job
#   --type=TYPE        tpu-v5p-128, tpu-v6e-8, H100:8, A100-80GB:1: sky gpus list --all
#   --nodes=N          machines with GPUs; 1 by default
#   --managed          a managed job; else a cluster, which stays until `sky down NAME`
#   --spot             cheaper, and may be preempted at any time
#   --infra=PLACE      a cloud, region or zone: gcp/us-east5, aws
#   --env=NAME=VALUE   a variable of the run's environment, such as LIBTPU_INIT_ARGS; more than one is allowed
#   --yes              do not ask
#   --dry_run          print what would be run
#   -- FLAGS           of instructgpt_jax.main
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

type="" nodes=1 managed="" spot="" infra="" yes=""
# shellcheck disable=SC2034  # `need` reads them
tool=sky tool_is='SkyPilot with pip install "skypilot[gcp]"'
flags "type= nodes= managed spot infra= env+= yes --" "$@"
shift "$used"
need name type
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes must be a whole number of at least 1, got $nodes"
need_run "$@"

task=launch/sky_gpu.yaml
if [[ $type == tpu-* ]]; then
    task=launch/sky_tpu.yaml
    ((nodes == 1)) || die "--nodes must be 1 for a TPU: --type names the whole slice, got $nodes"
fi
launch=(sky launch "$task" --cluster="$name")
[[ -z $managed ]] || launch=(sky jobs launch "$task" --name="$name")
printf -v arguments '%q ' "$@"
for variable in "FLAGS=${arguments% }" ${variables[@]+"${variables[@]}"}; do
    launch+=(--env "$variable")
done
cd "$here/.."  # the task's `workdir: .`
do_or_print "${launch[@]}" --gpus="$type" --num-nodes="$nodes" ${spot:+--use-spot} ${infra:+--infra="$infra"} --detach-run \
    ${yes:+--yes}
