"""BPR matrix factorisation and its full-ranking evaluation in eager PyTorch: what a plain script of a user's does.

Run by `recommend.py` beside it; needs torch and NumPy only. Reads requests from standard input, a line of JSON each, and
answers each with a line: {"do": "epoch", "dim": 200} trains an epoch, {"do": "rank", ...} ranks the whole catalogue.

An epoch: a negative item for every pair, drawn uniformly among those its user has not met (vectorised, drawn again until
all are right), a shuffled order, Adam with L2 in the gradient on both tables, the sum of the losses of a batch. Ranking:
the scores of a chunk of users by one product, -inf for what they have met, `topk`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BATCH, LEARNING_RATE, WEIGHT_DECAY, CHUNK = 1024, 1e-3, 1e-3, 1024


class BPR(nn.Module):
    """Inner products of embeddings that start as N(0, 0.01)."""

    def __init__(self, users: int, items: int, dim: int):
        super().__init__()
        self.user, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.01)

    def forward(self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        of = self.user(user)
        return (of * self.item(positive)).sum(1) - (of * self.item(negative)).sum(1)


class Trainer:
    """A network, its optimizer and the training pairs [N, 2] int64."""

    def __init__(self, pairs: torch.Tensor, users: int, items: int, dim: int):
        self.pairs, self.items, self.model = pairs, items, BPR(users, items, dim)
        self.met = torch.unique(pairs[:, 0] * items + pairs[:, 1])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def negatives(self) -> torch.Tensor:
        """An item for each pair that its user has not met: [N]."""
        user = self.pairs[:, 0]
        item = torch.randint(self.items, user.shape)
        wrong = torch.arange(len(user))
        while len(wrong):
            keys = user[wrong] * self.items + item[wrong]
            place = torch.searchsorted(self.met, keys).clamp_(max=len(self.met) - 1)
            wrong = wrong[self.met[place] == keys]
            item[wrong] = torch.randint(self.items, wrong.shape)
        return item

    def epoch(self) -> float:
        """Trains on every pair once; the mean loss."""
        negative, total = self.negatives(), 0.0
        for rows in torch.randperm(len(self.pairs)).split(BATCH):
            score = self.model(self.pairs[rows, 0], self.pairs[rows, 1], negative[rows])
            loss = -F.logsigmoid(score).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / len(self.pairs)


@torch.no_grad()
def rank(given: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """The best `size` items of each of M users [M, size] without those excluded for them."""
    start, values, best = given["start"], given["values"], []
    for first in range(0, len(given["asked"]), CHUNK):
        asked = given["asked"][first : first + CHUNK]
        scores = given["user"][asked] @ given["item"].T
        lengths = start[first + 1 : first + len(asked) + 1] - start[first : first + len(asked)]
        rows = torch.repeat_interleave(torch.arange(len(asked)), lengths)
        scores[rows, values[start[first] : start[first + len(asked)]]] = -torch.inf
        best.append(torch.topk(scores, size, dim=1).indices)
    return torch.cat(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="pairs [N, 2], users, items")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with np.load(given.data) as arrays:
        pairs, users, items = torch.from_numpy(arrays["pairs"]).long(), int(arrays["users"]), int(arrays["items"])
    trainers: dict[int, Trainer] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "epoch":
            trainer = trainers.setdefault(asked["dim"], Trainer(pairs, users, items, asked["dim"]))
            started = time.perf_counter()
            answer = {"loss": trainer.epoch()}
        else:
            with np.load(asked["data"]) as arrays:
                tables = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            tables |= {name: tables[name].long() for name in ("start", "values", "asked")}
            started = time.perf_counter()
            best = rank(tables, asked["size"])
            answer = {}
            np.save(asked["out"], best.numpy())
        print(json.dumps({**answer, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
