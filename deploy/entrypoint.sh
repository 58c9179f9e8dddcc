#!/bin/sh
# What the images start, and what rented machines start by hand (as /usr/local/bin/voxfleet-entry):
#
#   voxfleet-entry worker [--all-gpus | --gpu N] [flags]    becomes the worker
#   voxfleet-entry dispatcher [flags]                       becomes the dispatcher
#   voxfleet-entry health                                   exit code 0 while the worker or dispatcher of this container is alive
#   voxfleet-entry /a/script [arguments]                    becomes that script: what a provider gives as start command
#   voxfleet-entry anything else                            becomes `voxfleet anything else`
#
# Settings are voxfleet's own (VOXFLEET__NATS__URLS, VOXFLEET__WORKER__SLOTS, ...). Beyond them, for templates that can hand
# over nothing but environment variables:
#
#   VOXFLEET_MODELS             names, separated by spaces or commas. The first is what sessions get that name none, unless
#                               VOXFLEET__WORKER__DEFAULT_MODEL says otherwise. What is not here yet the worker fetches beside
#                               its work (worker.prefetch), says so in its heartbeats, and serves as soon as it is there
#   VOXFLEET_CREDS_BASE64       a NATS credentials file; VOXFLEET_CREDS is the same as it is
#   VOXFLEET_NKEY_SEED          an nkey seed
#   VOXFLEET_TLS_CA_BASE64      the certificate of a private authority; VOXFLEET_TLS_CA is the same as it is
#   VOXFLEET_HEALTH_URL         where `health` asks, if it cannot be known from ...HTTP__LISTEN: https://localhost:9480
#   VOXFLEET_HEALTH_CA          certificates to trust there in place of the system's
#
# Invariants: what it starts replaces it, so signals arrive and exit codes come back; no network is asked before. As root it
# hands itself to the user voxfleet where there is one (VOXFLEET_KEEP_ROOT=1 keeps root). Secrets leave the environment before
# voxfleet starts.
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

models() {
    # A star is a name that does not exist, and no list of files.
    set -f
    # shellcheck disable=SC2046 # names hold no spaces
    set -- $(printf '%s' "${VOXFLEET_MODELS:-}" | tr ',' ' ')
    set +f
    [ $# -gt 0 ] || return 0
    export VOXFLEET__WORKER__DEFAULT_MODEL="${VOXFLEET__WORKER__DEFAULT_MODEL:-$1}"
    cache_=${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/voxfleet}
    folder_=${VOXFLEET__WORKER__MODELS_DIR:-${VOXFLEET__MODELS__DIR:-$cache_/models}}
    list_=${VOXFLEET__WORKER__PREFETCH:-}
    for name_ in "$@"; do
        # One that lies in the folder needs nobody to bring it, and may be in no catalog.
        [ -r "$folder_/$name_.bin" ] || list_="$list_${list_:+,}$name_"
    done
    [ -z "$list_" ] || export VOXFLEET__WORKER__PREFETCH="$list_"
}

# ---------------------------------------------------------------------------------------------- health

# here ADDRESS: where to ask whoever listens there, from inside.
here() {
    case $1 in
        0.0.0.0:*) echo "http://127.0.0.1:${1##*:}" ;;
        '[::]:'*) echo "http://[::1]:${1##*:}" ;;
        *) echo "http://$1" ;;
    esac
}

# ---------------------------------------------------------------------------------------------- verbs

[ $# -gt 0 ] || set -- worker
case $1 in
    /*) exec "$@" ;;
    health)
        # Whether it is alive, not whether NATS is: starting a container again brings no server back. Either runs here, so
        # whichever answers is meant.
        if [ -n "${VOXFLEET_HEALTH_URL:-}" ]; then
            set -- --at "$VOXFLEET_HEALTH_URL" --timeout 8
            [ -z "${VOXFLEET_HEALTH_CA:-}" ] || set -- "$@" --ca "$VOXFLEET_HEALTH_CA"
            exec voxfleet health "$@"
        fi
        voxfleet health --at "$(here "${VOXFLEET__WORKER__HTTP__LISTEN:-127.0.0.1:9481}")" --timeout 4 2>/dev/null && exit 0
        exec voxfleet health --at "$(here "${VOXFLEET__DISPATCHER__HTTP__LISTEN:-127.0.0.1:9480}")" --timeout 4
        ;;
    worker)
        drop_root "$@"
        check_cache
        secrets
        models
        ;;
    dispatcher)
        drop_root "$@"
        secrets
        # What many short sessions leave in one heap does not pile up in others, as in the unit.
        export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"
        ;;
    *)
        drop_root "$@"
        secrets
        ;;
esac
exec voxfleet "$@"
