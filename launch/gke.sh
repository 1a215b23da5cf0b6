#!/usr/bin/env bash
# Runs a configuration on TPU slices of a GKE cluster, as a workload of XPK (pip install xpk), in the container that
# launch/image.sh makes. The cluster is made once, by XPK itself: xpk cluster create --help.
#
#   launch/gke.sh --name=sft-6b --cluster=tpus --zone=us-east5-a --type=v5p-128 --image=IMAGE \
#       -- --config=configs/sft_6b.py --workdir=gs://bucket/sft_6b \
#       --config.data.demonstrations=jsonl:gs://bucket/demonstrations.jsonl
#
#   --name=NAME        of the workload: small letters, digits and -, at most 40 of them
#   --cluster=NAME     of the cluster, which XPK made
#   --zone=ZONE [--project=PROJECT]    of the cluster
#   --type=TYPE        of a slice, which the cluster has: v5p-128, v5litepod-16, v6e-8
#   --image=IMAGE      what launch/image.sh pushed
#   --restarts=N       how often it goes on from its last checkpoint after a preemption or a failure; 20 by default
#   --priority=WORD    very-low, low, medium, high or very-high; XPK's own by default
#   --env=NAME=VALUE   a variable of the run's environment, such as LIBTPU_INIT_ARGS; more than one is allowed
#   --dry_run          print what would be run
#   -- FLAGS           of instructgpt_jax.main
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

cluster="" type="" image="" restarts=20 priority=""
# shellcheck disable=SC2034  # `need` reads them
tool=xpk tool_is="it with pip install xpk"
flags "cluster= type= image= restarts= priority= env+= --" "$@"
shift "$used"
need name cluster zone type image
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name must be small letters, digits and -, at most 40 of them, got $name"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts must be a whole number, got $restarts"
need_run "$@"

# One line for bash: XPK writes it into a file of YAML. `exec` lets the signal of a preemption reach Python. The others of
# a slice fail with 1 when one of them has gone.
printf -v command '%q ' exec env ${variables[@]+"${variables[@]}"} python -m instructgpt_jax.main --preemptible "$@"
do_or_print xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" ${project:+--project="$project"} \
    --tpu-type="$type" --docker-image="$image" --max-restarts="$restarts" --restart-on-exit-codes=1 \
    --termination-grace-period-seconds=300 ${priority:+--priority="$priority"} --command="${command% }"
