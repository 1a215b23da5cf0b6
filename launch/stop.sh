#!/usr/bin/env bash
# Ends the run on every worker: it saves after the step it is in. launch/run.sh resumes it.
#
#   launch/stop.sh --name=pod --zone=us-east5-a
#
#   --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run]    as in create.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

flags "" "$@"
need name zone

worker stop
