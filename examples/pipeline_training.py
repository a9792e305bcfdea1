"""A model in three stages on workers, trained by micro-batches: `python pipeline_training.py [one two three]`.

Before: ralmq broker --bind tcp://127.0.0.1:5555, and for each name ralmq worker module -o name=NAME. The model guesses
the next byte of this file from the eight before it.
"""

import sys
from pathlib import Path

import ralmq
import torch
from ralmq.remote.pipeline import Pipeline
from torch import nn

names = sys.argv[1:] or ["one", "two", "three"]
if len(names) != 3:
    sys.exit("usage: python pipeline_training.py [WORKER WORKER WORKER]")
torch.manual_seed(0)
parts = [
    nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(128, 128), nn.GELU()),
    nn.Sequential(nn.Linear(128, 128), nn.GELU()),
    nn.Linear(128, 256),
]
try:
    stages = [ralmq.remote_copy(part, worker=name) for part, name in zip(parts, names, strict=True)]
except ralmq.errors.RalmqError as error:
    sys.exit(str(error))
optimizer = ralmq.RemoteOptimizer("adamw", stages, lr=3e-3)
pipeline = Pipeline(stages, torch.nn.functional.cross_entropy, schedule="1f1b")
text = torch.tensor(list(Path(__file__).read_bytes()))
windows = text.unfold(0, 9, 1)

for step in range(20):
    rows = windows[torch.randint(len(windows), (64,))]
    optimizer.zero_grad()
    report = pipeline.step(rows[:, :8], rows[:, 8], micro_batches=8)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    print(f"step {step}: {report}")
