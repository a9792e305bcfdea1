"""Two layers on two workers, trained from here: `python remote_copy.py [one two]`.

Before: ralmq broker --bind tcp://127.0.0.1:5555, ralmq worker module -o name=one, ralmq worker module -o name=two.
"""

import sys

import ralmq
import torch
from torch import nn

if len(sys.argv) not in (1, 3):
    sys.exit("usage: python remote_copy.py [WORKER WORKER]")
first, second = sys.argv[1:] or ("one", "two")
torch.manual_seed(0)
try:
    one = ralmq.remote_copy(nn.Linear(16, 16), worker=first)
    two = ralmq.remote_copy(nn.Linear(16, 16), worker=second)
except ralmq.errors.RalmqError as error:
    sys.exit(str(error))
optimizer = ralmq.RemoteOptimizer("sgd", [one, two], lr=0.05)
x, target = torch.randn(32, 16), torch.randn(32, 16) / 4

for step in range(10):
    optimizer.zero_grad()
    y = x
    for _ in range(5):  # ten calls; y goes from worker to worker and never comes here
        y = two(one(y).tanh())
    loss = torch.nn.functional.mse_loss(y, target)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {float(loss):.4f}")

one.save("one.safetensors")
