#!/usr/bin/env bash
# Every measurement of this project on one GPU, in at most eight minutes, as one table with its date and card.
#
#     benchmarks/gpu.sh [TABLE.md]           in an environment with the extra `gpu`; LIMIT=SECONDS for less time
#     benchmarks/gpu.sh --tiny [TABLE.md]    anywhere: the same parts, so small that they only show that they run
#
# The table is printed as it grows and written to TABLE.md (gpu.md). A part that fails, or that takes longer than it may,
# says so in its row, and the others go on; what there is no time left for is left out. The status is 1 if any row is so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# Compiled programs are kept between runs of this script: a part that was stopped while it compiled has less to do.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/instructgpt-gpu-sh}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

tiny=
if [[ ${1:-} == --tiny ]]; then tiny=1; shift; fi
table=${1:-gpu.md}
end=$((SECONDS + ${LIMIT:-480})) missing=0
said=$(mktemp)
trap 'rm -f "$said"' EXIT

row() { printf '| %s | %s | %s |\n' "$1" "${2//|/\\|}" "$3" | tee -a "$table"; }

# measure NAME LIMIT SCRIPT [ARGUMENT ...]: a row for each line that the script prints within LIMIT seconds.
measure() {
    local name=$1 limit=$2 begin=$SECONDS status=0 line
    shift 2
    if ((limit > end - SECONDS)); then limit=$((end - SECONDS)); fi
    if ((limit < 10)); then
        row "$name" "left out: the time is over" 0
        missing=1
        return
    fi
    timeout --kill-after=5 "$limit" python "benchmarks/$1" "${@:2}" >"$said" 2>"$said.errors" || status=$?
    while IFS= read -r line; do
        if [[ $line =~ [^[:space:]] ]]; then row "$name" "${line#"${line%%[![:space:]]*}"}" "$((SECONDS - begin))"; fi
    done <"$said"
    if ((status == 124 || status == 137)); then
        row "$name" "stopped after $limit s" "$((SECONDS - begin))"
    elif ((status)); then
        row "$name" "failed ($status): $(tail -n 1 "$said.errors")" "$((SECONDS - begin))"
    fi
    rm -f "$said.errors"
    if ((status)); then missing=1; fi
}

card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
{
    echo "$(date -u '+%d %B %Y, %H:%M UTC'), ${card:-no GPU}, $(python -c 'import jax; print("jax", jax.__version__)')," \
        "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    echo "| part | result | s |"
    echo "|---|---|---|"
} | tee "$table"

if [[ $tiny ]]; then
    measure "PPO, DeepSpeed-Chat" 240 ppo.py --deepspeed --iterations=1 --shrink=256
    measure rollout 240 rollout.py --size=tiny --prompts=18 --slots=8 --shrink=16 --repeats=1
    measure "rollout, 8-bit cache" 240 rollout.py --size=tiny --prompts=8 --slots=4 --shrink=16 --repeats=1 \
        --workloads=fixed --forms=slots,int8
    measure "training MFU" 60 model.py --parts=mfu --steps=1
    measure attention 120 attention.py --sizes=tiny --rows=2 --tokens=64 --remat=full --steps=1
else
    measure "PPO, DeepSpeed-Chat" 160 ppo.py --deepspeed --iterations=1
    measure rollout 130 rollout.py --size=gpt3-1.3b --dtype=bfloat16 --slots=64 --repeats=1 --workloads=paper
    measure "rollout, 8-bit cache" 80 rollout.py --size=gpt3-1.3b --dtype=bfloat16 --slots=64 --prompts=64 --repeats=1 \
        --workloads=fixed --forms=slots,int8
    measure "training MFU" 40 model.py --parts=mfu --steps=3
    measure "the head" 20 model.py --parts=head --steps=3
    measure attention 50 attention.py --sizes=gpt3-1.3b --remat=dots --steps=3
fi
exit "$missing"
