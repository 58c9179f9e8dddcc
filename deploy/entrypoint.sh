#!/bin/sh
# What the images start, and what rented machines start by hand (as /usr/local/bin/voxfleet-entry):
#
#   voxfleet-entry worker [--all-gpus | --gpu N] [flags]    brings the models, then becomes the worker
#   voxfleet-entry dispatcher [flags]                       becomes the dispatcher
#   voxfleet-entry health                                   exit code 0 while `voxfleet doctor` finds nothing broken
#   voxfleet-entry /a/script [arguments]                    becomes that script: what a provider gives as start command
#   voxfleet-entry anything else                            becomes `voxfleet anything else`
#
# Settings are voxfleet's own (VOXFLEET__NATS__URLS, VOXFLEET__WORKER__SLOTS, ...). Beyond them, for templates that can hand
# over nothing but environment variables:
#
#   VOXFLEET_MODELS             names, separated by spaces or commas. The first is what sessions get that name none, unless
#                               VOXFLEET__WORKER__DEFAULT_MODEL says otherwise; the worker waits for it only. The others are
#                               fetched beside it, and a worker that is already up serves them from its next start
#   VOXFLEET_CREDS_BASE64       a NATS credentials file; VOXFLEET_CREDS is the same as it is
#   VOXFLEET_NKEY_SEED          an nkey seed
#   VOXFLEET_TLS_CA_BASE64      the certificate of a private authority; VOXFLEET_TLS_CA is the same as it is
#
# Invariants: what it starts replaces it, so signals arrive and exit codes come back. A model that cannot be had now is
# tried again ever more slowly instead of ending the container over and over. As root it hands itself to the user voxfleet
# where there is one (VOXFLEET_KEEP_ROOT=1 keeps root). Secrets leave the environment before voxfleet starts.
set -eu

say() { printf 'voxfleet-entry: %s\n' "$*" >&2; }
die() {
    code_=$1
    shift
    say "$*"
    exit "$code_"
}

# ---------------------------------------------------------------------------------------------- who we are

# Volumes of rented machines belong to root; the cache is made ours first.
drop_root() {
    [ "$(id -u)" = 0 ] && [ "${VOXFLEET_KEEP_ROOT:-0}" != 1 ] || return 0
    id -u voxfleet >/dev/null 2>&1 || return 0
    command -v setpriv >/dev/null 2>&1 || return 0
    if [ -n "${VOXFLEET_CACHE:-}" ] && mkdir -p "$VOXFLEET_CACHE" 2>/dev/null; then
        chown -R voxfleet: "$VOXFLEET_CACHE" 2>/dev/null || say "$VOXFLEET_CACHE cannot be given to the user voxfleet"
    fi
    export HOME="${VOXFLEET_HOME:-/var/lib/voxfleet}" USER=voxfleet LOGNAME=voxfleet
    # Groups stay: on some hosts they are what opens the GPU's device files.
    exec setpriv --reuid voxfleet --regid voxfleet --keep-groups --no-new-privs -- "$0" "$@"
}

# A cache that cannot be written to would fail at the first model.
check_cache() {
    [ -n "${VOXFLEET_CACHE:-}" ] || return 0
    if mkdir -p "$VOXFLEET_CACHE/models" 2>/dev/null && [ -w "$VOXFLEET_CACHE/models" ]; then return 0; fi
    for file_ in "$VOXFLEET_CACHE"/models/*.bin; do
        [ ! -r "$file_" ] || return 0 # somebody else's folder, mounted as it is: what lies there is served
    done
    other_=${HOME:-/tmp}/.cache/voxfleet
    say "$VOXFLEET_CACHE is not writable for user $(id -u), models go to $other_ and are lost with this container"
    export VOXFLEET_CACHE="$other_"
    mkdir -p "$VOXFLEET_CACHE/models"
}

# ---------------------------------------------------------------------------------------------- secrets

# secret FILE PLAIN BASE64 SETTING: writes whichever is set to a file of ours, and points the setting at it.
secret() {
    if [ -n "$3" ]; then
        text_=$(printf '%s' "$3" | base64 -d 2>/dev/null) || die 64 "the base64 text for $4 cannot be decoded"
    elif [ -n "$2" ]; then
        text_=$2
    else
        return 0
    fi
    dir_=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}/voxfleet-$(id -u)
    (
        umask 077
        mkdir -p "$dir_"
        chmod 700 "$dir_"
        printf '%s\n' "$text_" >"$dir_/.$1.$$"
        mv -f "$dir_/.$1.$$" "$dir_/$1"
    ) || die 70 "$dir_ cannot be written to, so there is no place for $4"
    export "$4=$dir_/$1"
}

secrets() {
    secret worker.creds "${VOXFLEET_CREDS:-}" "${VOXFLEET_CREDS_BASE64:-}" VOXFLEET__NATS__CREDENTIALS_FILE
    secret nkey.seed "${VOXFLEET_NKEY_SEED:-}" '' VOXFLEET__NATS__NKEY_SEED_FILE
    secret ca.pem "${VOXFLEET_TLS_CA:-}" "${VOXFLEET_TLS_CA_BASE64:-}" VOXFLEET__NATS__TLS_CA
    unset VOXFLEET_CREDS VOXFLEET_CREDS_BASE64 VOXFLEET_NKEY_SEED VOXFLEET_TLS_CA VOXFLEET_TLS_CA_BASE64
}

# ---------------------------------------------------------------------------------------------- models

CHILD=

# A shell that is process 1 hears no signal it has no trap for; while it waits for a child, a trap runs at once.
waited() {
    "$@" &
    CHILD=$!
    code_=0
    wait "$CHILD" || code_=$?
    CHILD=
    return "$code_"
}

stop() {
    [ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null || :
    exit "$1"
}

# Until it is here, or nobody knows it. Present ones cost a glance, with or without a network.
bring() {
    folder_=${VOXFLEET__WORKER__MODELS_DIR:-${VOXFLEET__MODELS__DIR:-${VOXFLEET_CACHE:-}/models}}
    # A folder mounted read-only needs nobody to bring what it holds.
    if [ -r "$folder_/$1.bin" ] && ! [ -w "$folder_" ]; then return 0; fi
    pause_=${VOXFLEET_MODEL_RETRY_S:-5}
    while :; do
        code_=0
        waited voxfleet models pull "$1" || code_=$?
        case $code_ in
            0) return 0 ;;
            2 | 64 | 66) die "$code_" "model $1: not one that can be had, see above" ;;
        esac
        say "model $1 could not be had (exit code $code_), again in $pause_ s"
        waited sleep "$pause_" || :
        pause_=$((pause_ * 2))
        [ "$pause_" -le 300 ] || pause_=300
    done
}

models() {
    # shellcheck disable=SC2046 # names hold no spaces
    set -- $(printf '%s' "${VOXFLEET_MODELS:-}" | tr ',' ' ')
    [ $# -gt 0 ] || return 0
    first_=${VOXFLEET__WORKER__DEFAULT_MODEL:-$1}
    export VOXFLEET__WORKER__DEFAULT_MODEL="$first_"
    trap 'stop 143' TERM
    trap 'stop 130' INT
    bring "$first_"
    trap - TERM INT
    rest_=
    for name_ in "$@"; do
        [ "$name_" = "$first_" ] || rest_="$rest_ $name_"
    done
    [ -n "$rest_" ] || return 0
    # Quietly beside the worker: what fails here is tried again at the next start.
    # shellcheck disable=SC2086 # names again
    nice -n 10 voxfleet models pull $rest_ >/dev/null &
}

# ---------------------------------------------------------------------------------------------- verbs

[ $# -gt 0 ] || set -- worker
case $1 in
    /*) exec "$@" ;;
    health)
        # Not waited for in the log: a health check says yes or no.
        secrets
        exec voxfleet doctor >/dev/null
        ;;
    worker)
        drop_root "$@"
        check_cache
        secrets
        models
        ;;
    *)
        drop_root "$@"
        secrets
        ;;
esac
exec voxfleet "$@"
