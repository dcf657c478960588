"""The contenders of a benchmark: hand-designed optimizers, tuned or at a given rate, and learned rules."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer, available_rules, load_rule
from learned_optim.meta_train.benchmark.cache import rule_fingerprint
from learned_optim.meta_train.benchmark.evaluation import BASELINES, DECAYED
from learned_optim.meta_train.benchmark.rivals import RIVALS, Rival, missing, need_packages
from learned_optim.meta_train.benchmark.stepping import ForEach, MakeOptimizer, Model, model_of
from learned_optim.meta_train.common.strict import unknown
from learned_optim.terminal import printable

REFERENCE = "Adam"
"""The tuned baseline over which speed-ups are counted."""


DECAYS = (0.0, 0.01, 0.1, 1.0)
"""Weight decays that are tried with each rate: none, AdamW's default in PyTorch, that of most large models, and ten
times as much."""

Asked = Literal["untuned", "tuned", "all"]
"""Rivals as they come out of the box, at their best rate on each problem, or both."""


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison."""

    name: str
    build: Callable[[Any, float, int], Optimizer]
    """From parameters (or a model, see below), rate (of no effect for a rule) and steps of the whole training."""
    identity: dict[str, Any]
    """Everything about it that determines a training, but the rate."""
    rate: float | None = None
    """The learning rate of a baseline that is not tuned."""
    is_rule: bool = False
    of_model: bool = False
    """Whether ``build`` takes a :class:`~learned_optim.meta_train.benchmark.stepping.Model`: a training run has an
    optimizer of its own then."""
    grid: tuple[float, ...] | None = None
    """Rates that it is tuned over; None: those of the suite."""
    variants: tuple["Contender", ...] = ()
    """Other settings of the same optimizer. All are tuned, and the best one runs; empty: there is this one alone."""
    setting: str = ""
    """What tells a variant from others."""

    @property
    def is_tuned(self) -> bool:
        """Whether its rate is searched for."""
        return self.rate is None and not self.is_rule

    def maker(self, rate: float | None, steps: int) -> MakeOptimizer | ForEach:
        """What makes its optimizer at a rate, from parameters or from a model."""
        build = partial(self._built, rate=rate or 0.0, steps=steps)
        return ForEach(build) if self.of_model else build

    def for_module(self, module: nn.Module, rate: float | None, steps: int) -> Optimizer:
        """Its optimizer for one module."""
        make = self.maker(rate, steps)
        return make.build(model_of(module)) if isinstance(make, ForEach) else make(module.parameters())

    def _built(self, source: Any, rate: float, steps: int) -> Optimizer:
        return self.build(source, rate, steps)


def baseline(text: str) -> Contender:
    """A hand-designed optimizer from ``NAME``, to be tuned, or ``NAME@RATE``.

    Raises:
        ValueError: unknown name, a rate that is not a positive number, or a package that is not installed.
    """
    name, at, number = text.partition("@")
    known = [*BASELINES, *DECAYED, *RIVALS]
    if name not in known:
        raise ValueError(f"baselines: {unknown(name, known)}")
    if not at:
        return _named(name)
    if name in DECAYED:
        raise ValueError(f"baselines: {text!r}: {name} is always tuned; write {name}, or AdamW-cosine@{number}")
    try:
        rate = float(number)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"baselines: {text!r}: after @ stands a positive rate, for example {name}@1e-3")
    return dataclasses.replace(_named(name), name=f"{name}@{rate:g}", rate=rate)


def _named(name: str) -> Contender:
    """One to be tuned."""
    if name in BASELINES:
        return Contender(name, BASELINES[name], {"baseline": name})
    if name in DECAYED:
        variants = tuple(
            Contender(
                name,
                partial(DECAYED[name], decay=decay),
                {"baseline": name, "decay": decay},
                setting=f"decay {decay:g}",
            )
            for decay in DECAYS
        )
        return dataclasses.replace(variants[0], variants=variants)
    need_packages([name])
    rival = RIVALS[name]
    build = partial(_rival, rival)
    return Contender(name, build, {"rival": name, **rival.identity}, of_model=True, grid=rival.grid)


def _rival(rival: Rival, model: Model, rate: float, steps: int) -> Optimizer:
    return rival.build(model, rate, steps, rival.settings)


def rival_names(asked: Asked) -> list[str]:
    """Names, for :func:`baseline`, of all rivals as they come out of the box, tuned, or both.

    Raises:
        ValueError: something else is asked for, or a package is not installed.
    """
    if asked not in get_args(Asked):
        raise ValueError(f"rivals: {unknown(asked, get_args(Asked))}")
    need_packages(list(RIVALS))
    untuned = [f"{name}@{rate:g}" for name, rival in RIVALS.items() for rate in rival.untuned]
    tuned = [*RIVALS, *DECAYED]
    return {"untuned": untuned, "tuned": tuned, "all": [*untuned, *tuned]}[asked]


def installed(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the named optimizers whose packages are installed, and the others."""
    absent = [text for text in texts if (name := text.partition("@")[0]) in RIVALS and missing([name])]
    return [text for text in texts if text not in absent], absent


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

    taken = {*BASELINES, *DECAYED, *RIVALS}
    longest = max((len(Path(source).parts) for source in sources), default=1)
    for parts in range(1, longest + 1):
        names = {source: name(source, parts) for source in sources}
        if len({*names.values(), *taken}) == len(sources) + len(taken):
            break
    return names if sources else {}
