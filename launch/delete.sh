#!/usr/bin/env bash
# Deletes the TPU VM and its request, and with them the workers' disks. What a run wrote to gs:// stays.
#
#   launch/delete.sh --name=pod --zone=us-east5-a
#
#   --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run]    as in create.sh
#   --now     it was made by create.sh --now
#   --yes     do not ask
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

now="" yes=""
flags "now yes" "$@"
need name zone

if [[ -n $now ]]; then
    tpu tpu-vm delete "$name" ${yes:+--quiet}
else
    tpu queued-resources delete "$name" --force ${yes:+--quiet}
fi
