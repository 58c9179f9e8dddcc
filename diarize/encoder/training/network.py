"""The encoder's network: a small 2-D stem, residual time-delay blocks, attentive statistics pooling.

Frames come every 10 ms; the stem halves that, everything after it works at 20 ms.
"""
import torch
from torch import nn


def unit(inputs, outputs, width=1, dilation=1):
    return nn.Sequential(nn.Conv1d(inputs, outputs, width, dilation=dilation, padding=dilation * (width // 2), bias=False),
                         nn.BatchNorm1d(outputs))


class Block(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.wide, self.point = unit(channels, channels, 3, dilation), unit(channels, channels)

    def forward(self, x):
        return torch.relu(x + self.point(torch.relu(self.wide(x))))


class Encoder(nn.Module):
    def __init__(self, channels=192, dims=160, dilations=(1, 2, 3, 4, 5), pooled=384):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=(2, 1), padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.enter = unit(24 * 20, channels)
        self.blocks = nn.ModuleList(Block(channels, d) for d in dilations)
        self.gather = unit(channels * 3, pooled)
        self.look = nn.Sequential(nn.Conv1d(pooled, 64, 1), nn.Tanh(), nn.Conv1d(64, pooled, 1))
        self.settle, self.embed = nn.BatchNorm1d(2 * pooled), nn.Linear(2 * pooled, dims, bias=False)
        self.last = nn.BatchNorm1d(dims, affine=False)

    def forward(self, feats):
        """[batch, frames, 80] of mean-free log mel energies -> [batch, dims], not normalised."""
        x = self.stem(feats.transpose(1, 2).unsqueeze(1))
        x = torch.relu(self.enter(x.flatten(1, 2)))
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        x = torch.relu(self.gather(torch.cat(kept[-3:], 1)))
        w = torch.softmax(self.look(x).float(), 2)
        x = x.float()
        mean = (w * x).sum(2)
        spread = ((w * x * x).sum(2) - mean * mean).clamp(min=1e-5).sqrt()
        return self.last(self.embed(self.settle(torch.cat([mean, spread], 1))))
