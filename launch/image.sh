#!/usr/bin/env bash
# Makes the container of this checkout's last commit (launch/Dockerfile), and pushes it where a cluster finds it.
#
#   launch/image.sh --image=us-docker.pkg.dev/PROJECT/REPOSITORY/instructgpt_jax:tpu --push
#
#   --image=IMAGE    its name, with that of the registry if it is pushed
#   --extra=EXTRA    tpu (the default), gpu, or none for CPUs
#   --push           to the registry of its name: gcloud auth configure-docker us-docker.pkg.dev, once before
#   --dry_run        print what would be run
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

image="" extra=tpu push=""
# shellcheck disable=SC2034  # `need` reads them
tool=docker tool_is="Docker"
flags "image= extra= push" "$@"
need image
case $extra in
    tpu | gpu) extras=$extra,gcs ;;
    none) extras=gcs ;;
    *) die "--extra must be tpu, gpu or none, got $extra" ;;
esac

cd "$here/.."
commit=$(git rev-parse HEAD) || die "the project must be a git checkout: its last commit is built"
[[ -z $(git status --porcelain --untracked-files=normal) ]] || echo "note: changes that are not committed stay here" >&2
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar --output="$archive" HEAD
do_or_print docker build --file=launch/Dockerfile --build-arg="EXTRAS=$extras" --label="commit=$commit" --tag="$image" - \
    <"$archive"
if [[ -n $push ]]; then
    do_or_print docker push "$image"
fi
