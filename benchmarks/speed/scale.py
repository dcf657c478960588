"""Predicts bytes and time of a meta-step on 1 ... 1,000 workers. Nothing is measured.

``python -m benchmarks.tables`` writes the table of docs/scale.md. What travels is asked of the estimators; a worker's
window time is taken from ``results/throughput.csv``; the rest are the assumptions below.
"""

import math

from benchmarks.results import RESULTS, read
from learned_optim.meta_train.estimators import ESTIMATORS
from learned_optim.meta_train.inner.distributed import AGREEMENT_ENTRIES
from learned_optim.meta_train.trainer.pool import Header
from learned_optim.rules import ARCHITECTURES

BANDWIDTH = 1.25e9  # bytes a second: 10 Gbit Ethernet
LATENCY = 50e-6  # seconds a message, over TCP within one rack
NORMALS = 1e8  # normal numbers that one core draws a second
INSTANCES, STEPS = 16, 50  # of a window; every worker has one window a meta-step
NETWORK = "196-32-10"  # of the window time
WORKERS = (1, 10, 100, 1_000)
ROWS = {"truncated-bptt": "truncated-bptt-2048-coordinates", "es": "pes", "pes": "pes"}  # ES does PES's work
RULES = {"`schedule-free-lstm`": "schedule-free-lstm", "lstm-l2l": "lstm-l2l"}
FLOAT64 = 8


def window_seconds(estimator: str) -> float:
    """Seconds of a window of one worker with rule schedule-free-lstm, as measured."""
    rates = {
        (row["estimator"], row["network"]): float(row["inner_steps_per_second"])
        for row in read(RESULTS / "throughput.csv")
    }
    return INSTANCES * STEPS / rates[ROWS[estimator], NETWORK]


def all_reduce_seconds(content: int, workers: int) -> float:
    """Seconds of a ring: every worker sends and receives twice the content, in ``2 (workers - 1)`` messages."""
    return 2 * (workers - 1) * (content / workers / BANDWIDTH + LATENCY)


def prediction(estimator: str, meta_parameters: int, workers: int) -> tuple[int, float, float]:
    """Bytes that a worker hands to the two sums of a meta-step, their seconds, seconds to draw all perturbations."""
    if workers == 1:
        return 0, 0.0, 0.0
    sums = ESTIMATORS[estimator]().sums_length(meta_parameters, INSTANCES)
    content, agreement = FLOAT64 * workers * (len(Header._fields) + sums), FLOAT64 * AGREEMENT_ENTRIES
    exchange = all_reduce_seconds(content, workers) + all_reduce_seconds(agreement, workers)
    perturbed = 0 if estimator == "truncated-bptt" else workers * INSTANCES * meta_parameters
    return content + agreement, exchange, perturbed / NORMALS


def table() -> str:
    lines = ["| rule | estimator | workers | bytes | exchange | perturbations | window | efficiency |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, name in RULES.items():
        meta_parameters = sum(parameter.numel() for parameter in ARCHITECTURES[name]().parameters())
        for estimator in ROWS:
            for workers in WORKERS:
                content, exchange, drawing = prediction(estimator, meta_parameters, workers)
                window, efficiency = "not measured", ""
                if name == "schedule-free-lstm":
                    seconds = window_seconds(estimator)
                    window = milliseconds(seconds)
                    efficiency = f"{seconds / (seconds + exchange + drawing):.0%}"
                cells = (
                    f"{workers:,}",
                    f"{content:,}",
                    milliseconds(exchange),
                    milliseconds(drawing),
                    window,
                    efficiency,
                )
                lines.append(f"| {title} ({meta_parameters:,}) | `{estimator}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(1e3 * seconds)))
    return f"{1e3 * seconds:,.{digits}f} ms"
