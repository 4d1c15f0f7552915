"""The recipe keeps its promises to the loop, in every family and with every option."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import Lamb
from torch import nn

from deit.losses import Distillation
from deit.mixing import Mixing
from deit.param_groups import freeze, undecayed
from deit.schedules import Schedules
from tests.deit.tiny import BACKBONES, Noise, make_backbone, make_batch, make_recipe
from utils.data.classes import class_metadata
from utils.optimizers import (
    apply_schedules,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from vit.adapters import timm_backbone
from vit.parallel import ParallelVisionTransformer


def make_training(recipe):
    return make_optimizer(lambda groups: Lamb(groups, eps=1e-8), recipe.param_groups(), recipe)


def take_step(recipe, optimizer, step, *batches):
    apply_schedules(optimizer, recipe.schedules, step)
    optimizer.zero_grad()
    for batch in batches:
        losses = recipe.losses(batch, step)
        (losses["loss"] / len(batches)).backward()
    optimizer.step()
    recipe.after_step(step)
    return losses["loss"].detach()


def gradients(recipe):
    return {n: p.grad.clone() for n, p in recipe.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("options", [{}, {"cosub": True}, {"loss": "ce", "smoothing": 0.1}])
def test_every_parameter_gets_a_gradient(family, options):
    recipe = make_recipe(family, **options)
    losses = recipe.losses(make_batch(mixed=True), 0)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and losses["loss"].ndim == 0
    assert {n for n, p in recipe.model.named_parameters() if p.grad is None} == set()
    assert all(p.grad is None for p in recipe.ema.parameters())


@pytest.mark.parametrize("mixed", [True, False])
def test_micro_batches_accumulate_to_the_whole_batch(mixed):
    recipe = make_recipe().double()
    batch = {
        k: v.double() if v.is_floating_point() else v for k, v in make_batch(8, mixed=mixed).items()
    }
    recipe.losses(batch, 0)["loss"].backward()
    whole = gradients(recipe)
    recipe.zero_grad()
    for part in range(2):
        micro = {name: value.chunk(2)[part] for name, value in batch.items()}
        (recipe.losses(micro, 0)["loss"] / 2).backward()
    for name, value in gradients(recipe).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


def test_the_average_follows_parameters_and_buffers():
    recipe = make_recipe(ema_decay=0.9, backbone=make_timm)
    before = {k: v.clone() for k, v in recipe.ema.state_dict().items()}
    for tensor in recipe.model.state_dict().values():
        tensor.add_(1)
    recipe.after_step(0)
    theirs = recipe.model.state_dict()
    for name, ours in recipe.ema.state_dict().items():
        if ours.is_floating_point():
            torch.testing.assert_close(ours, 0.9 * before[name] + 0.1 * theirs[name])
        else:
            assert torch.equal(ours, theirs[name])


def test_the_average_follows_the_statistics_of_all_processes(monkeypatch):
    """Not those that one process had before they became one."""
    recipe = make_recipe(ema_decay=0.75, backbone=make_timm)

    def become_five(buffers):
        for buffer in buffers:
            buffer.fill_(5)

    before = {name: b.clone() for name, b in recipe.ema.named_buffers() if b.is_floating_point()}
    monkeypatch.setattr("deit.recipe.average_buffers", become_five)
    recipe.after_step(0)
    assert before and all((b == 5).all() for b in recipe.model.buffers())
    ours = dict(recipe.ema.named_buffers())
    for name, old in before.items():
        torch.testing.assert_close(ours[name], 0.75 * old + 0.25 * 5)


def test_export_chooses_model_or_average():
    recipe = make_recipe()
    assert recipe.exported is recipe.model and recipe.model.training and not recipe.ema.training
    averaged = make_recipe(export="ema")
    assert averaged.exported is averaged.ema
    assert make_recipe(ema_decay=0).ema is None
    with pytest.raises(ValueError, match="ema_decay above 0"):
        make_recipe(export="ema", ema_decay=0)


def make_timm(**keywords):
    return timm_backbone("test_resnet", num_classes=3, **keywords)


@pytest.mark.parametrize("layerwise_decay", [1.0, 0.5])
def test_any_timm_network_trains(layerwise_decay):
    recipe = make_recipe(backbone=make_timm, layerwise_decay=layerwise_decay)
    optimizer = make_training(recipe)
    batch = make_batch()
    batch["images"] = torch.randn(4, 3, 64, 64)
    assert take_step(recipe, optimizer, 5, batch).isfinite()


class TwoHeads(nn.Module):
    """Logits that learn the labels, and logits that learn from a teacher."""

    def __init__(self, drop_path_rate=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(768, 3), nn.Linear(768, 3)

    def forward(self, images):
        flat = images.flatten(1)
        return self.first(flat), self.second(flat)


def test_two_heads_are_told_apart():
    distillation = Distillation(teacher=make_backbone("plain"), kind="hard", alpha=0.25)
    recipe = make_recipe(backbone=TwoHeads, distillation=distillation)
    losses = recipe.losses(make_batch(), 0)
    expected = 0.75 * losses["label_loss"] + 0.25 * losses["distillation_loss"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    label = torch.autograd.grad(losses["loss"], recipe.model.second.bias)[0]
    assert label.abs().sum() > 0


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_first_head_learns_the_labels_and_the_second_the_teacher(alpha):
    """A share of 0 leaves the teacher's head alone, one of 1 the labels'."""
    distillation = Distillation(teacher=make_backbone("plain"), alpha=alpha)
    recipe = make_recipe(backbone=TwoHeads, distillation=distillation)
    recipe.losses(make_batch(), 0)["loss"].backward()
    first, second = (float(h.bias.grad.abs().sum()) for h in recipe.model.children())
    assert (first > 0, second > 0) == (alpha == 0, alpha == 1)


def test_the_teacher_never_trains():
    distillation = Distillation(teacher=make_backbone("plain", drop_path_rate=0.5), kind="soft")
    recipe = make_recipe(distillation=distillation).train()
    assert not recipe.distillation.training and not recipe.distillation.teacher.training
    first, second = (recipe.losses(make_batch(), 0)["loss"] for _ in range(2))
    assert torch.equal(first, second)
    first.backward()
    assert all(p.grad is None for p in recipe.distillation.parameters())


@pytest.mark.parametrize("family", BACKBONES)
def test_weight_decay_spares_vectors_tokens_and_positions(family):
    model = make_recipe(family).model
    exempt = undecayed(model)
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name == "cls_token" or name.startswith("pos_embed")
        assert (name in exempt) == spared, name


def test_layerwise_decay_falls_towards_the_first_block():
    recipe = make_recipe(layerwise_decay=0.5)
    rates = {id(p): g["lr_multiplier"] for g in recipe.param_groups() for p in g["params"]}
    named = {name: rates[id(p)] for name, p in recipe.model.named_parameters()}
    falling = (
        "head",
        "norm",
        "blocks.1.mlp.fc1",
        "blocks.0.mlp.fc1.lin_E",
        "patch_embed.lift8.conv_A1",
    )
    assert [named[f"{name}.weight"] for name in falling] == [1, 0.5, 0.5, 0.25, 0.125]
    assert named["cls_token"] == named["pos_embed.0"] == 0.125
    exempt = undecayed(recipe.model)
    for group in recipe.param_groups():
        for parameter in group["params"]:
            name = next(n for n, p in recipe.model.named_parameters() if p is parameter)
            assert (group["weight_decay_multiplier"] == 0) == (name in exempt), name


@pytest.mark.parametrize("family", BACKBONES)
def test_what_is_frozen_stays(family):
    for trainable in ("head", "attention"):
        recipe = make_recipe(family, trainable=trainable, schedules=Schedules(warmup_epochs=0))
        optimizer = make_training(recipe)
        before = {n: p.clone() for n, p in recipe.model.named_parameters()}
        take_step(recipe, optimizer, 0, make_batch())
        for name, parameter in recipe.model.named_parameters():
            kept = name.startswith("head.") or (
                trainable == "attention" and (".attn." in name or name.startswith("pos_embed"))
            )
            assert kept == parameter.requires_grad, name
            if not kept:
                assert torch.equal(before[name], parameter), name
        assert not torch.equal(before["head.weight"], recipe.model.head.weight)


def test_what_a_network_froze_itself_stays_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    freeze(model, "all")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_both_attentions_of_a_parallel_block_train():
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = ParallelVisionTransformer(**size, num_classes=3)
    freeze(model, "attention")
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"blocks.0.attn.qkv.weight", "blocks.0.attn1.qkv.weight"} <= training
    assert not any(".mlp" in name or ".norm" in name for name in training)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "mse"}, "bce, ce"),
        ({"smoothing": 0.1}, "every class a target"),
        ({"cosub": True, "loss": "ce"}, "cosub goes with"),
        (
            {"cosub": True, "distillation": Distillation(teacher=nn.Identity)},
            "cosub goes with loss=bce and without distillation",
        ),
        ({"batch_size_per_gpu": 3, "mixing": Mixing()}, "must be even"),
        ({"effective_batch_size": 10}, "batch_size_per_gpu=2 accumulation=5"),
        ({"backbone": make_backbone(num_classes=10)}, "backbone.num_classes=3"),
        ({"trainable": "neck"}, "all, attention, head"),
        ({"schedules": Schedules(warmup_epochs=9)}, "more than the 4 epochs"),
    ],
)
def test_mistakes_are_told_in_one_line(options, said):
    with pytest.raises(ValueError, match=said):
        make_recipe(**options)


def test_images_without_labels_are_refused():
    unlabelled = Noise()
    unlabelled.labels = None
    with pytest.raises(ValueError, match="no labels"):
        make_recipe(dataset=unlabelled)


def test_the_effective_batch_sets_steps_and_accumulation():
    recipe = make_recipe(effective_batch_size=8, batch_size_per_gpu=2, dataset=Noise(40))
    assert (recipe.accumulation, recipe.epoch_length, recipe.total_steps) == (4, 5, 20)


@pytest.mark.parametrize("batch_size_per_gpu", [64, 128])
def test_the_published_run_has_250_000_steps(batch_size_per_gpu):
    recipe = make_recipe(
        dataset=range(1_281_167),
        epochs=400,
        effective_batch_size=2048,
        batch_size_per_gpu=batch_size_per_gpu,
    )
    assert (recipe.epoch_length, recipe.total_steps) == (625, 250_000)


def test_batches_are_mixed_and_reproducible():
    def draw(first_step):
        recipe = make_recipe(mixing=Mixing(), accumulation=2)
        batches = recipe.batches(first_step)
        return [recipe.prepare(next(batches)) for _ in range(4)]

    batches = draw(0)
    assert batches[0]["images"].shape == (4, 3, 16, 16) and batches[0]["targets"].shape == (4, 3)
    for ours, theirs in zip(batches[2:], draw(1), strict=False):
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["targets"], theirs["targets"])


def test_weights_of_another_resolution_and_other_classes(tmp_path):
    source = make_recipe(backbone=make_backbone(num_classes=7, img_size=24), dataset=range(12))
    save_file(source.model.state_dict(), tmp_path / "weights.safetensors")
    recipe = make_recipe()
    recipe.load_weights(str(tmp_path / "weights.safetensors"))
    theirs = dict(source.model.named_parameters())
    ours = dict(recipe.model.named_parameters())
    assert torch.equal(ours["norm.weight"], theirs["norm.weight"])
    assert ours["head.weight"].shape == (3, 16)
    for name, value in recipe.ema.state_dict().items():
        assert torch.equal(value, recipe.model.state_dict()[name])


def test_what_was_adapted_is_told_by_one_process(tmp_path, monkeypatch, caplog):
    source = make_recipe(backbone=make_backbone(num_classes=7, img_size=24), dataset=range(12))
    save_file(source.model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr("deit.recipe.is_main", lambda: False)
    make_recipe().load_weights(str(tmp_path / "weights.safetensors"))
    assert not caplog.records
    monkeypatch.undo()
    make_recipe().load_weights(str(tmp_path / "weights.safetensors"))
    assert "pos_embed: resampled" in caplog.text


@pytest.mark.parametrize("family", ["hybrid", "plain"])
def test_as_many_but_other_classes_start_with_a_fresh_head(tmp_path, family, caplog):
    """A head keeps its meaning alone: the same classes, in the same order."""
    trained = make_recipe(family).model
    state = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    save_file(state, tmp_path / "same.safetensors", class_metadata(Noise()))
    others = Noise()
    others.class_names = ["class 0", "class 2", "class 1"]
    save_file(state, tmp_path / "other.safetensors", class_metadata(others))
    for file, kept in (("same", True), ("other", False)):
        recipe = make_recipe(family)
        fresh = recipe.model.head.weight.clone()
        assert not torch.equal(fresh, trained.head.weight)
        recipe.load_weights(str(tmp_path / f"{file}.safetensors"))
        wanted = trained.head.weight if kept else fresh
        assert torch.equal(recipe.model.head.weight, wanted)
        assert torch.equal(recipe.ema.head.weight, wanted)
        name = next(n for n in state if n.startswith("blocks.1.attn"))
        assert torch.equal(recipe.model.state_dict()[name], state[name])
    assert "class 1 was 'class 2' in training" in caplog.text


def test_training_goes_on_as_if_never_stopped():
    """What is saved, LAMB's count of steps included, is all there is."""
    recipe = make_recipe()
    optimizer = make_training(recipe)
    batches = [make_batch(seed=step) for step in range(6)]
    for step in range(3):
        take_step(recipe, optimizer, step, batches[step])
    state = copy.deepcopy((recipe.state_dict(), optimizer_state(optimizer, recipe)))
    expected = [take_step(recipe, optimizer, step, batches[step]) for step in range(3, 6)]
    fresh = make_recipe()
    fresh.load_state_dict(state[0])
    optimizer = make_training(fresh)
    load_optimizer_state(optimizer, fresh, state[1])
    found = [take_step(fresh, optimizer, step, batches[step]) for step in range(3, 6)]
    assert found == expected
    for name, value in recipe.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_bfloat16_computes_its_losses_in_float32():
    recipe = make_recipe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = recipe.losses(make_batch(mixed=True), 0)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, recipe.losses(make_batch(mixed=True), 0)["loss"], rtol=0.03, atol=0.03
    )


def test_it_learns():
    recipe = make_recipe(schedules=Schedules(warmup_epochs=0, lr=0.1))
    optimizer, batch = make_training(recipe), make_batch()
    losses = [take_step(recipe, optimizer, 0, batch).item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_any_callable_on_an_image_is_an_augmentation():
    recipe = make_recipe(augmentation=lambda image: torch.zeros(3, 16, 16))
    batch = recipe.prepare(next(recipe.batches(0)))
    assert batch["images"].shape[1:] == (3, 16, 16)
