"""The grid of heads: one optimiser of rate 1 equals one group per head, and no head is lost."""

import copy

import pytest
import torch
from torch import nn

from evaluation.probes.linear import MOMENTUM, RATES
from evaluation.probes.linear_heads import (
    Input,
    LinearHeads,
    head_losses,
    make_grid,
    name_heads,
    published_name,
)
from evaluation.probes.training import train_heads
from utils.errors import UserError
from utils.schedules import Cosine
from vit.backbone import Features

DIM, CLASSES, BLOCKS, STEPS = 5, 4, 4, 9
FULL_GRID = make_grid([1, 4], [False, True], RATES)


def draw_features(count: int, seed: int = 0) -> list[Features]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Features(
            torch.randn(count, DIM, generator=generator),
            torch.randn(count, 2, 3, DIM, generator=generator),
        )
        for _ in range(BLOCKS)
    ]


def make_heads(grid=None, seed: int = 0) -> LinearHeads:
    return LinearHeads(
        FULL_GRID if grid is None else grid,
        embed_dim=DIM,
        num_classes=CLASSES,
        generator=torch.Generator().manual_seed(seed),
    )


def train(heads: LinearHeads, steps: int = STEPS, batch: int = 6) -> list[torch.Tensor]:
    """Train on drawn features; the labels of each step."""
    optimizer = torch.optim.SGD(
        [{"params": list(heads.parameters()), "initial_lr": 1.0}], lr=1.0, momentum=MOMENTUM
    )
    generator = torch.Generator().manual_seed(5)
    labels = [torch.randint(CLASSES, (batch,), generator=generator) for _ in range(steps)]
    done = train_heads(
        heads,
        lambda images: draw_features(batch, seed=int(images)),
        optimizer,
        iter([(torch.tensor(step), part) for step, part in enumerate(labels)]),
        schedule=Cosine(base=1.0, final=0.0, num_steps=steps),
        num_steps=steps,
    )
    assert list(done) == list(range(steps))
    return labels


def test_one_group_of_rate_1_equals_a_group_per_head():
    """Written out with torch's own layers, groups and CosineAnnealingLR."""
    heads = make_heads()
    start = copy.deepcopy(heads.published_state())
    labels = train(heads)
    layers = []
    for name, head in zip(heads.names, FULL_GRID, strict=True):
        layer = nn.Linear(head.input.width([DIM] * 4), CLASSES)
        prefix = f"classifiers_dict.{name}.linear."
        layer.load_state_dict({k: start[prefix + k] for k in ("weight", "bias")})
        layers.append(layer)
    groups = [
        {"params": list(layer.parameters()), "lr": head.lr}
        for layer, head in zip(layers, FULL_GRID, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
    for step, part in enumerate(labels):
        features = draw_features(len(part), seed=step)
        losses = []
        for layer, head in zip(layers, FULL_GRID, strict=True):
            cls = [block.cls for block in features[-head.input.num_blocks :]]
            pooled = [features[-1].patches.mean((1, 2))] if head.input.avgpool else []
            logits = layer(torch.cat(cls + pooled, dim=1))
            losses.append(nn.functional.cross_entropy(logits, part))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        scheduler.step()
    state = heads.published_state()
    for name, layer in zip(heads.names, layers, strict=True):
        prefix = f"classifiers_dict.{name}.linear."
        for kind, value in layer.state_dict().items():
            torch.testing.assert_close(state[prefix + kind], value, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("batch_size", [128, 256, 1024])
def test_names_are_published_ones_and_all_different(batch_size):
    grid = make_grid([1, 4], [False, True], [rate * batch_size / 256 for rate in RATES])
    names = name_heads(grid)
    assert len(set(names)) == len(names) == 52
    shared = {name for name in map(published_name, grid)}
    for name, head in zip(names, grid, strict=True):
        assert name == published_name(head) or batch_size == 128
    assert len(shared) == (48 if batch_size == 128 else 52)
    if batch_size == 128:
        assert names[:3] == [
            "classifier_1_blocks_avgpool_False_lr_0_000005",
            "classifier_1_blocks_avgpool_False_lr_0_000010",
            "classifier_1_blocks_avgpool_False_lr_0_00003",
        ]


def test_inputs_are_made_once_and_blocks_read_early_first():
    heads, features = make_heads(), draw_features(2)
    inputs = heads.read(features)
    assert heads.layers == (-4, -3, -2, -1)
    assert [x.shape[1] for x in inputs] == [DIM, 2 * DIM, 4 * DIM, 5 * DIM]
    assert torch.equal(inputs[3][:, :DIM], features[0].cls)
    assert torch.equal(inputs[3][:, -DIM:], features[-1].patches.mean((1, 2)))
    assert heads(inputs).shape == (52, 2, CLASSES)
    assert len(list(heads.parameters())) == 8


def test_weights_begin_small_and_biases_at_zero():
    heads = LinearHeads(FULL_GRID, embed_dim=64, num_classes=50)
    assert heads.weights[3].std().item() == pytest.approx(0.01, rel=0.02)
    assert all(not bias.any() for bias in heads.biases)


def test_a_diverging_head_leaves_the_others_alone():
    rates = [0.1, 1e38]
    heads = make_heads(make_grid([1], [False], rates))
    train(heads)
    alone = make_heads(make_grid([1], [False], rates))
    with torch.no_grad():
        alone.loss_weights[1] = 0
    train(alone)
    torch.testing.assert_close(heads.weights[0][0], alone.weights[0][0])
    assert not torch.isfinite(heads.weights[0][1]).all()


def test_losses_are_means_over_images():
    logits, labels = torch.randn(3, 8, CLASSES), torch.randint(CLASSES, (8,))
    expected = [nn.functional.cross_entropy(part, labels) for part in logits]
    torch.testing.assert_close(head_losses(logits, labels), torch.stack(expected))


def test_a_net_without_patches_is_told_what_to_do():
    features = [Features(torch.zeros(1, DIM), None)]
    assert Input(1, False).read(features).shape == (1, DIM)
    with pytest.raises(UserError, match=r"gives no patches .*avgpools=\[false\]"):
        Input(1, True).read(features)


def test_other_heads_are_refused():
    heads = make_heads()
    state = copy.deepcopy(heads.published_state())
    other = make_heads(make_grid([1], [False], [0.3]))
    with pytest.raises(UserError, match="another grid of heads: 2 missing .*104 left over"):
        other.load_published(state)
    narrower = LinearHeads(FULL_GRID, embed_dim=DIM - 1, num_classes=CLASSES)
    with pytest.raises(UserError, match=r"another net or data set: .*\[4, 5\], here \[4, 4\]"):
        narrower.load_published(state)


def test_blocks_may_be_of_different_widths():
    """A CNN's last stages: their class tokens side by side, the last one's patches pooled."""
    features = [Features(torch.randn(2, w), torch.randn(2, 3, 3, w)) for w in (2, 3, 5, 7)]
    heads = LinearHeads(
        make_grid([1, 4], [False, True], [0.1]), embed_dim=[2, 3, 5, 7], num_classes=4
    )
    inputs = heads.read(features)
    assert [x.shape[1] for x in inputs] == [7, 14, 17, 24]
    assert heads(inputs).shape == (4, 2, 4)
