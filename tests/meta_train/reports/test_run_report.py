"""The HTML page of a run: complete, self-contained, and drawn by a browser."""

import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from helpers.small_runs import configuration, run
from learned_optim import cli
from learned_optim.meta_train.reports.rule_plots import PANELS
from learned_optim.meta_train.reports.run_plots import titles
from learned_optim.meta_train.reports.run_report import STYLE_SHEET_COLOURS, _rule, write_report
from learned_optim.meta_train.reports.runs import read_run
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Outline(HTMLParser):
    """Tags of a page, addresses that it refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.identifiers: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.identifiers.append(str(value))
            if name.rpartition(":")[2] in ("href", "src"):
                self.references.append(str(value))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an estimator that reports figures of its own."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    estimator = {"name": "combined", "pairs": 2, "replay_coordinates": None}
    run(Trainer(configuration(estimator=estimator, description="<script>alert(1)</script> & more"), folder))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(read_run(folder), path)
    return path


def test_every_changing_metric_is_drawn(folder: Path, page: Path) -> None:
    text = page.read_text()
    metrics = read_run(folder).metrics()
    changed = [name for name in metrics if len({value for value in metrics[name] if np.isfinite(value)}) > 1]
    drawn = set(changed) - {"meta_step", "seconds", "best_validation"}
    assert {"meta_loss", "validation", "grad_norm", "estimator/es_weight", "meta_optimizer/lr"} <= drawn
    assert [name for name in drawn if f"<b>{titles(name)}</b>" not in text] == []
    assert [panel.title for panel in PANELS if f"<b>{escape(panel.title)}</b>" not in text] == []
    assert len(re.findall("<svg", text)) == len(drawn) + len(PANELS)


def test_settings_and_sessions_are_shown(page: Path) -> None:
    text = Outline(page.read_text()).text
    assert "estimator.pairs2" in text  # a cell, and the next
    assert "Session from meta-step 0" in text


def test_page_is_self_contained(page: Path) -> None:
    outline = Outline(page.read_text())
    assert {"link", "script", "iframe", "object"}.isdisjoint(outline.tags)
    assert outline.references
    outside = [
        reference for reference in outline.references if not reference.startswith(("#", "data:image/png;base64,"))
    ]
    assert outside == []
    assert "url(http" not in page.read_text()
    assert "@import" not in page.read_text()


def test_pictures_refer_to_unique_identifiers(page: Path) -> None:
    outline = Outline(page.read_text())
    times = Counter(outline.identifiers)
    text = page.read_text()
    referred = {reference[1:] for reference in outline.references if reference.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred
    assert [identifier for identifier in referred if times[identifier] != 1] == []


def test_colours_are_css_variables_of_the_page(page: Path) -> None:
    text = page.read_text()
    assert [colour for colour in STYLE_SHEET_COLOURS if colour in text[text.index("<body>") :]] == []
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined


def test_names_and_descriptions_are_escaped(page: Path) -> None:
    text = page.read_text()
    assert "<script>" not in text
    assert "<title>a &lt;run&gt;</title>" in text


def test_run_without_rule_files_is_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    for name in ("best", "latest"):
        (tmp_path / "run" / f"{name}.safetensors").unlink()
    assert cli.main(["runs", "plot", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "What the rule does" not in text
    assert "<b>meta-loss</b>" in text


def test_run_without_a_rule_configuration_has_no_rule_figures(folder: Path) -> None:
    found = read_run(folder)
    del found.config["rule"]
    assert _rule(found) == ""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_browser_draws_the_page_offline(page: Path, tmp_path: Path, dark: bool) -> None:
    picture = tmp_path / "page.png"
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2600"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    pixels = matplotlib_image.imread(picture)[:, :, :3]
    assert pixels.shape == (2600, 1280, 3)
    corner = pixels[5, 5]
    assert (corner.mean() > 0.9) != dark
    assert (np.abs(pixels - corner).max(2) > 0.1).mean() > 0.03  # lines and letters
    assert (np.abs(pixels - corner).mean(2) > 0.7).mean() > 0.001  # letters that can be read on that ground
    red, green, blue = np.moveaxis(pixels, 2, 0)
    assert ((red > green + 0.15) & (red > blue + 0.15)).mean() > 0.001  # the rule's curves
    assert ((blue > red + 0.15) & (blue > green + 0.05)).mean() > 0.001  # Adam's
