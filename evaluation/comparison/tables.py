"""What a comparison leaves: its table on the screen, results.json and results.csv."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.progress import say
from evaluation.results import print_table
from utils.results_file import write_results

# How a figure is written in the table; the others with one digit behind the point.
FORMATS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("parameters", "multiply_adds"), lambda count: f"{count / 1e6:.2f} M"),
    **dict.fromkeys(("tokens", "images_per_second"), "{:.0f}".format),
    "share": "{:.0f} %".format,
    "equivariance_error": "{:.1e}".format,
}


def write_tables(
    name: str,
    title: str,
    figures: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    device: torch.device,
    *,
    columns: Mapping[str, str],
    csv_columns: Sequence[str],
    settings: Sequence[str],
    how: str,
) -> None:
    """Print the figures of every net, and write them to `output_dir`.

    columns: figure -> heading of the printed table. settings: keys of `config` that the figures
    depend on. how: what else they depend on, up to the number of threads. The recipe that
    `config` has for every training is said only where there is one.
    """
    folder, threads = Path(config["output_dir"]), torch.get_num_threads()
    trained = any(isinstance(run, dict) for run in config["runs"].values())
    recipe = f"{config['epochs']} epochs, {config['words']}" if trained else "loaded nets"
    print_table(
        title,
        ("", *columns.values()),
        [(net, *(_written(key, row) for key in columns)) for net, row in figures.items()],
        protocol=f"{recipe}; {how} {threads} threads of {device.type}",
    )
    of_recipe = ("epochs", "words") if trained else ()
    protocol = {key: config[key] for key in (*of_recipe, "models", *settings, "seed")}
    protocol |= {"device": device.type, "threads": threads}
    path = write_results(folder, name, protocol=protocol, figures=figures)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, csv_columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"model": net, **row} for net, row in figures.items())
    say(f"written: {path}, {folder / 'results.csv'}")


def _written(key: str, row: Mapping[str, Any]) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    text = FORMATS.get(key, "{:.1f}".format)(value)
    return f"{text} ({row['any_angle_control']:.1f})" if key == "any_angle" else text
