"""Heads on frozen features are trained as written-out loops of torch train them, one by one.

Every step has all images, in micro-batches, so that their order is of no account.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from evaluation.features.dataset import extract_features
from evaluation.probes import attentive_heads, linear_heads
from evaluation.probes.attentive import AttentiveProbe, split_off_tenth, warm_cosine
from evaluation.probes.exams import split_tenth
from evaluation.probes.linear import LinearProbe
from tests.evaluation.toys import ToyImages, ToyNet, to_tensor
from vit.weights import read_pickle

COMMON = {"transform": to_tensor, "train_transform": to_tensor, "epoch_length": 1, "seed": 3}
STEPS = 6


def tokens_of(images):
    part = extract_features(ToyNet(), images, transform=to_tensor, normalized=False, shown=False)
    return part.features.clone(), part.labels.clone()


def train(layer, optimizer, images, factors, weight=1.0):
    """A layer, with the rates of its optimiser times a factor for each step."""
    x, labels = tokens_of(images)
    rates = [group["lr"] for group in optimizer.param_groups]
    for factor in factors:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        (weight * cross_entropy(layer(x), labels)).backward()
        optimizer.step()


def test_linear_heads_are_each_trained_by_sgd_on_what_is_not_set_apart(tmp_path):
    data = {"train": ToyImages(150, 0), "val": ToyImages(9, 1)}
    _, rest = split_tenth(data["train"])
    size, bases = len(rest), (0.05, 0.5)
    probe = LinearProbe(
        n_last_blocks=[1], avgpools=[False], learning_rates=bases, epochs=STEPS,
        global_batch_size=size, batch_size=size // 2, select_on="train", **COMMON,
    )  # fmt: skip
    probe(ToyNet(), data, tmp_path)
    found = read_pickle(tmp_path / "model_final.pth")["model"]
    rates = [base * size / 256 for base in bases]
    heads = linear_heads.LinearHeads(
        linear_heads.make_grid([1], [False], rates),
        embed_dim=6,
        num_classes=6,
        generator=torch.Generator().manual_seed(3),
    )
    for index, (name, rate) in enumerate(zip(heads.names, rates, strict=True)):
        layer = nn.Linear(6, 6)
        layer.load_state_dict({"weight": heads.weights[0][index], "bias": heads.biases[0][index]})
        cosine = [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
        train(layer, torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9), rest, cosine)
        for key, value in layer.state_dict().items():
            theirs = found[f"classifiers_dict.{name}.linear.{key}"]
            torch.testing.assert_close(theirs, value, rtol=1e-3, atol=1e-4)


def test_attentive_heads_are_each_trained_by_adamw_on_nine_tenths(tmp_path):
    data = {"train": ToyImages(20, 0), "val": ToyImages(9, 1)}
    kept, _ = split_off_tenth(data["train"])
    bases, decays = (0.1, 1.0), (0.0, 0.5)
    probe = AttentiveProbe(
        representations=["cls"], learning_rates=bases, weight_decays=decays, epochs=STEPS,
        warmup_epochs=2, global_batch_size=18, batch_size=9, **COMMON,
    )  # fmt: skip
    probe(ToyNet(), data, tmp_path)
    found = read_pickle(tmp_path / "attentive_model_final.pth")["model"]
    heads = attentive_heads.AttentiveHeads(
        attentive_heads.make_grid(["cls"], [base * 18 / 256 for base in bases], decays),
        embed_dim=6,
        num_classes=6,
        generator=torch.Generator().manual_seed(3),
    )
    factors = [warm_cosine(STEPS, warmup_steps=2)(step) for step in range(STEPS)]
    for head in heads.grid:
        layer = heads.heads[head.name].linear
        groups = [
            {"params": [layer.weight], "weight_decay": head.weight_decay},
            {"params": [layer.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=head.lr, betas=(0.9, 0.95))
        train(layer, optimizer, kept, factors, weight=1 / len(heads.grid))
        for key, value in layer.state_dict().items():
            theirs = found[f"{head.name}.linear.{key}"]
            torch.testing.assert_close(theirs, value, rtol=1e-3, atol=1e-4)
