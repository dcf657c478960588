"""A run as one page of HTML that needs no network and no other file."""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learned_optim.files import write_atomically
from learned_optim.meta_train.reports.plots import STYLE
from learned_optim.meta_train.reports.responses import ADAM_RATE, portrait
from learned_optim.meta_train.reports.rule_plots import ADAM, PANELS, RULE
from learned_optim.meta_train.reports.run_plots import draw_baselines, draw_curve, known, set_scale, titles
from learned_optim.meta_train.reports.runs import Run, duration

PICTURE_INCHES = 4.0, 2.7  # inches of a picture
GROUPS: dict[str, Sequence[str]] = {
    "Progress": ("meta_loss", "inner_loss", "validation", "validation/", "curriculum/score"),
    "Meta-gradient": ("grad_norm", "skipped", "estimator/"),
    "Schedule": ("meta_optimizer/", "unroll/", "curriculum/horizon"),
}
"""Titles, and the names of metrics below them; those that end in a slash stand for all that begin so."""
ALWAYS = ("meta_loss", "validation", "grad_norm")  # drawn even if they never changed
INK, LINES, CURVE = "#010101", "#020202", "#030303"
STYLE_SHEET_COLOURS = {
    INK: "currentColor",
    LINES: "var(--lines)",
    CURVE: "var(--curve)",
    RULE: "var(--rule)",
    ADAM: "var(--adam)",
}
"""Colours that matplotlib draws in -> those of the page, which follow the reader's choice of light or dark."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --lines: #dfe3e8; --faint: #646c76;
  --curve: #3b6fb5; --rule: #c44e52; --adam: #4c72b0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e3e6ea; --paper: #16191d; --lines: #363c44; --faint: #9aa3ad;
  --curve: #7aaee8; --rule: #ee8488; --adam: #86abe6; }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1240px; margin: 2rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--lines); }}
p {{ margin: .3rem 0; }}
.faint, figcaption {{ color: var(--faint); }}
.facts {{ display: flex; flex-wrap: wrap; gap: .9rem 2.2rem; margin: 1.1rem 0 0; }}
.facts dt {{ color: var(--faint); font-size: .8rem; }}
.facts dd {{ margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); gap: 1.4rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .82rem; }}
figcaption b {{ color: var(--ink); }}
svg {{ width: 100%; height: auto; }}
svg text {{ font-family: system-ui, sans-serif !important; }}
table {{ border-collapse: collapse; font-size: .86rem; }}
td {{ border-bottom: 1px solid var(--lines); padding: .15rem 1.5rem .15rem 0; vertical-align: top;
  overflow-wrap: anywhere; }}
td:first-child {{ color: var(--faint); white-space: nowrap; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(run: Run, path: Path) -> None:
    """Write the page of a run into ``path``, whole or not at all.

    It shows the outcome, the curves of everything that was logged and changed, what the best rule (before there is
    one, the latest) does to made-up gradients, settings that are not the defaults, and the sessions.

    Raises:
        FileNotFoundError: the run has no metrics.
    """
    summary = run.summary()
    metrics = run.metrics()
    name = run.folder.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="faint">{escape(summary["description"])}</p>' if summary["description"] else "",
        _facts(summary),
        *(_curves(title, metrics, names, run.baselines) for title, names in GROUPS.items()),
        _rule(run),
        _table("Settings that are not the defaults", run.changed_settings()),
        *(_table(f"Session from meta-step {session['meta_step']}", session, closed=True) for session in run.sessions),
    ]
    page = PAGE.format(title=escape(name), body="\n".join(part for part in parts if part))
    write_atomically(path, page.encode(errors="backslashreplace"))  # halves of surrogate pairs, as JSON can hold them


def _facts(summary: Mapping[str, Any]) -> str:
    best, at = summary["best_validation"], summary["best_meta_step"]
    families = (name if count == 1 else f"{count} {name}" for name, count in summary["families"].items())
    facts = {
        "state": summary["state"],
        "meta-steps": f"{summary['meta_steps']:,} of {summary['of']:,}",
        "best validation": "–" if best is None else f"{best:.4g}" + (f" at {at:,}" if at is not None else ""),
        **{f"validation of {name}": f"{score:.4g}" for name, score in summary.get("baselines", {}).items()},
        "validated on": summary["validated_on"],
        "time": duration(summary["seconds"]),
        "skipped steps": str(summary["skipped"]),
        "estimator": summary["estimator"],
        "rule": summary["rule"],
        "tasks": ", ".join(families),
    }
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{entries}</dl>'


def _curves(
    title: str, metrics: Mapping[str, Sequence[float]], names: Sequence[str], baselines: Mapping[str, float]
) -> str:
    """The metrics of a group, each as a picture, apart from those that never changed; the score with its baselines."""
    wanted = [name for pattern in names for name in metrics if name == pattern or _begins(name, pattern)]
    drawn = [name for name in wanted if name in ALWAYS or len(set(known(metrics, name)[1])) > 1]

    def picture(name: str) -> str:
        def draw(axes: Axes) -> None:
            set_scale(axes, [known(metrics, name)[1]])
            draw_curve(axes, metrics, name, name)
            lines = draw_baselines(axes, baselines if name == "validation" else {})
            set_scale(axes, [known(metrics, name)[1], lines])
            axes.set(xlabel="meta-step")

        return _figure(svg(draw, name), f"<b>{escape(titles(name))}</b>")

    return _section(title, map(picture, drawn))


def _begins(name: str, pattern: str) -> bool:
    return pattern.endswith("/") and name.startswith(pattern)


def _rule(run: Run) -> str:
    """A drawing of what the rule of a run does; nothing if it has none, or has not saved it yet."""
    files = (run.folder / f"{kind}.safetensors" for kind in ("best", "latest"))
    file = next(filter(Path.is_file, files), None)
    if file is None or "rule" not in run.config:
        return ""
    known_portrait = portrait(file, name="rule")

    def picture(place: int) -> str:
        panel = PANELS[place]
        drawing = svg(lambda axes: panel.draw(axes, known_portrait), f"rule {place}")
        return _figure(drawing, f"<b>{escape(panel.title)}</b> {escape(panel.caption)}")

    text = f"{file.name} beside Adam at {ADAM_RATE:g}, on made-up gradients; learned-optim rules show draws the same."
    return _section("What the rule does", map(picture, range(len(PANELS))), text)


def svg(draw: Callable[[Axes], None], salt: str) -> str:
    """A picture as an ``<svg>`` element, in colours of the page and with letters that stay text.

    Args:
        draw: draws into axes.
        salt: makes its identifiers its own, where several pictures are in one page.
    """
    style = {
        **STYLE,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": LINES,
        "grid.color": LINES,
        "axes.prop_cycle": cycler(color=[CURVE]),
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=PICTURE_INCHES, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    for colour, replacement in STYLE_SHEET_COLOURS.items():
        element = element.replace(colour, replacement)
    return element


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _section(title: str, pictures: Iterable[str], text: str = "") -> str:
    found = "\n".join(pictures)
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f'<h2>{escape(title)}</h2>{paragraph}<div class="pictures">{found}</div>' if found else ""


def _table(title: str, values: Mapping[str, Any], *, closed: bool = False) -> str:
    rows = (
        f"<tr><td>{escape(name)}</td><td>{escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in values.items()
    )
    table = f"<table>{''.join(rows)}</table>"
    if closed:
        return f"<details><summary>{escape(title)}</summary>{table}</details>"
    return f"<h2>{escape(title)}</h2>{table}"
