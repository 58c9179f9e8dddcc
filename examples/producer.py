#!/usr/bin/env python3
"""A producer in Python: streams a file as a microphone would, then prints the finals.

    pip install nats-py
    python examples/producer.py call.wav                       16-bit WAV, any rate, any number of channels
    python examples/producer.py call.raw --format 'pcm_s16le;rate=16000;channels=1'

Two rules make a producer safe: wait for JetStream's ack before the next chunk, and send what was not acknowledged
again under the same message id. Then nothing acknowledged is lost, and nothing is stored twice.
"""
import argparse
import asyncio
import json
import sys
import time
import uuid
import wave

import nats
from nats.errors import Error as NatsError

CHUNK_S = 0.2


def load(path, declared):
    """The file's bytes, its Asr-Format, and how many bytes a second of it takes."""
    if path.endswith(".wav"):
        with wave.open(path) as w:
            if w.getsampwidth() != 2:
                sys.exit(f"{path}: only 16-bit WAV here; convert it, or send it as a job")
            rate, channels, audio = w.getframerate(), w.getnchannels(), w.readframes(w.getnframes())
        return audio, f"pcm_s16le;rate={rate};channels={channels}", rate, 2 * channels
    encoding, *params = declared.split(";")
    values = dict(p.split("=") for p in params)
    width = {"pcm_s16le": 2, "pcm_f32le": 4}[encoding]
    with open(path, "rb") as f:
        return f.read(), declared, int(values["rate"]), width * int(values["channels"])


async def publish(js, subject, payload, headers):
    """Until JetStream says that it is stored."""
    for wait_s in (0.2, 0.5, 1, 2, 5, 5, 5):
        try:
            return await js.publish(subject, payload, headers=headers, timeout=2)
        except NatsError as e:
            print(f"chunk {headers['Asr-Seq']}: {e!r}, sending it again", file=sys.stderr)
            await asyncio.sleep(wait_s)
    return await js.publish(subject, payload, headers=headers, timeout=10)


async def main():
    p = argparse.ArgumentParser(description="Streams a file into voxfleet and prints the transcript.")
    p.add_argument("file", help=".wav (16 bit), or raw PCM as --format says")
    p.add_argument("--url", default="nats://127.0.0.1:4222")
    p.add_argument("--creds", help="credentials file")
    p.add_argument("--session", default=f"py-{uuid.uuid4().hex[:12]}")
    p.add_argument("--format", default="pcm_s16le;rate=16000;channels=1")
    p.add_argument("--speed", type=float, default=1.0, help="times real time")
    p.add_argument("--no-finals", action="store_true", help="send only")
    p.add_argument("--timeout", type=float, default=60.0, help="seconds without a final before giving up")
    args = p.parse_args()

    audio, audio_format, rate, frame = load(args.file, args.format)
    step = max(1, int(rate * CHUNK_S)) * frame  # whole frames
    chunks = [audio[i : i + step] for i in range(0, len(audio), step)]
    source = uuid.uuid4().hex[:16]  # new for each start
    subject = f"asr.v1.audio.{args.session}"

    options = {"user_credentials": args.creds} if args.creds else {}
    nc = await nats.connect(args.url, ping_interval=2, max_outstanding_pings=3, **options)
    js = nc.jetstream()

    started = time.monotonic()
    for seq, chunk in enumerate(chunks + [b""]):  # an empty chunk may end a session
        headers = {"Asr-Source": source, "Asr-Seq": str(seq), "Nats-Msg-Id": f"{args.session}:{source}:{seq}"}
        if seq == 0:
            headers["Asr-Format"] = audio_format
        if not chunk:
            headers["Asr-End"] = "1"
        due = started + min(seq + 1, len(chunks)) * CHUNK_S / args.speed  # a chunk is ready when its last sample is
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await publish(js, subject, chunk, headers)
    print(f"session {args.session}: {len(chunks)} chunks acknowledged", file=sys.stderr)

    if not args.no_finals:
        # The finals are a log too: reading them after sending misses none.
        finals = await js.subscribe(
            f"asr.v1.transcript.session.{args.session}.final", stream="ASR_TRANSCRIPT", ordered_consumer=True
        )
        while True:
            try:
                final = json.loads((await finals.next_msg(timeout=args.timeout)).data)
            except nats.errors.TimeoutError:
                sys.exit(f"no final within {args.timeout:g} s")
            for s in final.get("segments", []):
                print(f"{s['start_ms'] / 1000:8.2f} {s['end_ms'] / 1000:8.2f}  {s['text'].strip()}")
            if final.get("error"):
                print(f"final {final['index']}: {final['error']}", file=sys.stderr)
            if final.get("end"):
                break
    await nc.drain()


asyncio.run(main())
