"""What no library has: several inputs and outputs, recurrence, own detection and segmentation,
weights that are computed."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from tests.architectures.entry import Entry


class Siamese(nn.Module):
    """Two inputs, shared weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))

    def forward(self, left, right):
        return (self.body(left) - self.body(right)).abs().sum(1, keepdim=True)


class ImageAndNumbers(nn.Module):
    """Multi-input, multi-output as a dict."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.numbers, self.classes, self.age = nn.Linear(5, 8), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, image, numbers):
        x = torch.cat([self.image(image).flatten(1), self.numbers(numbers).relu()], 1)
        return {"classes": self.classes(x), "age": self.age(x)}


class Tagger(nn.Module):
    """Tokens through a recurrent layer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.tokens = nn.Embedding(50, 12)
        self.layer = kind(12, 16, batch_first=True, **options)
        self.out = nn.Linear(32 if options.get("bidirectional") else 16, 5)

    def forward(self, tokens):
        return self.out(self.layer(self.tokens(tokens))[0][:, -1])


class CellLoop(nn.Module):
    """A recurrent cell in a Python loop."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 10)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return self.out(h)


class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates, self.out = nn.Conv2d(3 + 8, 32, 3, padding=1), nn.Linear(8, 4)

    def forward(self, frames):
        h = c = frames.new_zeros(frames.shape[0], 8, *frames.shape[-2:])
        for step in range(frames.shape[1]):
            i, f, o, g = self.gates(torch.cat([frames[:, step], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h.mean((2, 3)))


class UNet(nn.Module):
    """Segmentation with skips."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        skip = self.down(x).relu()
        y = self.up(self.deep(F.max_pool2d(skip, 2)).relu())
        return self.out(torch.cat([skip, y], 1))


class Detector(nn.Module):
    """One-stage detection: scores, boxes decoded with anchors, as YOLO's head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )
        self.head = nn.Conv2d(16, 3 * 9, 1)
        self.register_buffer("anchors", torch.tensor([[10.0, 13], [16, 30], [33, 23]]))

    def forward(self, x):
        y = self.head(self.body(x).relu())
        n, _, h, w = y.shape
        y = y.view(n, 3, 9, h, w).permute(0, 1, 3, 4, 2)
        size = (y[..., 2:4].sigmoid() * 2) ** 2 * self.anchors.view(1, 3, 1, 1, 2)
        boxes = torch.cat([y[..., :2].sigmoid(), size], -1)
        return boxes.reshape(n, -1, 4), y[..., 4:].reshape(n, -1, 5)


class Experts(nn.Module):
    """Bare matrices, all experts weighted."""

    def __init__(self):
        super().__init__()
        self.router, self.out = nn.Linear(16, 4), nn.Linear(16, 3)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 16, 24)),
            nn.Parameter(torch.randn(4, 24, 16)),
        )

    def forward(self, x):
        share = self.router(x).softmax(-1)
        y = torch.einsum("ni,eio->neo", x, self.up).relu()
        y = torch.einsum("neo,eoi->nei", y, self.down)
        return self.out((y * share[..., None]).sum(1))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.out = nn.Linear(16, 16), nn.Linear(16, 3)
        self.A, self.B = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return self.out((self.base(x) + x @ self.A.T @ self.B.T).relu())


class GraphNet(nn.Module):
    """Node features and an adjacency matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 12), nn.Linear(12, 3)

    def forward(self, nodes, adjacency):
        x = self.first(adjacency @ nodes).relu()
        return self.second((adjacency @ x).mean(1))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mean, self.var = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.dec = nn.Linear(4, 20)

    def forward(self, x):
        h = self.enc(x).relu()
        return self.dec(self.mean(h)).sigmoid(), self.mean(h), self.var(h)


def normed(wrap):
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.ReLU(), wrap(nn.Conv1d(8, 8, 3)), nn.Flatten(), nn.Linear(40, 3)
    )


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        self.out = nn.Linear(16, 30)

    def forward(self, source, target):
        return self.out(self.body(self.tokens(source), self.tokens(target)))


def with_lazy(model, *inputs):
    model(*inputs)
    return model, inputs


def make(kind, *shapes, **options):
    inputs = tuple(torch.randn(shape) for shape in shapes)
    return lambda: (kind(**options), inputs)


def tokens(*shape):
    return torch.randint(0, 30, shape)


OWN = (
    Entry(
        "siamese",
        "multi-input",
        lambda: with_lazy(Siamese(), torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)),
    ),
    Entry(
        "image and numbers",
        "multi-input, multi-output",
        make(ImageAndNumbers, (2, 3, 12, 12), (2, 5)),
    ),
    Entry("LSTM tagger", "recurrent", lambda: (Tagger(nn.LSTM), tokens(2, 7))),
    Entry(
        "bidirectional GRU",
        "recurrent",
        lambda: (Tagger(nn.GRU, bidirectional=True), tokens(2, 7)),
    ),
    Entry("RNN, two layers", "recurrent", lambda: (Tagger(nn.RNN, num_layers=2), tokens(2, 7))),
    Entry("GRU cell in a loop", "recurrent", make(CellLoop, (2, 5, 6))),
    Entry("ConvLSTM", "recurrent", make(ConvLSTM, (2, 3, 3, 8, 8))),
    Entry("U-Net", "segmentation", make(UNet, (2, 3, 16, 16))),
    Entry("one-stage detector", "detection", make(Detector, (2, 3, 32, 32))),
    Entry("experts", "bare matrices", make(Experts, (2, 16))),
    Entry("LoRA", "bare matrices", make(LoRA, (2, 16))),
    Entry("graph convolution", "multi-input", make(GraphNet, (2, 6, 7), (2, 6, 6))),
    Entry("VAE", "multi-output", make(VAE, (2, 20))),
    Entry(
        "weight_norm",
        "parametrised",
        lambda: (normed(parametrizations.weight_norm), torch.randn(2, 4, 9)),
    ),
    Entry(
        "spectral_norm",
        "parametrised",
        lambda: (normed(parametrizations.spectral_norm), torch.randn(2, 4, 9)),
    ),
    Entry(
        "orthogonal",
        "parametrised",
        lambda: (normed(parametrizations.orthogonal), torch.randn(2, 4, 9)),
    ),
    Entry("nn.Transformer", "multi-input", lambda: (Seq2Seq(), (tokens(2, 5), tokens(2, 4)))),
)
