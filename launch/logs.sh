#!/usr/bin/env bash
# Shows how the run stands on every worker with the last lines of its log, or fetches the whole logs.
#
#   launch/logs.sh --name=pod --zone=us-east5-a [--lines=20]
#   launch/logs.sh --name=pod --zone=us-east5-a --to=logs        writes logs/worker0.log, logs/worker1.log, …
#
#   --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run]    as in create.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

lines=20 to=""
flags "lines= to=" "$@"
need name zone
[[ $lines =~ ^[0-9]+$ ]] || die "--lines must be a whole number, got $lines"

if [[ -z $to ]]; then
    worker status "$lines"
    exit
fi
workers=1
if [[ -z $dry_run ]]; then
    workers=$(tpu tpu-vm describe "$name" --format="value(networkEndpoints.len())")
    mkdir -p "$to"
fi
for ((index = 0; index < workers; index++)); do
    tpu tpu-vm scp "$name:instructgpt_jax_logs/main.log" "$to/worker$index.log" --worker="$index"
done
