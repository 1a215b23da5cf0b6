# shellcheck shell=bash
# What the scripts beside it share; sourced by them, never run.

name="" zone="" project="" dry_run="" environment="" variables=()
tool=gcloud tool_is="the Google Cloud CLI"  # what must be on PATH, and what to install for it

die() {
    echo "error: $*" >&2
    exit 1
}

usage() {  # the comment at the head of the script
    sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$0"
    exit 0
}

flags() {  # OWN ARGUMENT...: sets the variable of each flag up to --, and `used`, the number of arguments until there
    # OWN: the flags of one script: `name=` has a value, `name` none, `env+=` may come again, `--` is the last
    local known=" name= zone= project= dry_run $1 " given=$(($# - 1)) value
    shift
    while (($#)); do
        if [[ $1 == --help || $1 == -h ]]; then
            usage
        elif [[ $1 == -- && $known == *" -- "* ]]; then
            shift && break
        elif [[ $1 == --env=[A-Za-z_]*=* && $known == *" env+= "* ]]; then
            environment+="env $(quoted "${1#*=}") "
            variables+=("${1#*=}")
        elif [[ $1 =~ ^--([a-z_]+)(=|$) && $known == *" ${BASH_REMATCH[1]}${BASH_REMATCH[2]} "* ]]; then
            value=yes
            [[ $1 != *=* ]] || value=${1#*=}
            printf -v "${BASH_REMATCH[1]}" %s "$value"
        else
            die "unknown argument $1; a flag is written --flag=value, --help lists them"
        fi
        shift
    done
    # shellcheck disable=SC2034  # the scripts that have `--` read it
    used=$((given - $#))
}

need() {  # FLAG...: those that must have been given
    local flag
    for flag in "$@"; do
        [[ -n "${!flag}" ]] || die "--$flag must be given; --help shows an example"
    done
    [[ -n $dry_run ]] || command -v "$tool" >/dev/null || die "$tool must be on PATH: install $tool_is"
}

do_or_print() {  # COMMAND ARGUMENT...: with --dry_run it is only printed
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

need_run() {  # FLAG...: those of instructgpt_jax.main name a configuration of this checkout and a workdir that outlives machines
    local argument config="" workdir=""
    for argument in "$@"; do
        case $argument in
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
        esac
    done
    [[ -n $config ]] || die "--config=FILE must be given, after --; --help shows an example"
    # shellcheck disable=SC2154  # `here` is the folder of the script that sources this
    [[ -e $here/../${config%%:*} ]] || die "--config must be a file of this checkout, got $config"
    [[ $workdir == gs://* || $workdir == /* ]] || die "--workdir must be gs://… (or an absolute path on storage that all \
workers share), after --, got '$workdir'; a worker's own disk goes with its machine"
}

tpu() {  # GROUP COMMAND ARGUMENT...: gcloud compute tpus
    do_or_print gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
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
