"""A comparison's figures are printed in their units and kept as they are."""

import csv
import json

import pytest
import torch

from evaluation.comparison.tables import write_tables

CONFIG = {"epochs": 3, "words": 16, "models": {"a": "a.yaml"}, "seed": 5, "step": 15, "other": 1}
CONFIG |= {"runs": {"a": {"seed": 5}}}
FIGURES = {
    "octic": {
        "parameters": 1_230_000,
        "multiply_adds": 45_600_000,
        "tokens": 16.4,
        "images_per_second": 1234.5,
        "share": 62.6,
        "equivariance_error": 0.0,
        "upright": 0.0,
        "any_angle": 81.24,
        "any_angle_control": 93.06,
    },
    "plain": {"upright": 71.26, "any_angle": None, "any_angle_control": None},
}
PRINTED = {
    "parameters": ("1.23 M", "-"),
    "multiply_adds": ("45.60 M", "-"),
    "tokens": ("16", "-"),
    "images_per_second": ("1234", "-"),
    "share": ("63 %", "-"),
    "equivariance_error": ("0.0e+00", "-"),
    "upright": ("0.0", "71.3"),
    "any_angle": ("81.2 (93.1)", "-"),
}


@pytest.fixture
def written(tmp_path, capsys):
    write_tables(
        "digits",
        "all digits",
        FIGURES,
        {**CONFIG, "output_dir": tmp_path / "new"},
        torch.device("cpu"),
        columns={key: key.upper() for key in PRINTED},
        csv_columns=("model", "upright", "any_angle"),
        settings=("step",),
        how="by eye;",
    )
    return tmp_path / "new", capsys.readouterr().out


def test_a_table_has_the_figures_of_each_net_in_its_row(written):
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in written[1].splitlines()
        if line.startswith("│")
    ]
    assert [row[0] for row in rows] == list(FIGURES)
    assert [tuple(column) for column in zip(*rows, strict=True)][1:] == list(PRINTED.values())
    threads = torch.get_num_threads()
    assert f"protocol: 3 epochs, 16; by eye; {threads} threads of cpu" in written[1]


def test_the_files_hold_the_figures_unrounded(written):
    folder, _ = written
    kept = json.loads((folder / "results.json").read_text())["digits"]
    assert kept["figures"] == FIGURES
    asked = {key: CONFIG[key] for key in ("epochs", "words", "models", "step", "seed")}
    threads = torch.get_num_threads()
    assert kept["protocol"] == {**asked, "device": "cpu", "threads": threads}
    with (folder / "results.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["model", "upright", "any_angle"],
            ["octic", "0.0", "81.24"],
            ["plain", "71.26", ""],
        ]
