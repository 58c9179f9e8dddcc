#!/bin/sh
# /usr/local/bin/voxfleet-health UNIT: asks a process of this machine whether it is alive, and starts its unit again when three tries,
# 30 s apart, were each taken by somebody who then said nothing for 10 s. A dead process systemd starts again by itself; this is for
# one that is there and answers nobody.
#
# Whatever else goes wrong is told in the journal and mended by no restart: nobody listens there (HTTP is off, its port is taken, its
# token or certificate cannot be read; the process works on without it), a certificate that is not trusted, an answer that is none.
# Whether work progresses is another question: `voxfleet health --ready`, alerts.
#
# Started by the timers voxfleet-dispatcher-health, voxfleet-worker-health@ and nats-server-health, with in the environment
#   VOXFLEET_HEALTH_URL   where to ask: http://127.0.0.1:9480; https://NAME:9480 with a name of its certificate where it speaks TLS.
#                         One with a path is asked as it stands
#   VOXFLEET_HEALTH_CA    certificates to trust in place of the system's
set -eu

[ $# -eq 1 ] || {
    echo "voxfleet-health: which UNIT?" >&2
    exit 64
}
unit=$1
url=${VOXFLEET_HEALTH_URL:-}
[ -n "$url" ] || {
    echo "voxfleet-health: VOXFLEET_HEALTH_URL says where $unit serves HTTP; a worker serves it with VOXFLEET__WORKER__HTTP__LISTEN" >&2
    exit 64
}
wait=${VOXFLEET_HEALTH_WAIT_S:-10}
set -- --at "$url" --timeout "$wait"
[ -z "${VOXFLEET_HEALTH_CA:-}" ] || set -- "$@" --ca "$VOXFLEET_HEALTH_CA"

# One that was stopped, or has drained, is to stay away.
systemctl is-active --quiet "$unit" || exit 0
for try in 1 2 3; do
    [ "$try" = 1 ] || sleep "${VOXFLEET_HEALTH_PAUSE_S:-30}"
    code=0
    # Twice as long as it gives itself: then it hangs too, and says nothing of whom it asks.
    timeout $((wait * 2)) voxfleet health "$@" >/dev/null || code=$?
    case $code in
        0) exit 0 ;;
        75) echo "voxfleet-health: $unit took the question at $url and has not answered for $wait s (try $try of 3)" >&2 ;;
        *)
            echo "voxfleet-health: $unit is not known to be alive at $url ($code, see above); that is not mended by a restart" >&2
            exit 1
            ;;
    esac
done
echo "voxfleet-health: $unit is started again" >&2
exec systemctl try-restart "$unit"
