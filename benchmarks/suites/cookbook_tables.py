"""The documents' tables of the training programs and of the tutorial's rule, made of the committed rows."""

import csv
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.suites.programs import RESULTS, ProgramComparison, compared, read

TITLES = {
    "conv-net": "convolutional net, CIFAR-10",
    "residual": "residual net with batch norm, CIFAR-10 16x16",
    "vision-transformer": "vision transformer, MNIST",
    "fashion": "perceptron 784-128-10, Fashion-MNIST",
    "digits": "perceptron 784-128-10, MNIST",
    "narrow": "perceptron 784-32-32-10, MNIST",
    "batches-of-2048": "perceptron, MNIST, batches of 2,048",
    "batches-of-2": "perceptron, MNIST, batches of 2",
    "variational-autoencoder": "variational autoencoder, MNIST",
    "character-lstm": "character LSTM, Python's own source",
    "picture": "sine network that fits a picture (score: decibels)",
    "friedman": "table with noise, Friedman's function",
    "diabetes": "small table, diabetes",
    "cancer": "small table, breast cancer",
    "fashion-500": "500 images of Fashion-MNIST",
    "fine-tuning": "fine-tuning on 250 photographs",
    "policy-gradient": "policy gradient (score: return)",
    "adversarial": "GAN on digits (score: distance, less is better)",
}
"""Program -> title, in the order of the table."""
RULE, TOLD, NO_AVERAGING = "default", "default, total_steps", "no-averaging"
"""Names of the optimizers in the rows: nothing set, the number of steps told, ``averaging=False`` (games alone)."""
HEADER = (
    *("program", "lowest held-out loss", "with `total_steps`", "Adam, 0.001", "Adam, best rate"),
    *("held-out loss at the end", "Adam, 0.001", "accuracy or score", "Adam, 0.001", "Adam, best rate"),
)
WAVEFORMS = ALL_RESULTS / "waveforms.csv"
"""The tutorial's rule on its test problem; beside it a JSON file that says what meta-training took."""
TUTORIAL = "WaveformFamily"
"""The name of that problem in the rows."""
SHOWN = {
    "waveforms": "rule of the tutorial",
    "default": "default rule",
    "Adam": "Adam",
    "AdamW-cosine": "AdamW, cosine",
    "NAG": "SGD with Nesterov momentum",
}
"""Optimizer -> title, in the order of the tutorial's table."""


def table(folder: Path = RESULTS) -> str:
    """A row for each program: the default rule beside Adam at 0.001 and at its best rate."""
    rows = read(folder)
    found, with_length, without = (
        {one.program: one for one in compared(rows, optimizer)} for optimizer in (RULE, TOLD, NO_AVERAGING)
    )
    lines: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER)]
    for program, title in TITLES.items():
        if program in found:
            lines.append([title, *cells(found[program], with_length.get(program))])
        if program in without:
            lines.append(["the same with `averaging=False`", *cells(without[program], None)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(plain_rule: ProgramComparison, with_length: ProgramComparison | None) -> Sequence[str]:
    """Losses and scores; bold where the rule's is better than that of Adam at 0.001.

    Args:
        plain_rule: the rule with nothing set.
        with_length: the rule that knows the number of steps, if that was run.
    """
    lowest, end = "best_held_out_loss", "held_out_loss"
    score = "accuracy" if "accuracy" in plain_rule.learned else "score"
    form, sign = ".1%" if score == "accuracy" else "#.3g", 1 if plain_rule.program == "adversarial" else -1
    return [
        figure(plain_rule, lowest),
        figure(with_length, lowest) if with_length else "",
        *(plain(source, lowest) for source in (plain_rule.untuned, plain_rule.best)),
        *(figure(plain_rule, end), plain(plain_rule.untuned, end)),
        figure(plain_rule, score, form, sign),
        *(plain(source, score, form) for source in (plain_rule.untuned, plain_rule.best)),
    ]


def figure(one: ProgramComparison, column: str, form: str = "#.3g", sign: int = 1) -> str:
    """The rule's figure, bold if it is better than untuned Adam's; ``sign`` is 1 where less is better, else -1."""
    text = plain(one.learned, column, form)
    return f"**{text}**" if text and sign * one.learned[column] < sign * one.untuned[column] else text


def plain(source: Mapping[str, float], column: str, form: str = "#.3g") -> str:
    """A figure; empty where the program has no such column."""
    return f"{source[column]:{form}}".removesuffix(".") if column in source else ""


def waveforms(path: Path = WAVEFORMS) -> Mapping[str, Mapping[str, str]]:
    """Optimizer -> its row, on the tutorial's problem; the file also has the draws of ``learned-optim specialise``."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["optimizer"]: row for row in csv.DictReader(file) if row["problem"] == TUTORIAL}


def waveforms_table(path: Path = WAVEFORMS) -> str:
    """Final losses and speed-ups on the tutorial's problem."""
    rows = waveforms(path)
    lines = [["optimizer", "best rate", "final loss", "95% band", "speed-up over tuned Adam"], ["---"] * 5]
    for name, title in SHOWN.items():
        row = rows[name]
        loss, low, high, speedup = (float(row[key]) for key in ("final_loss", "band_low", "band_high", "speedup"))
        rate = row["rate"] or "none to tune"
        lines.append([title, rate, f"{loss:.3f}", f"{low:.3f} to {high:.3f}", f"{speedup:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def waveforms_claim(path: Path = WAVEFORMS) -> str:
    """A sentence on the time of the tutorial's meta-training and on its gain."""
    rows = waveforms(path)
    took = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["meta_training"]["waveforms"]
    chosen = [rows[name] for name in ("waveforms", "default", "Adam", "AdamW-cosine")]
    speedups, losses = ([float(row[key]) for row in chosen] for key in ("speedup", "final_loss"))
    minutes = f"{took['seconds'] / 60:.0f} minutes"
    text = f"""Meta-training took {minutes} of one busy core. On waveforms that it has not seen, the rule is
    {speedups[0]:.1f} times as fast as tuned Adam, and the default rule {speedups[1]:.1f} times. Final losses: the rule
    {losses[0]:.3f}, the default rule {losses[1]:.3f}, tuned Adam {losses[2]:.3f}, AdamW with a tuned cosine
    {losses[3]:.3f}
    ({chosen[0]["seeds"]} seeds)."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False)
