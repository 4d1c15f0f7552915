"""Runners of the cases about classifiers on frozen features: linear and attentive, and metrics."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.probes.attentive_heads import attend
from evaluation.probes.class_metrics import AnyMatchCounts, ClassCounts
from evaluation.probes.linear import LinearProbe
from evaluation.probes.linear_heads import Input, LinearHeads, make_grid, published_name
from evaluation.probes.training import HeadTraining
from tests.parity.harness import Runner, check, load, strip
from utils.data.loaders import TrainingBatches
from utils.schedules import Cosine, scale_lr
from vit.backbone import Features


def linear_input(case: dict, folder: Path) -> None:
    """The input of a head, of every number of blocks with and without pooled patches."""
    tensors, args = load(case, folder), case["args"]
    features = _features(tensors, args["n_tokens_entries"])
    for num_blocks in args["n_list"]:
        for avgpool in (False, True):
            name = f"out.n{num_blocks}_avgpool{avgpool}"
            _close(case, name, Input(num_blocks, avgpool).read(features), tensors)


def linear_logits(case: dict, folder: Path) -> None:
    """Logits of one head with given parameters, and the columns a mapping keeps."""
    tensors, args = load(case, folder), case["args"]
    features = _features(tensors, args["n_tokens_entries"])
    grid = make_grid([args["n"]], [args["avgpool"]], [0.1])
    embed_dim = tensors["in.cls0"].shape[1]
    heads = LinearHeads(grid, embed_dim=embed_dim, num_classes=args["num_classes"])
    prefix = f"classifiers_dict.{heads.names[0]}."
    heads.load_published({prefix + k: v for k, v in strip(tensors, "state.").items()})
    with torch.no_grad():
        (logits,) = heads(heads.read(features))
    _close(case, "out.logits", logits, tensors)
    mapping = tensors.get("in.class_mapping")
    _close(case, "out.preds", logits if mapping is None else logits[:, mapping], tensors)


def linear_train(case: dict, folder: Path) -> None:
    """The probe on stored batches, from stored heads: all rates, final parameters, the report."""
    tensors, args, expected = load(case, folder), case["args"], case["expected"]
    num_steps, labels = args["max_iter"], tensors["in.labels"]
    net = _Stored(tensors, blocks=sum(name.startswith("in.cls") for name in tensors))
    everything = torch.arange(len(labels))
    data = {"train": everything, "val": tensors["in.val_index"]}
    sets = {split: _Indices(rows, labels) for split, rows in data.items()}
    with tempfile.TemporaryDirectory() as output:
        start, final = Path(output, "heads.pth"), Path(output, "out", "model_final.pth")
        torch.save({"model": strip(tensors, "state."), "iteration": -1}, start)
        mapping = None
        if "in.class_mapping" in tensors:
            mapping = str(Path(output, "mapping.npy"))
            np.save(mapping, tensors["in.class_mapping"].numpy())
        probe = LinearProbe(
            n_last_blocks=args["n_last_blocks_list"],
            learning_rates=args["learning_rates"],
            global_batch_size=args["lr_batch_size"],
            batch_size=args["lr_batch_size"],
            epochs=1,
            epoch_length=num_steps,
            eval_period=args["eval_period"],
            val_metric_type=args.get("val_metric_type", args.get("metric_type", "mean_accuracy")),
            val_class_mapping=mapping,
            classifier=str(start),
            transform=_unchanged,
        )
        order = tensors["in.order"].split(args["batch_size"])
        probe.given = _with_batches(probe.given, [(rows, labels[rows]) for rows in order])
        probe(net, sets, final.parent)
        state = torch.load(final)["model"]
        text = (final.parent / "results_eval_linear.json").read_text()
    grid = make_grid(probe.n_last_blocks, probe.avgpools, probe.rates())
    heads = LinearHeads(grid, embed_dim=net.embed_dim, num_classes=args["num_classes"])
    assert heads.names == expected["names_in_order"]
    schedule = Cosine(base=1.0, final=0.0, num_steps=num_steps)
    for step, stored in enumerate(tensors["out.lrs"]):
        after = heads.loss_weights * schedule(step + 1)
        check(f"lrs {step}", after, stored, _tolerance(case), "close")
    assert {f"out.{name}" for name in state} | {"out.lrs"} == {n for n in tensors if "out." in n}
    for name, value in state.items():
        _close(case, f"out.{name}", value, tensors)
    assert text == expected["file_text"]


def linear_grid(case: dict, folder: Path) -> None:
    """Published names (of which several may be one), rates and widths on any number of GPUs."""
    args = case["args"]
    blocks = args.get("n_last_blocks_list", [1, 4])
    channels = [args["embed_dim"]] * max(blocks)
    for stored in case["expected"]["grids"]:
        batch_size = args["batch_size"] * stored["world_size"]
        rates = [scale_lr(rate, "linear_wrt_256", batch_size) for rate in args["learning_rates"]]
        grid = make_grid(blocks, [False, True], rates)
        widths = {published_name(head): head.input.width(channels) for head in grid}
        check("names", list(widths), stored["names"], 0, "exact")
        check("widths", list(widths.values()), stored["in_features"], 0, "exact")
        lrs = torch.tensor([head.lr for head in grid], dtype=torch.float64)
        stored_lrs = torch.tensor(stored["lrs"], dtype=torch.float64)
        check("lrs", lrs, stored_lrs, case["tolerance"]["lrs"], "absolute")


def metrics(case: dict, folder: Path) -> None:
    """Fractions of top-k and any-match accuracy, counted in two halves."""
    tensors, args = load(case, folder), case["args"]
    scores, labels = tensors["in.preds"], tensors["in.target"]
    several = args["metric"] == "real"
    counts = (AnyMatchCounts if several else ClassCounts)(1, scores.shape[1], top=args["ks"])
    for half in torch.arange(len(labels)).chunk(2):
        counts.add(scores[None, half], labels[half])
    counts.reduce()
    for metric in ("",) if several else args["averages"]:
        for k, fractions in counts.fractions(metric or "imagenet_real_accuracy").items():
            name = f"out.{metric}.top-{k}" if metric else f"out.top-{k}"
            _close(case, name, fractions.flatten(), tensors)


def any_match(case: dict, folder: Path) -> None:
    """Any-match accuracy head by head; the labels are the same for all, as published."""
    tensors, k = load(case, folder), case["args"]["top_k"]
    scores, labels = tensors["in.preds"].mT, tensors["in.target"]
    ours = []
    for head_scores in scores:
        counts = AnyMatchCounts(1, scores.shape[-1], top=[k])
        counts.add(head_scores[None], labels[0])
        ours.append(counts.fractions()[k])
    together = AnyMatchCounts(len(scores), scores.shape[-1], top=[k])
    together.add(scores, labels[0])
    for found in (torch.cat(ours), together.fractions()[k]):
        _close(case, "out.acc", found.view(tensors["out.acc"].shape), tensors)


def attn_pool(case: dict, folder: Path) -> None:
    """Logits of an attentive head with given parameters."""
    tensors = load(case, folder)
    state = {name: value[None] for name, value in strip(tensors, "state.").items()}
    (logits,) = attend(tensors["in.tokens"], state)
    _close(case, "out.logits", logits, tensors)


class _Stored(nn.Module):
    """A net that looks its features up by the number of the sample."""

    patch_size = 1

    def __init__(self, tensors: dict[str, Tensor], blocks: int) -> None:
        super().__init__()
        self.all_features = _features(tensors, blocks)
        self.embed_dim = tensors["in.cls0"].shape[1]

    def features(self, images: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        blocks = [self.all_features[layer] for layer in layers]
        return [Features(block.cls[images], block.patches[images]) for block in blocks]


class _Indices:
    """Numbers of samples in the shape of a data set."""

    class_names: list[str] = []

    def __init__(self, indices: Tensor, labels: Tensor) -> None:
        self.indices, self.labels = indices, labels[indices].numpy()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        return self.indices[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def path(self, index: int) -> str:
        return f"sample {index}"


def _unchanged(image: Tensor) -> Tensor:
    return image


def _with_batches(training: HeadTraining, batches: list[tuple[Tensor, Tensor]]) -> HeadTraining:
    """The same training on given batches, one a step."""

    @dataclass(frozen=True, kw_only=True)
    class Given(HeadTraining):
        def batches(self, dataset: object, *, first_step: int) -> TrainingBatches:
            return TrainingBatches((batch, []) for batch in batches[first_step:])

    return Given(**vars(training))


def _features(tensors: dict[str, Tensor], blocks: int) -> list[Features]:
    return [
        Features(tensors[f"in.cls{i}"], tensors[f"in.patch{i}"][:, None]) for i in range(blocks)
    ]


def _tolerance(case: dict) -> dict[str, float]:
    return {key: case["tolerance"][key] for key in ("atol", "rtol")}


def _close(case: dict, name: str, ours: Tensor, tensors: dict[str, Tensor]) -> None:
    check(name, ours, tensors[name], _tolerance(case), "close")


RUNNERS: dict[tuple[str, str], Runner] = {
    ("evaluation", "linear_input"): linear_input,
    ("evaluation", "linear_logits"): linear_logits,
    ("evaluation", "linear_train"): linear_train,
    ("evaluation", "linear_grid"): linear_grid,
    ("evaluation", "metrics"): metrics,
    ("evaluation", "any_match"): any_match,
    ("evaluation", "attn_pool"): attn_pool,
}
