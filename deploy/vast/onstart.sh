#!/bin/sh
# On-start script for Vast.ai's ssh and jupyter launch modes, which replace the image's entry. (In the entrypoint mode nothing of
# this is needed: the image starts itself.) In the template: sh /opt/voxfleet/onstart.sh
#
# Starts one worker a card in the background and starts it again when it fails, ever more slowly. A worker that was drained
# ends with 0 and is left alone; one with a bad configuration is not tried again. Runs at every start of the instance, also
# after it was outbid and comes back.
#
# Who keeps the worker holds a lock on STATE, and the worker one on STATE.worker: both end with their processes, however those
# end. The files outlive the instance, and process numbers in a container are small and come again, so neither says anything.
set -eu

LOG=${VOXFLEET_LOG:-/var/log/voxfleet.log}
# The disk cannot grow: beyond so many bytes the log becomes LOG.1, and the one before is lost.
LOG_MAX=${VOXFLEET_LOG_MAX:-16777216}
STATE=${VOXFLEET_STATE:-/run/voxfleet-onstart}
ENTRY=${VOXFLEET_ENTRY:-voxfleet-entry}
# The longest pause between two tries, in s.
PAUSE_MAX=${VOXFLEET_PAUSE_MAX:-60}
case $PAUSE_MAX in *[!0-9]* | '') PAUSE_MAX=60 ;; esac
export VOXFLEET_CACHE="${VOXFLEET_CACHE:-/var/cache/voxfleet}"
export VOXFLEET__WORKER__PROVIDER="${VOXFLEET__WORKER__PROVIDER:-vast_ai}"

# What is written between the copy and the cut is lost: a few lines. Writers append, so they go on at the beginning.
bound_log() {
    [ -f "$LOG" ] && [ "$(wc -c <"$LOG" 9>&-)" -gt "$LOG_MAX" ] || return 0
    # On a full disk the copy is what goes.
    tail -c "$LOG_MAX" "$LOG" >"$LOG.1" 2>/dev/null 9>&- || rm -f "$LOG.1" 9>&-
    : >"$LOG"
}

# nap SECONDS: ends early when a signal comes. Nobody but the keeper may have its lock, so it is closed for every command.
nap() {
    bound_log
    sleep "$1" 9>&- &
    wait $! || :
}

keep() {
    pause=1
    child=
    trap '[ -z "$child" ] || kill "$child" 2>/dev/null || :; stopping=1' TERM INT
    stopping=
    while [ -z "$stopping" ]; do
        # A keeper that was killed leaves its worker behind; two would share the cards.
        flock -n "$STATE.worker" true 9>&- || echo "onstart: waiting for the end of a worker that was here before"
        began=$(date +%s 9>&-)
        # shellcheck disable=SC2086 # a list of arguments
        flock -F "$STATE.worker" "$ENTRY" worker ${VOXFLEET_WORKER_ARGS:---all-gpus} 9>&- &
        child=$!
        # A shell cannot wait and look after the log at once. Its child's number is nobody else's until the shell has heard of the end.
        while [ -z "$stopping" ] && kill -0 "$child" 2>/dev/null; do nap 2; done
        # When stopping, the worker takes its time to hand over.
        code=0
        wait "$child" || code=$?
        [ -z "$stopping" ] || break
        case $code in
            0) echo "onstart: the worker was drained and is done"; return ;;
            64) echo "onstart: bad configuration (exit code $code), not trying again"; return ;;
        esac
        # One that ran for a while has earned a quick start.
        [ $(($(date +%s 9>&-) - began)) -lt 60 ] || pause=1
        echo "onstart: the worker ended with $code, again in $pause s"
        nap "$pause"
        pause=$((pause * 2))
        [ "$pause" -le "$PAUSE_MAX" ] || pause=$PAUSE_MAX
    done
    echo "onstart: stopped"
}

if [ "${1:-}" = --keep ]; then # what this script starts itself with, the lock in its hands
    echo $$ >"$STATE"
    keep
    : >"$STATE"
    exit
fi
exec 9>>"$STATE"
held=0
flock -n 9 || held=$?
case $held in
    0) ;;
    1)
        echo "onstart: running already, log in $LOG" >&2
        exit 0
        ;;
    *)
        echo "onstart: no lock on $STATE (flock ends with $held), so no worker is started" >&2
        exit 70
        ;;
esac
# Its own session: what started this script ends, and the worker stays.
setsid sh "$0" --keep >>"$LOG" 2>&1 </dev/null &
echo "onstart: worker started, log in $LOG" >&2
