#!/bin/sh
# RunPod's container start command, for a template whose image is voxfleet:cuda:
#   /opt/voxfleet/start.sh
# (or nothing, with the same environment: the image's own entry does the rest). Chooses the disk for the models and hands over.
#
# A spot pod hears SIGTERM and is killed 5 s later. The worker is what this script becomes, so it hears it at once, and with
# provider runpod it keeps within 4.5 s.
set -eu

# The volume outlives a stopped pod, the container's own disk does not; a network volume is shared by pods of its data centre.
if [ -z "${VOXFLEET_CACHE_FIXED:-}" ]; then
    for volume in "${RUNPOD_VOLUME:-/workspace}" /runpod-volume; do
        if [ -d "$volume" ] && { [ -w "$volume" ] || [ "$(id -u)" = 0 ]; }; then
            export VOXFLEET_CACHE="$volume/voxfleet"
            break
        fi
    done
fi
echo "start: models in ${VOXFLEET_CACHE:-the default cache}" >&2
export VOXFLEET__WORKER__PROVIDER="${VOXFLEET__WORKER__PROVIDER:-runpod}"
[ $# -gt 0 ] || set -- worker --all-gpus
exec "${VOXFLEET_ENTRY:-voxfleet-entry}" "$@"
