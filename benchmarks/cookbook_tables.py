"""What the committed rows of the training programs and of the tutorial's rule say: tables for the documents."""

import csv
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.programs import RESULTS, Comparison, compared, read

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
MOVING_TARGETS, NO_AVERAGING = ("policy-gradient", "adversarial"), "no-averaging"
"""Programs that have a second row with ``averaging=False``, and the name of the optimizer in it."""
HEADER = (
    *("program", "steps", "lowest held-out loss", "Adam, 0.001", "Adam, best rate", "held-out loss at the end"),
    *("Adam, 0.001", "accuracy or score", "Adam, 0.001", "Adam, best rate"),
)
WAVEFORMS = Path(__file__).parent / "results" / "waveforms.csv"
"""The tutorial's rule on its test problem; beside it a JSON file that says what meta-training took."""
SHOWN = {
    "waveforms": "rule of the tutorial",
    "default": "default rule",
    "Adam": "Adam",
    "AdamW-cosine": "AdamW, cosine",
}
SHOWN |= {"NAG": "SGD with Nesterov momentum"}
"""Optimizer -> title, in the order of the tutorial's table."""


def table(folder: Path = RESULTS) -> str:
    """A row for each program: the default rule with nothing set, beside Adam at 0.001 and at its best rate."""
    rows = read(folder)
    steps = {row["program"]: row["steps"] for row in rows}
    found = {one.program: one for one in compared(rows, "default")}
    without = {one.program: one for one in compared(rows, NO_AVERAGING)}
    lines = [HEADER, ["---"] * len(HEADER)]
    for program, title in TITLES.items():
        if program in found:
            lines.append([title, f"{int(steps[program]):,}", *cells(found[program])])
        if program in MOVING_TARGETS and program in without:
            lines.append(["the same with `averaging=False`", f"{int(steps[program]):,}", *cells(without[program])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(comparison: Comparison) -> Sequence[str]:
    """Losses and scores; bold where the rule's is better than that of Adam at 0.001."""
    texts: list[str] = []
    for column, best, form in (("best_held_out_loss", True, "#.3g"), ("held_out_loss", False, "#.3g")):
        texts += numbers(comparison, column, best, form, 1)
    column = "accuracy" if "accuracy" in comparison.learned else "score"
    sign = 1 if comparison.program == "adversarial" else -1
    return [*texts, *numbers(comparison, column, True, ".1%" if column == "accuracy" else "#.3g", sign)]


def numbers(comparison: Comparison, column: str, best: bool, form: str, sign: int) -> Sequence[str]:
    """The rule's figure, Adam's at 0.001 and, if asked for, Adam's best; empty where the program has no such column."""
    sources = [comparison.learned, comparison.untuned, *([comparison.best] if best else [])]
    if column not in comparison.learned:
        return [""] * len(sources)
    texts = [f"{source[column]:{form}}".rstrip(".") for source in sources]
    if sign * comparison.learned[column] < sign * comparison.untuned[column]:
        texts[0] = f"**{texts[0]}**"
    return texts


def waveforms(path: Path = WAVEFORMS) -> Mapping[str, Mapping[str, str]]:
    """Optimizer -> its row."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["optimizer"]: row for row in csv.DictReader(file)}


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
    """What the tutorial's meta-training took and brought."""
    rows = waveforms(path)
    took = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["meta_training"]["waveforms"]
    own, default, adam = (rows[name] for name in ("waveforms", "default", "Adam"))
    text = f"""Meta-training took {took["processor_seconds"]} seconds of one core. On waveforms that it has not seen, the rule
    is {float(own["speedup"]):.1f} times as fast as tuned Adam, and the default rule {float(default["speedup"]):.1f} times. Its
    final loss is {float(own["final_loss"]):.3f}, that of the default rule {float(default["final_loss"]):.3f}, that of tuned
    Adam {float(adam["final_loss"]):.3f} ({own["seeds"]} seeds)."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False)
