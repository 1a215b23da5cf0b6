#!/usr/bin/env bash
# Starts a configuration on every worker of a TPU VM. It goes on when the connection ends, and writes to
# ~/instructgpt_jax_logs/main.log of each worker. The same command again resumes a run that has ended, from its workdir,
# and leaves one that is going on alone.
#
#   launch/run.sh --name=pod --zone=us-east5-a -- --config=configs/ppo_ptx_6b.py --workdir=gs://bucket/ppo_ptx_6b \
#       --config.data.prompts=jsonl:gs://bucket/prompts.jsonl
#
#   --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run]    as in create.sh
#   --env=NAME=VALUE    a variable of the run's environment, such as LIBTPU_INIT_ARGS; more than one is allowed
#   --wait      until it ends; fails if on any worker it failed or was stopped
#   -- FLAGS    of instructgpt_jax.main
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

wait=""
flags "env+= wait --" "$@"
shift "$used"
need name zone
need_run "$@"

worker start "$@"
if [[ -n $wait ]]; then
    worker wait
fi
