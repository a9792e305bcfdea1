"""The page of measurements: what is measured anew replaces its own part, and nothing else; plots are what was given."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).parents[1] / "acceptance"))

import performance
import plot
from checks import Line, Point

SVG = "{http://www.w3.org/2000/svg}"


@dataclass
class Row:
    stages: int
    rate: float
    shares: list[float]


def line(what: str, measured: str, ok: bool = True, *points: Point) -> Line:
    return Line(what, ">= 1", measured, ok, points)


def test_a_check_renews_its_own_rows_alone(tmp_path: Path) -> None:
    performance.keep_checks({"one": [line("a | b", "1.5")], "other": [line("c", "7", False)]}, tmp_path)
    performance.keep_bench("pipeline", [Row(2, 1234.5, [0.25, 0.5])], [], tmp_path)
    performance.keep_checks({"one": [line("a | b", "2.5")]}, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| a \\| b | >= 1 | 2.5 | yes |" in page and "| 1.5 |" not in page
    assert "| c | >= 1 | 7 | **no** |" in page
    assert "| stages | rate | shares |" in page
    assert "| 2 | 1,234 | 0.25, 0.5 |" in page
    assert list(json.loads((tmp_path / "performance.json").read_text())["checks"]) == ["one", "other"]


def test_the_page_names_no_place(tmp_path: Path) -> None:
    performance.keep_checks({"one": [line("a", "1")]}, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "cores" in page and "torch" in page
    assert performance.platform.node() not in page and str(tmp_path) not in page and str(Path.home()) not in page


def test_points_of_one_plot_become_one_picture(tmp_path: Path) -> None:
    points = [Point("Fast", "1", "ours", 4.0), Point("Fast", "1", "theirs", 2.0), Point("Other", "1", "ours", 1.0)]
    performance.keep_checks(
        {"one": [line("a", "1", True, *points[:1])], "two": [line("b", "1", True, *points[1:])]}, tmp_path
    )
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["fast.svg", "other.svg"]
    assert "![Fast](plots/fast.svg)" in (tmp_path / "performance.md").read_text()
    performance.keep_checks({"two": [line("b", "1")]}, tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["fast.svg"], "a plot of nothing stays behind"


def test_bars_are_as_high_as_their_values() -> None:
    root = ElementTree.fromstring(
        plot.bars("a & b", {("x", "ours"): 4.0, ("x", "theirs"): 1.0, ("y < z", "ours"): 2.0})
    )
    drawn = [box for box in root.iter(f"{SVG}rect") if box.get("width") == str(plot.BAR - 3)]
    heights = [float(box.get("height", "0")) for box in drawn]
    assert heights == pytest.approx([plot.HEIGHT, plot.HEIGHT / 4, plot.HEIGHT / 2])
    assert len({box.get("fill") for box in drawn}) == 2
    right = max(float(box.get("x", "0")) for box in drawn) + plot.BAR
    assert right <= float(root.get("width", "0"))
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a & b", "ours", "theirs", "x", "y < z"} <= set(words)
