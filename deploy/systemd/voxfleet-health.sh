#!/bin/sh
# /usr/local/bin/voxfleet-health UNIT ADDRESS: asks a process of this machine whether it is alive, and starts its unit again when three
# tries, 30 s apart and of 10 s at most each, had no answer. A dead process systemd starts again by itself; this is for one that is
# there and answers nobody. Whether work progresses is another question, and no restart answers it: `voxfleet health --ready`, alerts.
#
# Started by voxfleet-dispatcher-health.timer and voxfleet-worker-health@.timer. ADDRESS is what the process listens on
# (dispatcher.http.listen, worker.http.listen), or a whole URL where it speaks TLS.
set -eu

[ $# -eq 2 ] && [ -n "$2" ] || {
    echo "voxfleet-health: UNIT and ADDRESS are needed; a worker has one with VOXFLEET__WORKER__HTTP__LISTEN in its environment file" >&2
    exit 64
}
unit=$1
case $2 in
    http://* | https://*) url=$2 ;;
    0.0.0.0:*) url=http://127.0.0.1:${2##*:} ;;
    '[::]:'*) url="http://[::1]:${2##*:}" ;;
    *) url=http://$2 ;;
esac

# One that was stopped, or has drained, is to stay away.
systemctl is-active --quiet "$unit" || exit 0
for try in 1 2 3; do
    [ "$try" = 1 ] || sleep "${VOXFLEET_HEALTH_PAUSE_S:-30}"
    if timeout 10 voxfleet health --at "$url" >/dev/null; then exit 0; fi
    echo "voxfleet-health: $unit does not answer at $url (try $try of 3)" >&2
done
echo "voxfleet-health: $unit is started again" >&2
exec systemctl try-restart "$unit"
