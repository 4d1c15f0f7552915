"""Runners of the cases of topic "evaluation" that judge nets; data_cases.py has the rest."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.probes.knn import KnnProbe
from evaluation.probes.neighbours import (
    Neighbours,
    choose_rows,
    find_neighbours,
    merge_neighbours,
    vote,
)
from tests.parity.harness import NotBuilt, check, load
from vit.backbone import Features


def run_knn(case: dict, folder: Path) -> None:
    """Neighbours and class scores, searched at once, in small chunks and in one part per rank."""
    tensors, args = load(case, folder), case["args"]
    train, queries = tensors["in.train_features"], tensors["in.test_features"]
    k = max(args["ks"])
    halves = torch.arange(len(train)).chunk(args["world_size"])
    parts = [find_neighbours(queries, train[half], k=k, indices=half) for half in halves]
    searches = [
        merge_neighbours(parts, k),
        find_neighbours(queries, train, k=k, chunk_size=37, query_batch=11),
    ]
    for neighbours in searches:
        _close(case, "out.topk_sims", neighbours.similarities, tensors)
        labels = tensors["in.train_labels"][neighbours.indices]
        check("out.topk_labels", labels, tensors["out.topk_labels"], 0, "exact")
        scores = _vote(neighbours, tensors, args, args["ks"])
        for value in args["ks"]:
            _close(case, f"out.probas_k{value}", scores[value], tensors)


def run_knn_fewshot(case: dict, folder: Path) -> None:
    """The rows drawn for each try, the values of k that remain, and the scores."""
    tensors, args = load(case, folder), case["args"]
    train, labels = tensors["in.train_features"], tensors["in.train_labels"]
    for n_per_class in args["n_per_class_list"]:
        tries = choose_rows(labels, args["ks"], n_per_class=n_per_class, num_tries=args["n_tries"])
        for attempt, (rows, ks) in enumerate(tries):
            key = f"{n_per_class} per class/{attempt}" if n_per_class >= 0 else "full/1"
            assert ks == case["expected"]["klists"][key]
            if rows is not None:
                check(f"rows of {key}", rows, tensors[f"out.indices/{key}"], 0, "exact")
            rows = torch.arange(len(train)) if rows is None else rows
            neighbours = find_neighbours(
                tensors["in.test_features"], train[rows], k=max(ks), indices=rows
            )
            scores = _vote(neighbours, tensors, args, ks)
            for k in ks:
                _close(case, f"out.probas/{key}/{k}", scores[k], tensors)


def run_knn_end_to_end(case: dict, folder: Path) -> None:
    """From images through a net and the loader to percentages and the text of the results file."""
    tensors, args, expected = load(case, folder), case["args"], case["expected"]
    probe = KnnProbe(
        ks=args["ks"],
        temperature=args["T"],
        n_per_class_list=args["n_per_class_list"],
        num_tries=args["n_tries"],
        batch_size=args["batch_size"],
        transform=_unchanged,
    )
    net = _Linear(tensors["state.weight"], tensors["state.bias"])
    data = {
        split: _Images(tensors[f"in.{split}_images"], tensors[f"in.{split}_labels"])
        for split in ("train", "val")
    }
    with tempfile.TemporaryDirectory() as output:
        probe(net, data, Path(output))
        lines = (Path(output) / "results_eval_knn.json").read_text().splitlines()
    stored = expected["file_text"].splitlines()
    assert len(lines) == len(stored)
    for line, stored_line in zip(lines, stored, strict=True):
        ((name, percent),) = json.loads(line).items()
        ((stored_name, stored_percent),) = json.loads(stored_line).items()
        assert name == stored_name
        assert abs(percent - stored_percent) <= case["tolerance"]["percent"], name


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.embed_dim, self.patch_size = len(bias), 4

    def features(self, images: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        rows = nn.functional.linear(images.flatten(1), self.weight, self.bias)
        return [Features(cls=rows, patches=None) for _ in layers]


class _Images:
    """Stored tensors in the shape of a data set."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def path(self, index: int) -> str:
        return f"image {index}"


def _unchanged(image: Tensor) -> Tensor:
    return image


def _vote(
    neighbours: Neighbours, tensors: dict[str, Tensor], args: dict, ks: list[int]
) -> dict[int, Tensor]:
    return vote(
        neighbours,
        tensors["in.train_labels"],
        ks=ks,
        temperature=args["T"],
        num_classes=args["num_classes"],
    )


def _close(case: dict, name: str, ours: Tensor, tensors: dict[str, Tensor]) -> None:
    tolerance = {key: case["tolerance"][key] for key in ("atol", "rtol")}
    check(name, ours, tensors[name], tolerance, "close")


def _later(case: dict, folder: Path) -> None:
    raise NotBuilt("a later issue")


RUNNERS: dict[str, Callable[[dict, Path], None]] = {
    "imagenet_knn": run_knn,
    "imagenet_knn_fewshot": run_knn_fewshot,
    "imagenet_knn_e2e": run_knn_end_to_end,
    "*": _later,
}
