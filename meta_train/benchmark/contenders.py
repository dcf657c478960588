"""The contenders of a benchmark: hand-designed optimizers, tuned or at a given rate, and learned rules."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer, available_rules, load_rule
from learned_optim.meta_train.benchmark.cache import rule_fingerprint
from learned_optim.meta_train.benchmark.evaluation import BASELINES, MakeOptimizer
from learned_optim.meta_train.common.strict import unknown
from learned_optim.terminal import printable

REFERENCE = "Adam"
"""The tuned baseline over which speed-ups are counted."""


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison."""

    name: str
    build: Callable[[Iterable[Tensor], float, int], Optimizer]
    """From parameters, rate (of no effect for a rule) and steps of the whole training."""
    identity: dict[str, Any]
    """Everything about it that determines a training, but the rate."""
    rate: float | None = None
    """The learning rate of a baseline that is not tuned."""
    is_rule: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether its rate is searched for."""
        return self.rate is None and not self.is_rule

    def maker(self, rate: float | None, steps: int) -> MakeOptimizer:
        """Parameters -> optimizer, at a rate."""
        return lambda parameters: self.build(parameters, rate or 0.0, steps)


def baseline(text: str) -> Contender:
    """A baseline from ``NAME``, to be tuned, or ``NAME@RATE``.

    Raises:
        ValueError: unknown name, or a rate that is not a positive number.
    """
    name, at, number = text.partition("@")
    if name not in BASELINES:
        raise ValueError(f"baselines: {unknown(name, BASELINES)}")
    if not at:
        return Contender(name, BASELINES[name], {"baseline": name})
    try:
        rate = float(number)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"baselines: {text!r}: after @ stands a positive rate, for example {name}@1e-3")
    return Contender(f"{name}@{rate:g}", BASELINES[name], {"baseline": name}, rate)


def baselines(texts: Sequence[str]) -> list[Contender]:
    """Baselines by :func:`baseline`, each once, and :data:`REFERENCE` among them."""
    names = texts if REFERENCE in texts else [REFERENCE, *texts]
    return list({contender.name: contender for contender in map(baseline, names)}.values())


def rules(sources: Sequence[str | Path]) -> list[Contender]:
    """Learned rules by name or path, each once; raises like :func:`~learned_optim.load_rule`."""
    return [_rule(source, name) for source, name in _rule_names(list(dict.fromkeys(map(str, sources)))).items()]


def _rule(source: str, name: str) -> Contender:
    rule = load_rule(source)
    return Contender(
        name,
        lambda parameters, rate, steps: LearnedOptimizer(parameters, rule),
        {"rule": rule_fingerprint(rule)},
        is_rule=True,
    )


def _rule_names(sources: Sequence[str]) -> dict[str, str]:
    """A file is called by its stem; where two would share a name, with as much of the path as distinguishes them."""

    def name(source: str, parts: int) -> str:
        if source in available_rules():
            return source
        return printable("/".join(Path(source).with_suffix("").parts[-parts:]))

    longest = max((len(Path(source).parts) for source in sources), default=1)
    for parts in range(1, longest + 1):
        names = {source: name(source, parts) for source in sources}
        if len({*names.values(), *BASELINES}) == len(sources) + len(BASELINES):
            break
    return names if sources else {}
