"""Training a wrapper: what is frozen is cached and untouched, the best epoch stays."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from baselines.posthoc.symmetrized import Symmetrized
from baselines.posthoc.training import Augmented, PosthocTraining, accuracy, answer, embed
from tests.baselines.posthoc.toys import SMALL, make
from utils.data.random_turns import RandomTurn
from utils.data.transforms import evaluation_transform
from utils.errors import UserError
from utils.symmetry import SYMMETRIES, transform_image
from vit.models import deit_small_patch16_LS


class Bars:
    """Images with a bright stripe, upright or lying, or none: three classes that a turn mixes."""

    class_names = ["upright", "lying", "none"]

    def __init__(self, count: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.labels = np.arange(count) % 3
        self.pixels = self.random.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        for index, label in enumerate(self.labels):
            at = int(self.random.integers(4, 28))
            if label == 0:
                self.pixels[index, :, at : at + 3] = 255
            elif label == 1:
                self.pixels[index, at : at + 3] = 255
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        self.reads[index] += 1
        return Image.fromarray(self.pixels[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def path(self, index: int) -> str:
        return str(index)


TRANSFORM = evaluation_transform(resize_size=32, crop_size=32)


def wrapped(trained: str, **options) -> Symmetrized:
    torch.manual_seed(0)
    backbone = deit_small_patch16_LS(**SMALL, num_classes=3, init_values=1.0)
    return Symmetrized(backbone, "C4", "learned_score", trained=trained, **options)


def fit(net: Symmetrized, **options) -> tuple:
    train, validation = Bars(48, 0), Bars(24, 1)
    options = {"epochs": 6, "batch_size": 16, "lr": 1e-2, **options}
    silent: list[str] = []
    fitted = PosthocTraining(**options)(
        net, train, validation, transform=TRANSFORM, shown=silent.append
    )
    return fitted, train, validation


@pytest.mark.parametrize("trained", ["aggregator", "head"])
def test_a_frozen_backbone_reads_each_image_once_and_stays(trained):
    net = wrapped(trained)
    torch.nn.init.zeros_(net.model.head.weight)  # tells nothing apart, so that training is better
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    fitted, train, validation = fit(net)
    assert fitted.cached and set(train.reads.values()) == {1} == set(validation.reads.values())
    changed = {n for n, t in net.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == ({"head.weight", "head.bias"} if trained == "head" else set())


def test_training_on_the_cache_is_training_on_the_images():
    """The same batches through the net give the same gradients as the stored embeddings."""
    net, data = wrapped("head"), Bars(6, 0)
    stored = embed(net, data, TRANSFORM)
    images = torch.stack([TRANSFORM(data.read(i)) for i in range(6)])
    torch.testing.assert_close(net.eval().aggregate(stored.z), net(images), rtol=1e-5, atol=1e-6)
    embed(net.train(), data, TRANSFORM)
    assert net.training  # as it was


def test_an_augmentation_or_a_moving_backbone_reads_images_again():
    turned = {"augmentation": RandomTurn(turns="quarter")}
    for trained, options in (("head", turned), ("all", {})):
        fitted, train, _ = fit(wrapped(trained), epochs=2, **options)
        assert not fitted.cached and max(train.reads.values()) >= 2


def test_an_augmented_image_is_transformed_like_any_other():
    """A quarter turn before the transform is one after it; what normalises itself is refused."""
    image = Bars(1, 0).read(0)
    random.seed(0)
    found = {Augmented(RandomTurn(turns="quarter"), TRANSFORM)(image) for _ in range(20)}
    copies = [transform_image(TRANSFORM(image), element) for element in SYMMETRIES]
    assert all(any(torch.equal(one, copy) for copy in copies) for one in found)
    with pytest.raises(TypeError, match="this one gives Tensor"):
        Augmented(TRANSFORM, TRANSFORM)(image)


def test_another_optimiser_is_handed_what_is_trained():
    made = []

    def sgd(parameters, **options):
        made.append(torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options))
        return made[-1]

    net = wrapped("head")
    fit(net, epochs=1, lr=1e-3, weight_decay=0.25, optimizer=sgd)
    held = {id(p) for group in made[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    assert made[0].param_groups[0]["lr"] == 1e-3
    assert made[0].param_groups[0]["weight_decay"] == 0.25


def test_what_is_kept_is_the_best_epoch():
    net = wrapped("head")
    fitted, _, validation = fit(net, epochs=8)
    stored = embed(net, validation, TRANSFORM)
    assert accuracy(net, iter([stored])) == pytest.approx(fitted.validation_accuracy)
    assert not net.training and fitted.validation_accuracy >= 100 / 3


def test_it_is_adam_on_the_cross_entropy_and_the_best_epoch_comes_first():
    """Written out for batches of all images, whose order cannot matter."""
    net, plain = wrapped("head"), wrapped("head")
    fitted, train, validation = fit(net, epochs=8, batch_size=48)
    stored, held = (embed(plain, data, TRANSFORM) for data in (train, validation))
    head = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(head, lr=1e-2)
    weights, found = [plain.model.head.weight.clone()], [accuracy(plain, iter([held]))]
    for _ in range(8):
        plain.train()
        optimizer.zero_grad()
        logits = plain.aggregate(stored.z)
        torch.nn.functional.cross_entropy(logits, stored.labels).backward()
        optimizer.step()
        weights.append(plain.model.head.weight.detach().clone())
        found.append(accuracy(plain, iter([held])))
    assert fitted.best_epoch == found.index(max(found))
    assert fitted.validation_accuracy == pytest.approx(max(found))
    torch.testing.assert_close(net.model.head.weight, weights[fitted.best_epoch])


def test_all_of_it_trains_on_one_random_copy():
    net = wrapped("all", one_copy=True)
    before = net.model.blocks[0].attn.qkv.weight.clone()
    fitted, _, _ = fit(net, epochs=3, lr=1e-3)
    assert fitted.best_epoch == 0 or not torch.equal(net.model.blocks[0].attn.qkv.weight, before)


def test_the_same_seed_gives_the_same_weights():
    found = []
    for _ in range(2):
        net = wrapped("head")
        fit(net)
        found.append(net.model.head.weight.detach().clone())
    assert torch.equal(*found)


def test_all_that_is_random_follows_the_seed():
    """Stochastic depth and the copies drawn too; the caller's generators stay as they were."""
    found = []
    for before, seed in ((1, 0), (2, 0), (2, 3)):
        net = wrapped("all", one_copy=True)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        losses: list[str] = []
        data = Bars(48, 0)
        PosthocTraining(epochs=1, batch_size=16, lr=1e-2, seed=seed)(
            net, data, Bars(6, 1), transform=TRANSFORM, shown=losses.append
        )
        assert torch.equal(torch.get_rng_state(), state)
        found.append(losses)
    assert found[0] == found[1] != found[2]


def test_one_copy_of_stored_embeddings_trains_and_all_of_them_judge():
    """A frozen backbone's are drawn from as the images' are."""
    net, z = wrapped("head", one_copy=True), torch.randn(64, 4, 32)
    with torch.no_grad():
        alone = torch.stack([net.aggregate(z[:, [t]]) for t in range(4)], dim=1)
        gaps = (answer(net.train(), z)[:, None] - alone).abs().amax(dim=-1)
        torch.testing.assert_close(answer(net.eval(), z), net.aggregate(z))
    assert gaps.min(dim=1).values.max() < 1e-5
    assert len(gaps.argmin(dim=1).unique()) == 4


def test_nothing_to_train_is_one_line():
    with pytest.raises(UserError, match="trained=none leaves nothing to train"):
        fit(wrapped("none"))
    with pytest.raises(ValueError, match="epochs must be a whole number from 1"):
        PosthocTraining(epochs=0)


def test_published_lengths():
    """25 epochs, 60 for learned attention."""
    net = Symmetrized(make("small"), "C1", "learned_attention", trained="aggregator")
    data = Bars(8, 0)
    data.labels = data.labels % 2
    training = PosthocTraining(batch_size=8)
    fitted = training(net, data, data, transform=TRANSFORM, shown=lambda line: None)
    assert fitted.epochs == 60
    net = Symmetrized(make("small"), "C1", "mean", trained="head")
    assert training(net, data, data, transform=TRANSFORM, shown=lambda line: None).epochs == 25
