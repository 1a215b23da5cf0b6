#!/usr/bin/env bash
# Asks for a Cloud TPU slice and waits until it is there. The same command again waits on, says that the slice is
# ready, or asks anew after a preemption. Ending it with Ctrl-C leaves the request in the queue.
#
#   launch/create.sh --name=pod --zone=us-east5-a --type=v5p-128 --spot
#
#   --name=NAME        of the request and of its TPU VM
#   --zone=ZONE        a zone that has the type: gcloud compute tpus accelerator-types list --zone=ZONE
#   --type=TYPE        v5p-128 is 64 chips of v5p: v2 to v5p count cores, v5litepod and v6e count chips
#   --runtime=VERSION  the VM's image; by default the one for the type
#   --spot             cheaper, and may be preempted at any time
#   --now              a TPU VM at once or an error, without the queue
#   --project=PROJECT  gcloud's own by default
#   --dry_run          print what would be run: here and in the other scripts
#   -- FLAGS           go to gcloud as they are: --reserved, --network=…, --service-account=…
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

type="" runtime="" spot="" now="" requested=""
flags "type= runtime= spot now --" "$@"
shift "$used"
need name zone type

if [[ -z $runtime ]]; then
    case $type in
        v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) die "--type must begin with v2-, v3-, v4-, v5litepod-, v5p- or v6e-, or --runtime be given, got --type=$type" ;;
    esac
fi

request() {
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
        ${spot:+--spot} "$@"
}

state() {  # of the request, empty if there is none
    local list
    list=$(tpu queued-resources list --format="value(name.basename(),state.state)") || exit 1
    awk -v name="$name" '$1 == name { print $2 }' <<<"$list"
}

if [[ -n $now ]]; then
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$runtime" ${spot:+--spot} "$@"
    exit
elif [[ -n $dry_run ]]; then
    request "$@"
    exit
fi

while true; do
    state=$(state)
    case $state in
        "")
            [[ -z $requested ]] || die "the request for $name has gone from the queue"
            request "$@"
            requested=yes
            ;;
        ACTIVE)
            echo "$name is ready"
            exit
            ;;
        FAILED | SUSPENDED)
            [[ -z $requested ]] || die "the request ended as $state: gcloud compute tpus queued-resources describe $name --zone=$zone"
            echo "removing the remains of $name, $state"
            tpu queued-resources delete "$name" --force --quiet
            ;;
        *)
            echo "$(date +%T) $name: $state"
            sleep "${INSTRUCTGPT_POLL_SECONDS:-30}"
            ;;
    esac
done
