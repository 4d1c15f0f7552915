"""Curves of training runs over their steps."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.pictures.figures import save
from utils.metrics import read_metrics


def draw_losses(logs: Mapping[str, Path], path: Path, *, key: str = "loss") -> Path:
    """One curve of `key` per run: name -> its metrics.jsonl."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, log in logs.items():
        points = [(line["step"], line[key]) for line in read_metrics(log) if key in line]
        axis.plot([step for step, _ in points], [value for _, value in points], label=name)
    axis.set(xlabel="step", ylabel=key)
    axis.legend()
    return save(figure, path)
