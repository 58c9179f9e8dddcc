#!/bin/sh
# On-start script for Vast.ai's ssh and jupyter launch modes, which replace the image's entry. (In the entrypoint mode nothing of
# this is needed: the image starts itself.) In the template: sh /opt/voxfleet/onstart.sh
#
# Starts one worker a card in the background and starts it again when it fails, ever more slowly. A worker that was drained
# ends with 0 and is left alone; one with a bad configuration is not tried again. Runs at every start of the instance, also
# after it was outbid and comes back.
set -eu

LOG=${VOXFLEET_LOG:-/var/log/voxfleet.log}
STATE=${VOXFLEET_STATE:-/run/voxfleet-onstart}
ENTRY=${VOXFLEET_ENTRY:-voxfleet-entry}
# The longest pause between two tries, in s.
PAUSE_MAX=${VOXFLEET_PAUSE_MAX:-60}
export VOXFLEET_CACHE="${VOXFLEET_CACHE:-/var/cache/voxfleet}"
export VOXFLEET__WORKER__PROVIDER="${VOXFLEET__WORKER__PROVIDER:-vast_ai}"

keep() {
    pause=1
    child=
    trap '[ -z "$child" ] || kill "$child" 2>/dev/null || :; stopping=1' TERM INT
    stopping=
    while [ -z "$stopping" ]; do
        began=$(date +%s)
        # shellcheck disable=SC2086 # a list of arguments
        "$ENTRY" worker ${VOXFLEET_WORKER_ARGS:---all-gpus} &
        child=$!
        code=0
        wait "$child" || code=$?
        # The first wait ends with the trap; the worker itself takes its time to hand over.
        if [ -n "$stopping" ]; then
            wait "$child" 2>/dev/null || :
            break
        fi
        case $code in
            0) echo "onstart: the worker was drained and is done"; return ;;
            2 | 64) echo "onstart: bad configuration (exit code $code), not trying again"; return ;;
        esac
        # One that ran for a while has earned a quick start.
        [ $(($(date +%s) - began)) -lt 60 ] || pause=1
        echo "onstart: the worker ended with $code, again in $pause s"
        sleep "$pause"
        pause=$((pause * 2))
        [ "$pause" -le "$PAUSE_MAX" ] || pause=$PAUSE_MAX
    done
    echo "onstart: stopped"
}

if [ -f "$STATE" ] && kill -0 "$(cat "$STATE")" 2>/dev/null; then
    echo "onstart: running already as process $(cat "$STATE")" >&2
    exit 0
fi
# Its own session: what started this script ends, and the worker stays.
if [ "${1:-}" = --keep ]; then
    echo $$ >"$STATE"
    keep
    rm -f "$STATE"
else
    setsid sh "$0" --keep >>"$LOG" 2>&1 </dev/null &
    echo "onstart: worker started, log in $LOG" >&2
fi
