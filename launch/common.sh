# shellcheck shell=bash
# What the scripts beside it share; sourced by them, never run.

name="" zone="" project="" dry_run="" environment=""

die() {
    echo "error: $*" >&2
    exit 1
}

usage() {  # the comment at the head of the script
    sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$0"
    exit 0
}

common_flag() {  # FLAG: one that every script has, else an error
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --dry_run) dry_run=yes ;;
        --help | -h) usage ;;
        *) die "unknown argument $1; a flag is written --flag=value, --help lists them" ;;
    esac
}

need() {  # FLAG...: those that must have been given
    local flag
    for flag in "$@"; do
        [[ -n "${!flag}" ]] || die "--$flag must be given; --help shows an example"
    done
    [[ -n $dry_run ]] || command -v gcloud >/dev/null || die "gcloud must be on PATH: install the Google Cloud CLI"
}

tpu() {  # GROUP COMMAND ARGUMENT...: gcloud compute tpus; with --dry_run it is only printed
    set -- gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_workers() {  # COMMAND: a line for the shell of every worker, all at once; fails if it fails on one
    tpu tpu-vm ssh "$name" --worker=all --command="$1"
}

quoted() {  # TEXT: one word for any shell
    printf '%s\n' "$1" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/"
}

worker() {  # VERB ARGUMENT...: worker.sh on every worker; each argument arrives there as it is here
    local argument line="${environment}bash instructgpt_jax/launch/worker.sh"
    for argument in "$@"; do
        line+=" $(quoted "$argument")"
    done
    on_workers "$line"
}
