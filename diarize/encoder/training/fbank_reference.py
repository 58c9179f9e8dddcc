"""Write reference values of Kaldi's filterbank for the test of the Rust front end (and the encoder's own for the same input).

    python fbank_reference.py --out ../../tests/data/fbank_reference.json [--encoder ../encoder.onnx]

The input is made with integers alone, so that any language makes the same samples: see FORMULA.
"""
import argparse
import json

import kaldi_native_fbank as knf
import numpy as np

RATE, COUNT = 16000, 8000
FORMULA = (
    "8000 samples at 16 kHz, integers only, >> is an arithmetic shift (rounds down). x = 12345; a = 0; b = 32768. For n = 0..7999: "
    "x = (1664525*x + 1013904223) mod 2^32; noise = (x >> 16) - 32768 (x unsigned). "
    "a = (a + 400 + (n >> 1)) mod 65536; b = (b + 20000 - 2*n) mod 65536 (taken into 0..65535). "
    "tri(p) = p < 32768 ? 2*p - 32768 : 98303 - 2*p. "
    "sample[n] = (tri(a) >> 2) + (tri(b) >> 3) + (noise >> 6) + 300. "
    "The filterbank takes the samples as floats of that size (not divided by 32768)."
)


def samples():
    x, a, b, out = 12345, 0, 32768, []
    tri = lambda p: 2 * p - 32768 if p < 32768 else 98303 - 2 * p
    for n in range(COUNT):
        x = (1664525 * x + 1013904223) % 2**32
        a = (a + 400 + (n >> 1)) % 65536
        b = (b + 20000 - 2 * n) % 65536
        out.append((tri(a) >> 2) + (tri(b) >> 3) + (((x >> 16) - 32768) >> 6) + 300)
    return np.array(out, np.int64)


def fbank(wave16):
    """Log mel energies [frames, 80] of samples in the 16-bit range."""
    o = knf.FbankOptions()
    f, m = o.frame_opts, o.mel_opts
    f.samp_freq, f.dither, f.snip_edges, f.window_type = RATE, 0.0, True, "povey"
    f.frame_length_ms, f.frame_shift_ms, f.preemph_coeff, f.remove_dc_offset = 25.0, 10.0, 0.97, True
    m.num_bins, m.low_freq, m.high_freq = 80, 20.0, 0.0
    o.use_energy, o.use_log_fbank, o.use_power = False, True, True
    k = knf.OnlineFbank(o)
    k.accept_waveform(RATE, np.asarray(wave16, np.float32).tolist())
    k.input_finished()
    return np.stack([k.get_frame(i) for i in range(k.num_frames_ready)])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--encoder")
    args = ap.parse_args()
    s = samples()
    assert abs(s).max() < 32768
    feats = fbank(s)
    shown = [0, 1, len(feats) // 2, len(feats) - 1]
    ref = {
        "formula": FORMULA,
        "rate": RATE,
        "samples": COUNT,
        "first_samples": s[:12].tolist(),
        "last_samples": s[-4:].tolist(),
        "sum_of_samples": int(s.sum()),
        "options": "kaldi-native-fbank " + knf.__version__ + ": 25 ms / 10 ms, povey, preemphasis 0.97, dc removed, dither 0, "
                   "snip_edges, 80 bins, 20 Hz to Nyquist, power, natural log, no energy",
        "frames": len(feats),
        "mean_per_bin": [round(float(v), 5) for v in feats.mean(0)],
        "shown": {str(i): [round(float(v), 5) for v in feats[i]] for i in shown},
    }
    # A digitally silent frame: the floor under the logarithm.
    ref["silence"] = round(float(fbank(np.zeros(400))[0, 0]), 5)
    if args.encoder:
        import onnxruntime
        net = onnxruntime.InferenceSession(args.encoder, providers=["CPUExecutionProvider"])
        e = net.run(["embs"], {"feats": (feats - feats.mean(0))[None].astype(np.float32)})[0][0]
        ref["embedding"] = [round(float(v), 6) for v in e / np.linalg.norm(e)]
    with open(args.out, "w") as f:
        f.write("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in ref.items()) + "\n}\n")


if __name__ == "__main__":
    main()
