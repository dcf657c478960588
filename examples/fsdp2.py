"""FSDP2: parameters, gradients and the optimizer's state divided among processes.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py    # gloo on CPUs, nccl where there are GPUs

The rule treats every coordinate by itself, so each process steps its own shard and nothing is exchanged for it: the
result is that of a single process to the bit, given the same gradients. Prints the loss and how much state a process
holds.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from learned_optim import LearnedOptimizer


def main() -> None:
    """Train on every process; the first one prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)  # all processes begin with the same weights
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = LearnedOptimizer(model.parameters())  # after the model has been divided

    generator = torch.Generator().manual_seed(rank)  # every process has its own data
    for step in range(1, steps + 1):
        inputs = torch.randn(64, 20, generator=generator).to(device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), inputs.sin().sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 50 == 0 or step == steps):
            print(f"step {step}: loss {loss.item():.4f}")

    entries = [entry for state in optimizer.state.values() for entry in state.values()]
    whole = sum(entry.nbytes for entry in entries if isinstance(entry, DTensor))
    here = sum(entry.to_local().nbytes for entry in entries if isinstance(entry, DTensor))
    if rank == 0:
        print(f"state here: {here:,} of {whole:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
