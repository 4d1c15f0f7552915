"""The attentive probe: its heads are the published attention, each at its own rate and decay."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.probes.attentive import (
    RATES,
    WEIGHT_DECAYS,
    AttentiveProbe,
    split_off_tenth,
    warm_cosine,
)
from evaluation.probes.attentive_heads import AttentiveHeads, attend, make_grid, num_attention_heads
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.toys import ToyImages, ToyNet, in_processes, to_tensor
from utils.errors import UserError
from vit.backbone import Features
from vit.weights import read_pickle

SMALL = {
    "learning_rates": (1e-2, 1.0),
    "weight_decays": (5e-4, 5e-2),
    "epochs": 4,
    "epoch_length": 6,
    "global_batch_size": 16,
    "batch_size": 8,
}


def make_probe(**options) -> AttentiveProbe:
    toys = {"transform": to_tensor, "train_transform": to_tensor}
    return AttentiveProbe(**{**toys, **SMALL, **options})


def make_data() -> dict:
    return {"train": ToyImages(120, 0), "val": ToyImages(37, 1)}


def judge() -> dict[str, float]:
    """Figures of the toy net; also what the two processes run."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_probe()(ToyNet(), make_data(), folder)


@pytest.mark.parametrize("dim", [64, 128, 96, 6])
def test_attention_is_the_written_out_one(dim):
    """Keys, values and torch's own attention give the same logits and gradients."""
    heads = AttentiveHeads(
        make_grid(["patch"], [1e-3, 1e-2], [0.0]), embed_dim=dim, num_classes=7
    ).double()
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(3, 10, dim, dtype=torch.float64)
    ours = heads({"patch": tokens})
    theirs = []
    for head in heads.heads.values():
        parts = num_attention_heads(dim)
        keys, values = head.kv(tokens).view(3, 10, 2, parts, -1).permute(2, 0, 3, 1, 4)
        query = head.query_token.view(1, parts, 1, -1).expand(3, -1, -1, -1)
        summed = nn.functional.scaled_dot_product_attention(query, keys, values)
        theirs.append(head.linear(summed.flatten(1)))
    torch.testing.assert_close(ours, torch.stack(theirs))
    parameters = dict(heads.named_parameters())
    for (name, mine), written in zip(
        zip(parameters, torch.autograd.grad(ours.sin().sum(), parameters.values()), strict=True),
        torch.autograd.grad(torch.stack(theirs).sin().sum(), parameters.values()),
        strict=True,
    ):
        torch.testing.assert_close(mine, written, msg=name, atol=1e-9, rtol=1e-7)


def test_grid_has_a_rate_and_a_decay_per_head():
    grid = make_grid(["cls", "avg_patch", "patch"], RATES, WEIGHT_DECAYS)
    heads = AttentiveHeads(grid, embed_dim=8, num_classes=3)
    groups = list(heads.param_groups())
    assert len(heads.names) == 90 and len(groups) == 180
    assert {group["lr"] for group in groups} == set(RATES)
    assert {group["weight_decay"] for group in groups} == {0.0, *WEIGHT_DECAYS}
    assert sum(len(group["params"]) for group in groups) == len(list(heads.parameters()))
    features = [Features(torch.randn(2, 8), torch.randn(2, 2, 2, 8))]
    assert heads(heads.read(features)).shape == (90, 2, 3)


def test_attention_heads_divide_the_channels():
    assert [num_attention_heads(dim) for dim in (6, 64, 96, 200, 1280)] == [1, 1, 1, 2, 20]


@any_backbone
def test_any_backbone(backbone, tmp_path):
    images = {"transform": None, "train_transform": None, "resize_size": 32, "crop_size": 32}
    probe = make_probe(**images, learning_rates=(0.1,), weight_decays=(5e-4,))
    with torch.no_grad():  # as within a training run
        figures = probe(make(backbone), make_data(), tmp_path)
    assert set(figures) == {
        f"attentive_{name}_top{k}" for name in ("cls", "avg_patch", "patch") for k in (1, 5)
    }
    assert max(figures.values()) > 40


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone = judge()
    assert in_processes(judge, 2, tmp_path) == [alone, alone]


def test_chosen_on_the_held_out_tenth_and_judged_on_val(tmp_path):
    figures = make_probe()(ToyNet(), make_data(), tmp_path, step=3)
    result = json.loads((tmp_path / "results.json").read_text())["attentive"]
    heads, best = result["figures"]["heads"], result["figures"]["best"]
    assert len(heads) == 12
    for name in ("cls", "avg_patch", "patch"):
        own = {key: head for key, head in heads.items() if key.startswith(f"{name}_lr")}
        held_out = {key: head["held-out tenth of train top-1"] for key, head in own.items()}
        assert held_out[best[name]] == max(held_out.values())
        assert figures[f"attentive_{name}_top1"] == own[best[name]]["val top-1"]
    assert (result["protocol"]["iterations"], result["protocol"]["step"]) == (24, 3)


def test_a_finished_probe_is_judged_again_and_a_stopped_one_goes_on(tmp_path, capsys):
    figures = make_probe()(ToyNet(), make_data(), tmp_path)
    final = read_pickle(tmp_path / "attentive_model_final.pth")["model"]
    final = {name: value.clone() for name, value in final.items()}
    assert make_probe()(ToyNet(), make_data(), tmp_path) == figures
    assert "going on after step 24 of 24" in capsys.readouterr().out
    (tmp_path / "last_attentive_checkpoint").write_text("running_checkpoint_attentive_eval.pth")
    assert make_probe()(ToyNet(), make_data(), tmp_path) == figures
    assert "going on after step 18 of 24" in capsys.readouterr().out
    again = read_pickle(tmp_path / "attentive_model_final.pth")["model"]
    assert all(torch.equal(again[name], value) for name, value in final.items())
    with pytest.raises(UserError, match="other settings"):
        make_probe(weight_decays=(0.1,))(ToyNet(), make_data(), tmp_path)


def test_the_split_is_the_published_one():
    kept, held_out = split_off_tenth(ToyImages(57, 0))
    order = np.random.default_rng(42).permutation(57)
    assert held_out.indices.tolist() == order[-6:].tolist()  # 51.3 images are kept
    assert sorted([*kept.indices, *held_out.indices]) == list(range(57))
    assert [len(split_off_tenth(ToyImages(n, 0))[0]) for n in (10, 15, 25)] == [9, 14, 22]
    with pytest.raises(UserError, match="9 images are too few"):
        split_off_tenth(ToyImages(9, 0))


@pytest.mark.parametrize("steps, warmup", [(40, 4), (17, 0), (9, 1), (6, 5), (3, 3), (1, 0)])
def test_rates_begin_and_end_at_zero(steps, warmup):
    """A line over the warm-up and half a cosine over the rest, both with their two ends."""
    line = np.linspace(0, 1, warmup)
    cosine = (1 + np.cos(np.linspace(0, np.pi, steps - warmup))) / 2
    schedule = warm_cosine(steps, warmup_steps=warmup)
    expected = pytest.approx([*line, *cosine], abs=1e-12)
    assert [schedule(step) for step in range(steps)] == expected


def test_a_net_without_patches(tmp_path):
    class Bare(ToyNet):
        def features(self, images, layers=(-1,)):
            return [Features(block.cls, None) for block in super().features(images, layers)]

    with pytest.raises(UserError, match=r"representations=\[cls\] in the attentive"):
        make_probe()(Bare(), make_data(), tmp_path)
    assert make_probe(representations=["cls"])(Bare(), make_data(), tmp_path / "cls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"representations": ["cls", "tokens"]},
            "representations must be one of cls, avg_patch",
        ),
        ({"representations": []}, "representations must be a list of cls"),
        ({"warmup_epochs": 5}, "warmup_epochs must lie in .0, 4., not 5"),
        ({"weight_decays": (-1.0,)}, "weight_decays must be finite and at least 0, not -1"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        make_probe(**options)


def test_rates_that_would_share_a_name_are_refused():
    with pytest.raises(ValueError, match="learning_rates: two of .* alike in their first six"):
        make_grid(["cls"], [1e-4, 1.0000001e-4], [0.0])


def test_attend_takes_many_heads_at_once():
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "query_token": (64,),
        "kv.weight": (128, 64),
        "kv.bias": (128,),
        "linear.weight": (5, 64),
        "linear.bias": (5,),
    }
    state = {name: torch.randn(3, *size, generator=generator) for name, size in sizes.items()}
    tokens = torch.randn(2, 9, 64, generator=generator)
    alone = [attend(tokens, {k: v[i : i + 1] for k, v in state.items()})[0] for i in range(3)]
    torch.testing.assert_close(attend(tokens, state), torch.stack(alone), atol=1e-4, rtol=1e-4)
