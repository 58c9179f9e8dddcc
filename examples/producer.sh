#!/bin/sh
# A producer in shell: raw PCM (16 kHz, mono, signed 16 bit, little endian) into voxfleet with the plain `nats` CLI.
#
#   sh examples/producer.sh call.raw               as one chunk
#   sh examples/producer.sh --live call.raw [ID]   as a microphone would: 200 ms chunks at real time
#
# NATS_URL names the server. Watch from another shell: nats sub 'asr.v1.transcript.session.*.final'
set -eu

if [ "${1:-}" != --live ]; then
    # The three lines. The whole file is one chunk, so it must fit into the largest message that ASR_AUDIO takes, headers
    # counted: the server's max_payload less 16 KiB, with our server files 130 s.
    session=call-$(date +%s)
    nats pub --jetstream --force-stdin --no-templates -H Asr-End:1 "asr.v1.audio.$session" <"$1"
    echo "session $session"
    exit
fi

file=$2
session=${3:-call-$(date +%s)}
source=$(date +%s)-$$ # new for each start, so that a restarted producer is not taken for its own echo
bytes=6400            # 200 ms
total=$(wc -c <"$file")
seq=0

# Every chunk waits for JetStream's word that it is stored. What was not acknowledged is sent again under the same
# message id, so that a chunk that did arrive is stored once.
publish() {
    tries=0
    until nats pub --jetstream --force-stdin --no-templates "$@" -H "Asr-Source:$source" -H "Asr-Seq:$seq" \
        -H "Nats-Msg-Id:$session:$source:$seq" "asr.v1.audio.$session" <"$chunk" 2>"$chunk.log"; do
        cat "$chunk.log" >&2
        tries=$((tries + 1))
        [ "$tries" -lt 10 ] || { echo "chunk $seq was not acknowledged" >&2; exit 1; }
        sleep 1
    done
}

chunk=$(mktemp)
trap 'rm -f "$chunk" "$chunk.log"' EXIT
while [ $((seq * bytes)) -lt "$total" ]; do
    dd if="$file" of="$chunk" bs=$bytes skip=$seq count=1 2>/dev/null
    sleep 0.2 & # the pace runs beside the publish, not after it
    if [ $(((seq + 1) * bytes)) -lt "$total" ]; then
        publish
    else
        publish -H Asr-End:1 # on the last chunk: the CLI sends nothing for an empty standard input
    fi
    seq=$((seq + 1))
    wait
done
echo "session $session: $seq chunks"
