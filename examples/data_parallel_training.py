"""One model on several workers, each with its part of every batch: `python data_parallel_training.py [one two ...]`.

Before: ralmq broker --bind tcp://127.0.0.1:5555, and for each name ralmq worker module -o name=NAME. The model guesses
the next byte of this file from the eight before it.
"""

import sys
from pathlib import Path

import ralmq
import torch
from torch import nn

names = sys.argv[1:] or ["one", "two"]
if len(set(names)) < max(2, len(names)):
    sys.exit("usage: python data_parallel_training.py [WORKER WORKER ...]")
torch.manual_seed(0)
module = nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256))
try:
    model = ralmq.DataParallel([ralmq.remote_copy(module, worker=name) for name in names])
except ralmq.errors.RalmqError as error:
    sys.exit(str(error))
optimizer = ralmq.RemoteOptimizer("adamw", [model], lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
windows = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, 9, 1)

for step in range(20):
    rows = windows[torch.randint(len(windows), (64,))]
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(rows[:, :8]), rows[:, 8])
    loss.backward()  # and the mean of all workers' gradients, from worker to worker
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    schedule.step()
    print(f"step {step}: loss {float(loss.detach()):.4f}")

equal = [all(map(torch.equal, proxy.state_dict().values(), model.state_dict().values())) for proxy in model.proxies]
print("equal on all workers:", all(equal))
