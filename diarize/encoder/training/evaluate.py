"""How well the encoder tells speakers apart that it was never trained on, and how fast it is.

    python evaluate.py --encoder ../encoder.onnx --data DATA --calls ../../../tests/audio [--json out.json]

DATA is the folder with digits/ and diarization/ami30 (see MODEL_CARD.md). Sets: `digits` (takes of a speaker joined until they
are long enough, 8 kHz), `ami same clip` and `ami across` (single-speaker stretches of far-field meetings, pairs within a clip
and between clips), `calls` (the seven voices of the test calls, turns from all calls, pairs from all calls; `calls same
call` within one). Beside the encoder stand two baselines: mean and deviation of each mel band (which knows the microphone, as the encoder cannot:
its input is mean-free), and the deviation alone (which has the encoder's input); both standardised over the set.
Intervals: bootstrap over pieces (drawn with replacement, pairs of a piece with itself left out), 95 %.
"""
import argparse
import glob
import json
import os
import time

import numpy as np
import onnxruntime
import soundfile
import soxr

from fbank_reference import fbank

RATE = 16000
LENGTHS = (1.0, 1.5, 2.0, 3.0)


def read(path):
    x, rate = soundfile.read(path)
    x = x[:, 0] if x.ndim > 1 else x
    return (soxr.resample(x, rate, RATE) if rate != RATE else x) * 32768


def digits(folder, seconds):
    rng = np.random.default_rng(5)
    pieces = []
    for who in ("george", "jackson", "lucas", "nicolas"):
        takes = sorted(glob.glob(f"{folder}/digits/*_{who}_*.wav"))
        rng.shuffle(takes)
        have, made = np.zeros(0), 0
        for t in takes:
            have = np.concatenate([have, read(t)])
            if len(have) >= seconds * RATE:
                pieces.append((who, "digits", have[:int(seconds * RATE)]))
                have, made = np.zeros(0), made + 1
            if made == 40:
                break
    return pieces


def stretches(path, clip):
    """(speaker, start, end) where nobody else speaks."""
    turns = [(p[7], float(p[3]), float(p[3]) + float(p[4])) for p in (line.split() for line in open(path)) if p and p[1] == clip]
    edges = sorted({t for _, a, b in turns for t in (a, b)})
    out = []
    for a, b in zip(edges, edges[1:]):
        who = {w for w, s, e in turns if s < b and e > a}
        if len(who) == 1:
            w = who.pop()
            if out and out[-1][0] == w and abs(out[-1][2] - a) < 1e-6:
                out[-1] = (w, out[-1][1], b)
            else:
                out.append((w, a, b))
    return out


def cut(x, who, clip, a, b, seconds):
    n, out = int(seconds * RATE), []
    for k in range(int((b - a) / seconds + 1e-6)):
        at = int(a * RATE) + k * n
        if at + n <= len(x):
            out.append((who, clip, x[at:at + n]))
    return out


def ami(folder, seconds):
    out = []
    for path in sorted(glob.glob(f"{folder}/diarization/ami30/*.wav")):
        clip = os.path.basename(path)[:-4]
        x = read(path)
        for who, a, b in stretches(f"{folder}/diarization/ami30/reference.rttm", clip):
            out += cut(x, who, clip, a, b, seconds)
    return out


def calls(folder, seconds):
    out = []
    for path in sorted(glob.glob(f"{folder}/call-0?.json")):
        call, clip = json.load(open(path)), os.path.basename(path)[:-5]
        x = read(path[:-5] + ".flac")
        for t in call["turns"]:
            if any(o is not t and o["start"] < t["end"] and o["end"] > t["start"] for o in call["turns"]):
                continue
            out += cut(x, t["voice"], clip, t["start"], t["end"], seconds)
    return out


def equal_error(scores, same, weight):
    order = np.argsort(-scores, kind="stable")
    s, w = same[order], weight[order]
    miss = 1 - np.cumsum(w * s) / (w * s).sum()
    false = np.cumsum(w * ~s) / (w * ~s).sum()
    k = np.argmin(np.abs(miss - false))
    return (miss[k] + false[k]) / 2


def rate(embeddings, pieces, pairs, draws=300):
    """Equal error of all pairs that `pairs` allows, with its interval and the distribution of the cosines."""
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    who, clip = np.array([p[0] for p in pieces]), np.array([p[1] for p in pieces])
    i, j = np.triu_indices(len(e), 1)
    ok = pairs(clip[i], clip[j])
    i, j = i[ok], j[ok]
    scores, same = (e @ e.T)[i, j], who[i] == who[j]
    if same.sum() < 20 or (~same).sum() < 20:
        return None
    rng, boot = np.random.default_rng(0), []
    for _ in range(draws):
        c = np.bincount(rng.integers(0, len(e), len(e)), minlength=len(e))
        w = (c[i] * c[j]).astype(float)
        if (w * same).sum() and (w * ~same).sum():
            boot.append(equal_error(scores, same, w))
    q = lambda v: [round(float(a), 3) for a in np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95])]
    return {"eer": round(100 * equal_error(scores, same, np.ones(len(scores))), 2),
            "interval": [round(100 * float(v), 2) for v in np.quantile(boot, [0.025, 0.975])],
            "pieces": len(e), "same": int(same.sum()), "different": int((~same).sum()),
            "cosine_same": q(scores[same]), "cosine_different": q(scores[~same])}


def whole_turns(net, folder):
    """Average-linkage clusters of the reference turns of each call: at which cosines there are two, and pure."""
    from scipy.cluster.hierarchy import fcluster, linkage
    for path in sorted(glob.glob(f"{folder}/call-0?.json")):
        x, turns, e = read(path[:-5] + ".flac"), json.load(open(path))["turns"], []
        for t in turns:
            f = fbank(x[int(t["start"] * RATE):int(t["end"] * RATE)])
            v = net.run(["embs"], {"feats": (f - f.mean(0))[None].astype(np.float32)})[0][0]
            e.append(v / np.linalg.norm(v))
        who = np.array([t["voice"] for t in turns])
        tree, right = linkage(np.array(e), "average", metric="cosine"), []
        for at in np.arange(0.05, 0.8, 0.05):
            label = fcluster(tree, 1 - at, "distance")
            if len(set(label)) == len(set(who)) and all(len(set(who[label == c])) == 1 for c in set(label)):
                right.append(float(at))
        shown = f"cosine {right[0]:.2f} to {right[-1]:.2f}" if right else "none"
        print(f"{os.path.basename(path)[:-5]}: {len(turns)} whole turns, clusters exactly the speakers at: {shown}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--encoder", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--calls", required=True)
    ap.add_argument("--json")
    ap.add_argument("--draws", type=int, default=300)
    args = ap.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    net = onnxruntime.InferenceSession(args.encoder, options, providers=["CPUExecutionProvider"])
    everywhere, within, across = (lambda a, b: np.full(len(a), True)), (lambda a, b: a == b), (lambda a, b: a != b)
    rows = []
    print("set              s    pieces  encoder EER %            mean+deviation EER %     deviation EER %   pairs same  different   cosine same 5/50/95 %      cosine different 5/50/95 %")
    for seconds in LENGTHS:
        for maker, where, sets in ((digits, args.data, [("digits", everywhere)]),
                                   (ami, args.data, [("ami same clip", within), ("ami across", across)]),
                                   (calls, args.calls, [("calls", everywhere), ("calls same call", within)])):
            pieces = maker(where, seconds)
            feats = [fbank(p[2]) for p in pieces]
            embeddings = np.concatenate([net.run(["embs"], {"feats": (f - f.mean(0))[None].astype(np.float32)})[0] for f in feats])
            base = np.stack([np.concatenate([f.mean(0), f.std(0)]) for f in feats])
            base = (base - base.mean(0)) / base.std(0)
            for name, pairs in sets:
                bare = rate(base[:, 80:], pieces, pairs, 20)
                ours, other = rate(embeddings, pieces, pairs, args.draws), rate(base, pieces, pairs, args.draws)
                if ours is None:
                    continue
                rows.append({"set": name, "seconds": seconds, **ours, "deviation_eer": bare["eer"] if bare else None, "baseline_eer": other["eer"], "baseline_interval": other["interval"]})
                s, d = ours["cosine_same"], ours["cosine_different"]
                print(f"{name:16} {seconds:3.1f}  {ours['pieces']:4}    {ours['eer']:5.2f} [{ours['interval'][0]:5.2f}, {ours['interval'][1]:5.2f}]"
                      f"     {other['eer']:5.2f} [{other['interval'][0]:5.2f}, {other['interval'][1]:5.2f}]         {bare['eer']:5.2f}        {ours['same']:5}      {ours['different']:5}  "
                      f"     {s[0]:5.2f} {s[2]:5.2f} {s[4]:5.2f}        {d[0]:5.2f} {d[2]:5.2f} {d[4]:5.2f}", flush=True)
    whole_turns(net, args.calls)
    speed = {}
    for seconds in (1.5, 10):
        x = np.random.default_rng(0).standard_normal((1, int(seconds * 100), 80)).astype(np.float32)
        times = []
        for _ in range(40):
            begun = time.process_time()
            net.run(["embs"], {"feats": x})
            times.append(time.process_time() - begun)
        speed[str(seconds)] = round(1000 * float(np.median(times)) / seconds, 2)
        print(f"pieces of {seconds} s: {speed[str(seconds)]} ms of one core per second of audio")
    if args.json:
        json.dump({"rows": rows, "ms_per_second": speed}, open(args.json, "w"), indent=1)


if __name__ == "__main__":
    main()
