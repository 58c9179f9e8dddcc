"""Kaldi's log mel filterbank as batched torch operations, for training; agrees with kaldi-native-fbank (see `check`)."""
import numpy as np
import torch

RATE, FRAME, SHIFT, FFT, BINS = 16000, 400, 160, 512, 80


def mel_matrix():
    mel = lambda f: 1127.0 * np.log(1.0 + f / 700.0)
    low, high = mel(20.0), mel(RATE / 2)
    step = (high - low) / (BINS + 1)
    at = mel(np.arange(FFT // 2 + 1) * RATE / FFT)
    out = np.zeros((FFT // 2 + 1, BINS), np.float32)
    for b in range(BINS):
        left, centre, right = low + b * step, low + (b + 1) * step, low + (b + 2) * step
        up, down = (at - left) / (centre - left), (right - at) / (right - centre)
        out[:, b] = np.where((at > left) & (at < right), np.minimum(up, down), 0)
    out[FFT // 2] = 0                                    # Kaldi leaves Nyquist out
    return torch.from_numpy(out)


MEL = mel_matrix()
WINDOW = torch.from_numpy(((0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))) ** 0.85).astype(np.float32))
FLOOR = float(np.finfo(np.float32).eps)


def fbank(wave16):
    """[batch, samples] in the 16-bit range -> [batch, frames, 80], not yet mean-free."""
    x = wave16.unfold(1, FRAME, SHIFT)
    x = x - x.mean(2, keepdim=True)
    x = torch.cat([x[..., :1] * (1 - 0.97), x[..., 1:] - 0.97 * x[..., :-1]], 2) * WINDOW
    power = torch.fft.rfft(x, FFT).abs().square()
    return torch.log((power @ MEL).clamp(min=FLOOR))


def check():
    from fbank_reference import fbank as kaldi, samples
    s = samples()
    difference = np.abs(fbank(torch.from_numpy(s.astype(np.float32))[None])[0].numpy() - kaldi(s)).max()
    print(f"greatest difference from kaldi-native-fbank: {difference:.5f}")


if __name__ == "__main__":
    check()
