#!/usr/bin/env bash
# Runs a configuration as a Slurm job on nodes with GPUs, one process for each GPU. The checkout and its environment must
# be on storage that all nodes share: pip install -e ".[gpu]", and activate the environment before.
#
#   launch/slurm.sh --name=sft_6b --nodes=2 --gpus=8 --time=12:00:00 -- --config=configs/sft_6b.py \
#       --workdir=/shared/runs/sft_6b --config.data.demonstrations=jsonl:/shared/demonstrations.jsonl
#
#   --name=NAME        of the job; its log is NAME_JOBID.log, here
#   --gpus=N           of a node
#   --nodes=N          1 by default
#   --time=LIMIT       of the job; five minutes before it the run saves, and the job is queued again to go on
#   --partition=NAME --account=NAME --constraint=FEATURE    as for sbatch
#   --cpus=N           processor cores of each GPU's process; the cluster's own number by default
#   --python=FILE      of the environment; the `python` of your shell by default
#   --dry_run          print what would be run
#   -- FLAGS           of instructgpt_jax.main; variables of your shell, such as XLA_FLAGS, are those of the run
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

gpus="" nodes=1 time="" partition="" account="" constraint="" cpus="" python=""
# shellcheck disable=SC2034  # `need` reads them
tool=sbatch tool_is="Slurm, or log in on a node that has it"
flags "gpus= nodes= time= partition= account= constraint= cpus= python= --" "$@"
shift "$used"
need name gpus
for number in gpus nodes ${cpus:+cpus}; do
    [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "--$number must be a whole number of at least 1, got ${!number}"
done
need_run "$@"
program=$(command -v "${python:-python}") || die "--python must be the Python of the project's environment, got \
${python:-no python on PATH}"

do_or_print sbatch --job-name="$name" --output="$PWD/${name}_%j.log" --chdir="$(cd "$here/.." && pwd)" --nodes="$nodes" \
    --ntasks-per-node="$gpus" --gpus-per-node="$gpus" ${cpus:+--cpus-per-task="$cpus"} ${time:+--time="$time"} \
    ${partition:+--partition="$partition"} ${account:+--account="$account"} ${constraint:+--constraint="$constraint"} \
    --requeue --open-mode=append --signal=B:USR1@300 "$here/slurm_job.sh" "$program" "$@"
