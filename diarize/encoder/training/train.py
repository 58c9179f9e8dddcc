"""Train the encoder by the clock: additive angular margin over all speakers of the corpus.

    python train.py --corpus corpus --out run --minutes 15 [--resume run0/encoder.pt] [--lr 2e-3] [--parts espeak real ...]

OUT/encoder.pt holds the moving average of the weights, the head and the names of the speakers; a second sitting takes both
over and makes new rows for new speakers. Speakers of some bases are kept out, to watch: see `kept_out`.
"""
import argparse
import json
import math
import os
import time
import zlib

import numpy as np
import torch
from torch import nn

from augment import Channel
from features import fbank
from network import Encoder

RATE = 16000
WEIGHT = {"real": 0.3, "festival": 0.2, "flite": 0.06, "kokoro": 0.24, "espeak": 0.2}


def kept_out(base):
    """One base in twenty of the synthetic ones, and one festival voice with all that was made of it."""
    return base == "festival-czech_machac" or (not base.startswith("real") and zlib.crc32(base.encode()) % 20 == 7)


class Speech:
    """The corpus: speakers of each group, and crops of them."""

    def __init__(self, folder, parts, watch=False):
        self.groups, self.names, self.takes = {}, [], []
        number = {}
        for part in parts:
            audio = np.memmap(f"{folder}/{part}.s16", "<i2", "r")
            group = part.rstrip("0123456789")
            for line in open(f"{folder}/{part}.jsonl"):
                item = json.loads(line)
                if item["first"] + item["length"] > len(audio) or kept_out(item["base"]) != watch:
                    continue
                name = item["speaker"]
                if name not in number:
                    number[name] = len(self.names)
                    self.names.append(name)
                    self.takes.append([])
                    self.groups.setdefault(group, []).append(number[name])
                self.takes[number[name]].append((audio, item["first"], item["length"]))
        # A speaker with one short take teaches the words of it.
        for group in self.groups:
            self.groups[group] = [s for s in self.groups[group] if sum(t[2] for t in self.takes[s]) > (1.5 if group == "real" else 4) * RATE]
        total = sum(WEIGHT[g] for g in self.groups)
        self.share = [(g, WEIGHT[g] / total) for g in self.groups]

    def crop(self, rng, speaker, length):
        """`length` samples of a speaker: one place, or several takes joined."""
        parts, have = [], 0
        while have < length:
            audio, first, size = self.takes[speaker][rng.integers(len(self.takes[speaker]))]
            want = length - have
            start = rng.integers(0, max(1, size - want + 1))
            piece = audio[first + start:first + min(size, start + want)]
            parts.append(piece)
            have += len(piece)
        return np.concatenate(parts)

    def batch(self, rng, count, length):
        """Half as many draws of speakers as places in the batch: two crops each, under different channels."""
        who = []
        groups, share = [g for g, _ in self.share], [s for _, s in self.share]
        for g in rng.choice(len(groups), count // 2, p=share):
            s = self.groups[groups[g]]
            who += [s[rng.integers(len(s))]] * 2
        x = np.stack([self.crop(rng, s, length) for s in who]).astype(np.float32)
        return torch.from_numpy(x), torch.tensor(who)


def features(wave16, rng=None):
    f = fbank(wave16)
    f = f - f.mean(1, keepdim=True)
    if rng is not None:                                                  # hide some bands and times of some
        for b in range(len(f)):
            if rng.random() < 0.3:
                w = rng.integers(4, 13)
                a = rng.integers(0, 80 - w)
                f[b, :, a:a + w] = 0
            if rng.random() < 0.2:
                w = rng.integers(3, 15)
                a = rng.integers(0, f.shape[1] - w)
                f[b, a:a + w] = 0
    return f


class Head(nn.Module):
    def __init__(self, dims, speakers):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(speakers, dims) * 0.05)

    def forward(self, e, who, margin, scale):
        cos = nn.functional.normalize(e) @ nn.functional.normalize(self.weight).t()
        own = cos.gather(1, who[:, None]).clamp(-0.9999, 0.9999)
        moved = own * math.cos(margin) - (1 - own * own).sqrt() * math.sin(margin)
        return nn.functional.cross_entropy(scale * cos.scatter(1, who[:, None], moved), who)


def equal_error(scores, same):
    order = np.argsort(-scores)
    same = same[order]
    miss, false = 1 - np.cumsum(same) / same.sum(), np.cumsum(~same) / (~same).sum()
    k = np.argmin(np.abs(miss - false))
    return float((miss[k] + false[k]) / 2)


def watch(net, speech, seed=1):
    """Equal error of 2 s crops of the speakers kept out, each crop through its own channel."""
    rng, channel = np.random.default_rng(seed), Channel(seed, 100)
    torch.manual_seed(seed)
    who = [s for s in range(len(speech.names)) for _ in range(4)]
    es = []
    net.eval()
    with torch.no_grad():
        for k in range(0, len(who), 64):
            x = np.stack([speech.crop(rng, s, 2 * RATE) for s in who[k:k + 64]]).astype(np.float32)
            es.append(nn.functional.normalize(net(features(channel(torch.from_numpy(x))))))
    net.train()
    e, who = torch.cat(es), np.array(who)
    i, j = np.triu_indices(len(who), 1)
    return equal_error((e @ e.t()).numpy()[i, j], who[i] == who[j])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--corpus", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, required=True)
    ap.add_argument("--parts", nargs="+", default=["espeak", "real", "flite0", "festival0", "festival1", "kokoro0", "kokoro1"])
    ap.add_argument("--resume")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--seconds", type=float, default=200, help="audio in a batch")
    ap.add_argument("--floor", type=float, default=0.002, help="share of the learning rate left at the end")
    ap.add_argument("--margin-from", type=float, default=0.0)
    ap.add_argument("--margin", type=float, default=0.2)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    parts = [p for p in args.parts if os.path.exists(f"{args.corpus}/{p}.jsonl")]
    speech, aside = Speech(args.corpus, parts), Speech(args.corpus, parts, watch=True)
    print(len(speech.names), "speakers,", {g: len(s) for g, s in speech.groups.items()}, len(aside.names), "kept out", flush=True)
    net = Encoder()
    head = Head(160, len(speech.names))
    if args.resume:
        saved = torch.load(args.resume)
        net.load_state_dict(saved["net"])
        rows = {n: r for n, r in zip(saved["names"], saved["head"])}
        with torch.no_grad():
            for k, n in enumerate(speech.names):
                if n in rows:
                    head.weight[k] = rows[n]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0},
                                   {"params": head.parameters(), "weight_decay": 0.01}], lr=args.lr, betas=(0.9, 0.98))
    average = {k: v.clone() for k, v in net.state_dict().items()}
    channel, begun, step, shown, losses = Channel(args.seed + 17), time.time(), 0, time.time(), []
    while True:
        done = (time.time() - begun) / (60 * args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 60)
        lr = args.lr * warm * (args.floor + (1 - args.floor) * (0.5 + 0.5 * math.cos(math.pi * done)))
        for g in optimizer.param_groups:
            g["lr"] = lr
        margin = args.margin_from + (args.margin - args.margin_from) * min(1.0, max(0.0, (done - 0.2) / 0.5))
        length = int(RATE * (0.8 + 3.2 * rng.random() ** 1.5))
        count = max(16, int(args.seconds * RATE / length) // 2 * 2)
        x, who = speech.batch(rng, min(count, 160), length)
        f = features(channel(x), rng)
        with torch.autocast("cpu", torch.bfloat16):
            e = net(f)
        loss = head(e.float(), who, margin, 30.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        step += 1
        keep = min(0.995, step / (step + 20))
        with torch.no_grad():
            for k, v in net.state_dict().items():
                if v.dtype.is_floating_point:
                    average[k].lerp_(v, 1 - keep)
                else:
                    average[k].copy_(v)
        losses.append(loss.item())
        if time.time() - shown > 60 or step == 5:
            shown = time.time()
            print(f"{(shown - begun) / 60:.1f} min, step {step}, loss {np.mean(losses):.3f}, margin {margin:.2f}, lr {lr:.5f}", flush=True)
            losses = []
            torch.save({"net": average, "head": head.weight.detach(), "names": speech.names}, f"{args.out}/encoder.pt.new")
            os.replace(f"{args.out}/encoder.pt.new", f"{args.out}/encoder.pt")
    net.load_state_dict(average)
    torch.save({"net": average, "head": head.weight.detach(), "names": speech.names}, f"{args.out}/encoder.pt")
    print(f"{step} steps; equal error of speakers kept out, 2 s, through channels: {100 * watch(net, aside):.2f} %")


if __name__ == "__main__":
    main()
