"""The tables of the cookbook and of the tutorial are those of their rows."""

import csv
from pathlib import Path
from statistics import fmean

from benchmarks.results import RESULTS
from benchmarks.suites import cookbook_tables
from benchmarks.suites.program_list import PROGRAMS

PROGRAMS_HEADER = (
    "program,optimizer,seed,steps,training_loss,held_out_loss,best_held_out_loss,accuracy,score,entropy,seconds,commit"
)


def test_every_program_has_a_title() -> None:
    assert set(cookbook_tables.TITLES) == set(PROGRAMS)


def test_cells_are_bold_where_the_rule_is_better_than_untuned_adam(tmp_path: Path) -> None:
    lines = [
        PROGRAMS_HEADER,
        "digits,default,0,10,1,0.5,0.4,0.9,,,1,a",
        'digits,"default, total_steps",0,10,1,0.5,0.2,0.9,,,1,a',
        "digits,Adam@0.001,0,10,1,0.4,0.3,0.8,,,1,a",
        "digits,Adam@0.01,0,10,1,0.9,0.25,0.85,,,1,a",
        "adversarial,default,0,10,1,,,,1000,0,1,a",
        "adversarial,no-averaging,0,10,1,,,,20,2,1,a",
        "adversarial,Adam@0.001,0,10,1,,,,75,2,1,a",
    ]
    (tmp_path / "programs.csv").write_text("\n".join(lines))
    _, _, digits, games, without = (line.split(" | ") for line in cookbook_tables.table(tmp_path).splitlines())
    assert digits[1:5] == ["0.400", "**0.200**", "0.300", "0.250"]
    assert digits[5:] == ["0.500", "0.400", "**90.0%**", "80.0%", "85.0% |"]
    assert games[7:] == ["1.00e+03", "75.0", "75.0 |"]
    assert without[0] == "| the same with `averaging=False`"
    assert without[7] == "**20.0**"  # a distance: less is better


def test_claim_of_the_tutorial_has_the_figures_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "waveforms.csv"
    rows = [
        "waveforms,,0.1,0.1,0.1,3.04,5",
        "default,,0.2,0.2,0.2,2,5",
        "Adam,0.1,0.3,0.3,0.3,1,5",
        "AdamW-cosine,,0.4,0,0,1,5",
    ]
    rows = [*(f"WaveformFamily,{row}" for row in rows), "specialise-draw-0,Adam,0.1,9,9,9,9,5"]  # of another table
    path.write_text("\n".join(["problem,optimizer,rate,final_loss,band_low,band_high,speedup,seeds", *rows]))
    path.with_suffix(".json").write_text('{"meta_training": {"waveforms": {"seconds": 540}}}')
    text = " ".join(cookbook_tables.waveforms_claim(path).split())
    assert text.startswith("Meta-training took 9 minutes of one busy core.")
    assert "the rule is 3.0 times as fast as tuned Adam, and the default rule 2.0 times" in text
    losses = "the rule 0.100, the default rule 0.200, tuned Adam 0.300, AdamW with a tuned cosine 0.400 (5 seeds)."
    assert f"Final losses: {losses}" in text


def test_committed_gan_needs_averaging_false() -> None:
    with (RESULTS / "programs" / "programs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["program"] == "adversarial"]
    with_averaging, without, adam = (
        fmean(float(row["score"]) for row in rows if row["optimizer"] == name)
        for name in ("default", "no-averaging", "Adam@0.001")
    )
    assert without < adam < with_averaging  # a distance: less is better
