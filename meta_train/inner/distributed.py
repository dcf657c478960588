"""The processes of one meta-training run: who they are, and the few collectives that they need.

``torchrun`` starts them; the rest of the code asks a :class:`World`, which for a single process does nothing.
"""

import contextlib
import os
import secrets
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

SILENCE = timedelta(minutes=10)  # a process that keeps the others waiting for so long counts as lost


START = "learned_optim start"  # key in torchrun's store: distinguishes the processes of one start from earlier ones
AGREEMENT_ENTRIES = 3  # numbers in the sum of World.agree


class ProcessLostError(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class Agreement(NamedTuple):
    """The decision of all processes after a meta-step."""

    save: bool
    """Write a checkpoint: the leader wants to."""
    stop: bool
    """Save and end the run: a process has received a signal."""


class World:
    """The processes of a run, or some of them; without arguments, this process alone.

    All of them call the collectives in the same order. Sums are taken in float64, so that they hardly depend on how
    their terms are divided.

    Args:
        rank: number of this process among them.
        size: their number.
        group: process group of torch.distributed; None: the default one.
        device: device on which it exchanges tensors.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.size, self.group, self.device = rank, size, group, torch.device(device)
        self.bytes_exchanged = 0
        """Bytes that this process has handed to sums."""
        self.signals: list[int] = []
        """Received since the start; acted upon when all processes agree to."""
        self.restarted = False
        """Whether ``torchrun --max-restarts`` has started the processes again."""

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, on every one of them, bit by bit the same.

        Raises:
            ProcessLostError: another process has ended, or does not answer.
        """
        if self.size == 1:
            return values
        total = values.to(self.device, torch.float64, copy=True)
        self.bytes_exchanged += total.numel() * total.element_size()
        with lost_processes():
            dist.all_reduce(total, group=self.group)
        return total.to(values)

    def gather(self, value: float | Tensor) -> Tensor:
        """The numbers of all processes in the order of their ranks, ``(size,)`` in float64."""
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        return self.sum(values)

    def agree(self, save: bool, replica: Sequence[Tensor]) -> Agreement:
        """Decide together what to do after a meta-step.

        Args:
            save: the leader's wish counts.
            replica: tensors that all processes must hold alike.

        Raises:
            RuntimeError: they do not.
        """
        if self.size == 1:
            return Agreement(save, stop=False)  # signals interrupt it where it stands
        own = fingerprint(replica)
        stop, leader_saves, fingerprints = self.sum(
            torch.tensor([bool(self.signals), save and self.leads, own], dtype=torch.float64)
        ).tolist()
        if fingerprints != self.size * own:  # at least one process sees it, and its end ends the others
            raise RuntimeError(
                "the processes no longer hold the same meta-parameters: their machines or numbers of threads round "
                "differently; use machines of one kind, or --threads 1, and resume from the last checkpoint"
            )
        return Agreement(bool(leader_saves), bool(stop))

    def collect(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors of all processes by rank, on the leader; on the others an empty list."""
        if self.size == 1:
            return [dict(tensors)]
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = torch.frombuffer(bytearray(save(own)), dtype=torch.uint8).to(self.device)
        sizes = [int(size) for size in self.gather(len(content))]
        with lost_processes():
            if not self.leads:
                dist.send(content, group=self.group, group_dst=0)
                return []
            collected = [own]
            for rank in range(1, self.size):  # one by one: the leader holds one message at a time beside the tensors
                message = torch.empty(sizes[rank], dtype=torch.uint8, device=self.device)
                dist.recv(message, group=self.group, group_src=rank)
                collected.append(load(message.cpu().numpy().tobytes()))
        return collected

    def team(self, teams: Sequence[range]) -> "World":
        """The one of some disjoint teams that this process is in; alone if it is in none. All name the same teams."""
        own = World()
        for ranks in teams:
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), timeout=SILENCE)  # all processes create all groups
                if self.rank in ranks:
                    own = World(self.rank - ranks.start, len(ranks), group, self.device)
        return own


def fingerprint(tensors: Sequence[Tensor]) -> float:
    """A number below 2^32 that tells apart whatever differs in a bit."""
    check = 0
    for tensor in tensors:
        check = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), check)
    return float(check)


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Say it in one line when a collective fails because another process has."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError("another process of this run has ended, or does not answer") from error


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """All processes that ``torchrun`` has started, for a block; without it, or if it has started one, this one alone.

    They exchange tensors by gloo or, on GPUs, by nccl, one GPU a process. Ctrl-C and SIGTERM, of which any process may
    hear first, wait until all have agreed (:meth:`World.agree`).

    Args:
        device: device of inner training; "cuda" is the GPU with the process's number on its machine.

    Raises:
        ValueError: there are more processes than GPUs on this machine.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        world = World(device=device)
        world.restarted = _restarted()
        yield world
        return
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", _own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        torch.cuda.set_device(own)
    store, rank, size = next(rendezvous("env://", timeout=SILENCE))
    # torchrun's store outlives the processes, and holds the addresses of those that have died (pytorch issue 167288).
    if rank == 0:
        store.set(START, secrets.token_hex(8))
    fresh = PrefixStore(store.get(START).decode(), store)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=SILENCE)
    try:
        world = World(rank, size, device=own)
        with recorded(world.signals):
            world.restarted = bool(world.gather(_restarted()).any())  # torchrun counts for each machine
            if rank == 0:
                store.delete_key(START)  # all have read it
            yield world
    finally:
        dist.destroy_process_group()


def _restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _own_gpu(local_rank: int, gpus: int) -> int:
    if gpus == 0:
        raise ValueError("torch finds no GPU on this machine; leave out --device cuda")
    if local_rank >= gpus:
        raise ValueError(
            f"this machine has {gpus} GPUs and more processes; start one for each: --nproc-per-node {gpus}"
        )
    return local_rank


@contextlib.contextmanager
def recorded(signals: list[int]) -> Iterator[None]:
    """Take note of Ctrl-C and SIGTERM instead of being interrupted. Main thread only; else no-op."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
