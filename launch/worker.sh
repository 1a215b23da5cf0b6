#!/usr/bin/env bash
# Runs on a worker, in the installed checkout; the other scripts call it.
#
#   worker.sh install [EXTRA]    a Python environment with the project, for a TPU or by the extra `gpu`
#   worker.sh start FLAG...      instructgpt_jax.main in the background
#   worker.sh wait | stop | idle until the run ends; end it; fail unless there is none
#   worker.sh status LINES       how it stands, and the end of its log
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=$HOME/instructgpt_jax_env
logs=$HOME/instructgpt_jax_logs

say() { echo "$(hostname): $*"; }

running() {  # the lock is held by the processes of a run, for as long as one of them lives
    [[ -e $logs/lock ]] && ! flock --nonblock "$logs/lock" true
}

install() {  # [EXTRA]; images bring Python 3.10, the project needs 3.11: uv fetches one
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x $environment/bin/python ]] || uv venv --quiet --python 3.12 "$environment"
    uv pip install --quiet --python "$environment/bin/python" -e "${code}[${1:-tpu},gcs]"
    say "installed, $("$environment/bin/python" -c 'import sys, jax; print("Python", sys.version.split()[0], "JAX", jax.__version__)')"
}

start() {
    mkdir -p "$logs"
    exec 9>>"$logs/lock"
    if ! flock --nonblock 9; then
        [[ $(printf '%q ' "$@") == "$(cat "$logs/command")" ]] && say "already running" && return
        say "another run is going on (launch/stop.sh ends it): $(cat "$logs/command")" >&2
        exit 1
    fi
    printf '%q ' "$@" >"$logs/command"
    rm -f "$logs/exit_code" "$logs/pids"
    printf '\n== %s: %s\n' "$(date)" "$(cat "$logs/command")" >>"$logs/main.log"
    nohup setsid bash "$code/launch/worker.sh" supervise "$@" >>"$logs/main.log" 2>&1 </dev/null &
    say "started"
}

supervise() {  # notes how the run ended; 143: by a signal, so that it is not taken for complete
    local main stopped="" exit_code=0
    cd "$code"
    trap 'stopped=yes' TERM
    "$environment/bin/python" -m instructgpt_jax.main --distributed "$@" &
    main=$!
    echo "$$ $main" >"$logs/pids"  # in the order of their signals: this one must have its own before main ends
    wait "$main" || exit_code=$?
    if [[ -n $stopped ]]; then
        wait "$main" || true
        exit_code=143
    fi
    echo "$exit_code" >"$logs/exit_code"
}

await() {
    flock "$logs/lock" true
    say "$(state)"
    exit "$(cat "$logs/exit_code" 2>/dev/null || echo 1)"
}

stop() {
    if running; then
        # shellcheck disable=SC2046  # two numbers
        kill -TERM $(cat "$logs/pids")
        flock --timeout 900 "$logs/lock" true || { say "still saving after 15 minutes" >&2 && exit 1; }
    fi
    say "$(state)"
}

state() {
    if running; then
        echo "running"
    elif [[ ! -e $logs/command ]]; then
        echo "nothing was started"
    else
        case $(cat "$logs/exit_code" 2>/dev/null) in
            143) echo "stopped by a signal; the same launch/run.sh resumes it" ;;
            "") echo "interrupted; the same launch/run.sh resumes it" ;;
            *) echo "ended with exit code $(cat "$logs/exit_code")" ;;
        esac
    fi
}

status() {  # LINES
    say "$(state)"
    [[ ! -e $logs/main.log ]] || tail -n "$1" "$logs/main.log" | sed "s/^/$(hostname): /"
}

idle() {
    if running; then
        say "a run is going on; launch/stop.sh ends it" >&2
        exit 1
    fi
}

verb=$1
shift
case $verb in
    wait) await ;;
    install | start | supervise | stop | status | idle) "$verb" "$@" ;;
    *) echo "error: $verb is not a verb of worker.sh" >&2 && exit 1 ;;
esac
