"""Rows and their provenance are written, read, replaced, and kept small."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import RESULTS, read, read_parts, read_suite, replaced, save_part, write_parts, write_suite

MOST_FILES, MOST_BYTES = 64, 1_500_000  # what a clone carries for all figures and tables, pictures left out
LONGEST_CURVE = 201  # points: the first step, and 200 means


def test_committed_results_are_few_and_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.suffix not in (".png", ".svg")]
    assert len(files) <= MOST_FILES
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_every_table_has_its_provenance() -> None:
    for path in RESULTS.rglob("*.csv"):
        beside = {other.stem for other in path.parent.glob("*.json")}
        # tables of one experiment, whose JSON file has parts for both
        shared = {"waves": "sinusoid", "toy-surface": "toy"}
        assert beside & {path.stem, shared.get(path.stem), "provenance"}, path


@pytest.mark.parametrize(
    "folder", [path.parent.name for path in RESULTS.glob("*/curves.csv") if path.parent.name != "metz_2019"]
)
def test_suites_are_read_as_they_are_written(folder: str, tmp_path: Path) -> None:
    results = read_suite(RESULTS / folder)
    write_suite(tmp_path, results)
    for name in ("summary", "curves"):
        assert (tmp_path / f"{name}.csv").read_bytes() == (RESULTS / folder / f"{name}.csv").read_bytes()
    problems = {row["problem"] for row in results.summary}
    assert problems == set(results.curves)
    assert max(len(points) for curves in results.curves.values() for points in curves.values()) <= LONGEST_CURVE


def test_rows_are_replaced_where_they_stand() -> None:
    old = [{"name": name, "seed": seed, "loss": "1"} for name in "ab" for seed in "01"]
    fresh = [{"name": "a", "seed": "1", "loss": "2"}, {"name": "c", "seed": "0", "loss": "2"}]
    shown = [(row["name"], row["seed"], row["loss"]) for row in replaced(old, fresh, ("name", "seed"))]
    assert shown == [("a", "0", "1"), ("a", "1", "2"), ("c", "0", "2"), ("b", "0", "1"), ("b", "1", "1")]
    assert replaced(old, fresh[1:], ("name", "seed"))[-1] == fresh[1]


def test_part_replaces_only_its_rows_and_provenance(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    for name, loss in (("a, b", 1), ("c", 1), ("a, b", 2)):
        save_part(path, ("name", "shots"), [("name", "shots", "loss"), (name, 5, loss), (name, 5, loss)], {"lr": loss})
    assert [(row["name"], row["loss"]) for row in read(path)] == [("a, b", "2")] * 2 + [("c", "1")] * 2
    parts = read_parts(path.with_suffix(".json"))
    assert {name: part["lr"] for name, part in parts.items()} == {"a, b, 5": 2, "c, 5": 1}
    assert all({"date", "commit", "processor", "torch"} <= set(part) for part in parts.values())
    assert "torch" in json.loads(path.with_suffix(".json").read_text())["shared"]


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"a": {"x": 1, "deep": {"y": [1]}}},
        {"a": {"x": 1, "deep": {"y": 1, "z": 2}}, "b": {"x": 1, "deep": {"y": 1, "z": 3}}},
        {"a": {"x": 1, "deep": {"y": 1}}, "b": {"x": 1, "deep": {"y": 1}}},
        {"a": {"x": 1, "deep": {"y": 1}}, "b": {"x": True, "deep": 1}, "c": {"deep": {}}},
        {"a": {"deep": {}}, "b": {"deep": {}}, "c": {"deep": {"y": None}}},
        {"a": {"deep": {"y": 1}, "x": None}, "b": {"deep": {"z": 1}}},
        {"a": {"x": 1}, "b": {}},
    ],
)
def test_what_parts_share_is_written_once_and_nothing_is_lost(parts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    write_parts(path, parts)
    found = read_parts(path)
    assert found == parts
    assert list(found) == list(parts)
    assert [type(part.get("x")) for part in found.values()] == [type(part.get("x")) for part in parts.values()]
