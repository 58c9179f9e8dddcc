"""What happens to a voice between mouth and file, for whole batches: rooms, telephone bands, colour, noise, other voices, coding."""
import numpy as np
import torch

RATE = 16000


def rooms(rng, count, length=8000):
    """Impulse responses: a direct sound, a few early reflections, a decaying tail of coloured noise."""
    out = np.zeros((count, length), np.float32)
    t = np.arange(length) / RATE
    for k in range(count):
        decay = np.exp(-6.9 * t / rng.uniform(0.12, 0.8))
        tail = rng.standard_normal(length)
        tail = np.convolve(tail, [1, rng.uniform(0, 0.8)], "same") * decay
        start = rng.integers(20, 400)
        tail[:start] = 0
        energy = np.sqrt((tail ** 2).sum()) + 1e-9
        h = tail / energy * 10 ** (-rng.uniform(-4, 16) / 20)            # direct to reverberant: -4 to 16 dB
        for _ in range(rng.integers(0, 6)):
            h[rng.integers(10, 700)] += rng.uniform(-0.5, 0.5)
        h[0] += 1.0
        out[k] = h
    return out


class Channel:
    def __init__(self, seed, count=600, noises=200, seconds=6):
        rng = self.rng = np.random.default_rng(seed)
        self.rooms = torch.from_numpy(rooms(rng, count))
        # Noise of many colours, from which any stretch is taken.
        size = seconds * RATE
        white = torch.fft.rfft(torch.from_numpy(rng.standard_normal((noises, size)).astype(np.float32)))
        f = torch.linspace(0.02, 1, white.shape[1])
        noise = torch.fft.irfft(white * f[None] ** -torch.from_numpy(rng.uniform(-0.3, 1.6, (noises, 1)).astype(np.float32)), size)
        self.noise = noise / noise.square().mean(1, keepdim=True).sqrt()

    def response(self, batch, bins):
        """Smooth random equalisers, low passes, telephone bands: [batch, bins] of gains, computed at 400 frequencies."""
        rng, f = self.rng, np.linspace(0, RATE / 2, 400)
        knots = np.linspace(0, 1, 9)
        out = np.empty((batch, len(f)), np.float32)
        for b in range(batch):
            db = np.interp(np.sqrt(f / f[-1]), knots, rng.normal(0, rng.choice([0, 1, 2, 4]), 9)) + rng.uniform(-6, 6) * f / f[-1]
            kind = rng.random()
            if kind < 0.2:                                              # telephone or old recording
                low, high = rng.uniform(50, 350), rng.uniform(3000, 3950)
                db = db - 60 * np.clip((f - high) / 300, 0, 1) - (0 if rng.random() < 0.5 else 40) * np.clip((low - f) / low, 0, 1)
            elif kind < 0.45:
                high = rng.uniform(3500, 7900)
                db = db - 60 * np.clip((f - high) / 500, 0, 1)
            out[b] = 10 ** (db / 20)
        return torch.nn.functional.interpolate(torch.from_numpy(out)[:, None], bins, mode="linear", align_corners=True)[:, 0]

    def some(self, batch, share):
        return torch.from_numpy(np.flatnonzero(self.rng.random(batch) < share))

    def draw(self, count, low, high):
        return torch.from_numpy(self.rng.uniform(low, high, (count, 1)).astype(np.float32))

    def __call__(self, x):
        """[batch, samples] floats of any level -> the same in the 16-bit range, spoilt."""
        rng, (batch, n) = self.rng, x.shape
        level = lambda y: y.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
        x = x / level(x)
        size = -(-(n + 8000) // 4096) * 4096
        spectrum = torch.fft.rfft(x, size)
        k = self.some(batch, 0.4)
        spectrum[k] *= torch.fft.rfft(self.rooms[torch.from_numpy(rng.integers(0, len(self.rooms), len(k)))], size)
        spectrum *= self.response(batch, spectrum.shape[1])
        y = torch.fft.irfft(spectrum, size)[:, :n]
        y = y / level(y)
        # Noise of 5 to 40 dB in two of three, other voices of 8 to 25 dB in a sixth.
        k = self.some(batch, 0.67)
        start = int(rng.integers(0, self.noise.shape[1] - n))
        y[k] += self.noise[torch.from_numpy(rng.integers(0, len(self.noise), len(k))), start:start + n] * 10 ** (-self.draw(len(k), 5, 40) / 20)
        k = self.some(batch, 0.17)
        babble = x[(k + 2) % batch] + x[(k + 4) % batch] * (self.draw(len(k), 0, 1) < 0.5)
        y[k] += babble / level(babble) * 10 ** (-self.draw(len(k), 8, 25) / 20)
        y = y / y.abs().amax(1, keepdim=True).clamp(min=1e-5)
        k = self.some(batch, 0.12)                                      # mu-law
        law = torch.round(torch.sign(y[k]) * torch.log1p(255 * y[k].abs()) / np.log(256.0) * 127) / 127
        y[k] = torch.sign(law) * (torch.pow(256.0, law.abs()) - 1) / 255
        k = self.some(batch, 0.06)                                      # clipping
        limit = self.draw(len(k), 0.3, 0.8)
        y[k] = torch.minimum(torch.maximum(y[k], -limit), limit)
        return torch.round(y * 32000 * 10 ** (-self.draw(batch, 0, 34) / 20))
