"""Distils students in eager PyTorch, one after another: what a plain script of a user's does. Needs torch and NumPy only.

Run by the benchmarks beside it. Adam at 1e-3, cross-entropy plus `weight` times T^2 KL(teacher || student) at temperature
T, the teacher's logits read from a file, batches gathered from arrays in memory, accuracy on the test set at the end.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LEARNING_RATE = 1e-3


def mlp() -> nn.Module:
    """784-64-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet8x4() -> nn.Module:
    """ResNet of 8 layers, 32, 64, 128 and 256 channels (He et al. 2016; He et al.'s widths times 4), 100 classes."""
    stem = (nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = (Block(32, 64, 1), Block(64, 128, 2), Block(128, 256, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100))


NETWORKS = {"mlp": mlp, "resnet8x4": resnet8x4}


def load(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The arrays on the device; images normalised, [N, C, H, W] float32."""
    with np.load(path) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    mean, std = (data.pop(name).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    for name in ("inputs", "test_inputs"):
        data[name] = (data[name].permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)).contiguous()
    return {name: array.to(device) for name, array in data.items()}


def train(student: dict[str, float], network: str, data: dict[str, torch.Tensor], epochs: int, batch: int) -> nn.Module:
    """One student."""
    torch.manual_seed(int(student["seed"]))
    inputs, label, logits = data["inputs"], data["label"], data["logits"]
    temperature, weight = student["temperature"], student["weight"]
    model = NETWORKS[network]().to(inputs.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        order = torch.randperm(len(label), device=label.device)
        for start in range(0, len(label) - batch + 1, batch):
            rows = order[start : start + batch]
            given = model(inputs[rows])
            log_q = F.log_softmax(given / temperature, dim=1)
            p = F.softmax(logits[rows] / temperature, dim=1)
            distil = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
            loss = F.cross_entropy(given, label[rows]) + weight * distil
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, torch.Tensor]) -> float:
    """On the test set, 512 images at a time."""
    model.eval()
    hits = [
        (model(inputs).argmax(1) == label).sum()
        for inputs, label in zip(data["test_inputs"].split(512), data["test_label"].split(512))
    ]
    return float(torch.stack(hits).sum()) / len(data["test_label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--students", type=json.loads, required=True, help="[{seed, temperature, weight}, ...]")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    data = load(given.data, given.device)
    accuracies = []
    for student in given.students:
        accuracies.append(accuracy(train(student, given.network, data, given.epochs, given.batch), data))
    given.out.write_text(json.dumps({"accuracy": accuracies}))


if __name__ == "__main__":
    main()
