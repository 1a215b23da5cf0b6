#!/usr/bin/env bash
# The job of launch/slurm.sh, on its first node: slurm_job.sh PYTHON FLAG…
#
# Slurm sends USR1 some minutes before the time limit: the run is told to save and end, and the job is queued again.
# After a preemption or the failure of a node Slurm queues it again by itself.
set -euo pipefail
python=$1
shift
ending="" exit_code=0
# scancel's signals go to the processes of the run, once to each, and not to this script.
trap 'ending=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# --cpus-per-task of the job is not srun's own since Slurm 22.05. One process's failure ends the others.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$python" -m instructgpt_jax.main --preemptible "$@" &
main=$!
wait "$main" || exit_code=$?
if [[ -n $ending ]]; then
    exit_code=0
    wait "$main" || exit_code=$?
    if ((exit_code == 143)); then  # saved, not complete: a run that ended meanwhile is left alone
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$exit_code"
