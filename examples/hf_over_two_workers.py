"""A Hugging Face model over two workers, used and trained (LoRA): `python hf_over_two_workers.py [DIR [one two]]`.

Before: ralmq broker --bind tcp://127.0.0.1:5555, ralmq worker module -o name=one, ralmq worker module -o name=two. A
worker with -o models=FOLDER reads its layers from its own copy. Without DIR it is the embedded model.
"""

import sys

import ralmq
import torch

directory, *names = sys.argv[1:] or ["demo"]
if len(names) not in (0, 2) or directory.startswith("-"):
    sys.exit("usage: python hf_over_two_workers.py [DIR [WORKER WORKER]]")
first, second = names or ("one", "two")
try:
    model = ralmq.from_pretrained(directory, workers={first: "2GiB", second: "2GiB"})
except ralmq.errors.RalmqError as error:
    sys.exit(str(error))
for place in model.places:
    print(f"layers {place.first} to {place.last - 1} on {place.worker}: {place.bytes / 1e6:.1f} MB")

torch.manual_seed(0)
vocab = int(model.config["vocab_size"])
ids = torch.randint(vocab, (4, 32))  # or those of texts of your own, by the tokenizer of the model
print("continued:", model.generate(ids[:1], max_new_tokens=8, temperature=0.8, top_p=0.95, seed=1)[0, 32:].tolist())

model.add_adapter(r=8, lora_alpha=16)
optimizer = ralmq.RemoteOptimizer("adamw", [model], lr=1e-2)
for step in range(10):
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {float(loss.detach()):.4f}")
model.save_adapter("adapter")  # adapter_model.safetensors and adapter_config.json: peft reads them
