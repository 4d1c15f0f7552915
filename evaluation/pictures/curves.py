"""Curves of training runs over their steps."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.pictures.figures import save
from utils.metrics_file import read_metrics


def draw_losses(logs: Mapping[str, Path], path: Path) -> Path:
    """One curve of the loss per run: name -> its metrics.jsonl."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, log in logs.items():
        points = [(line["step"], line["loss"]) for line in read_metrics(log) if "loss" in line]
        axis.plot([step for step, _ in points], [value for _, value in points], label=name)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    return save(figure, path)
