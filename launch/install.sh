#!/usr/bin/env bash
# Installs this checkout's last commit on every worker of a TPU VM, with a Python of its own. Nothing is done where that
# commit is installed already. On a slice of several workers, `ssh-add ~/.ssh/google_compute_engine` once before.
#
#   launch/install.sh --name=pod --zone=us-east5-a
#
#   --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run]    as in create.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

flags "" "$@"
need name zone

cd "$here/.."
commit=$(git rev-parse HEAD) || die "the project must be a git checkout: its last commit is installed"
[[ -z $(git status --porcelain --untracked-files=normal) ]] || echo "note: changes that are not committed stay here" >&2
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

tpu tpu-vm scp "$archive" "$name:instructgpt_jax.tar.gz" --worker=all
on_workers "set -eu
if [ -e instructgpt_jax/launch/worker.sh ]; then
  if [ \"\$(cat instructgpt_jax/.commit 2>/dev/null)\" = $commit ]; then echo already installed; exit; fi
  bash instructgpt_jax/launch/worker.sh idle
fi
rm -rf instructgpt_jax
mkdir instructgpt_jax
tar -xzf instructgpt_jax.tar.gz -C instructgpt_jax
bash instructgpt_jax/launch/worker.sh install
echo $commit >instructgpt_jax/.commit"
