"""What a loss says of targets, mixed and not, and of a teacher."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deit.losses import Distillation, classification_loss, cosub_loss

LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 4, 1])


def mixed(share: float) -> torch.Tensor:
    targets = F.one_hot(LABELS, 5).double()
    return share * targets + (1 - share) * targets.flip(0)


def test_bce_counts_every_class_of_a_mixture_in_full():
    assert classification_loss(LOGITS, mixed(0.9)) == classification_loss(LOGITS, mixed(0.2))
    only_one = classification_loss(LOGITS, mixed(1.0))
    torch.testing.assert_close(only_one, classification_loss(LOGITS, LABELS))


def test_ce_is_linear_in_the_targets():
    ends = [classification_loss(LOGITS, mixed(share), loss="ce") for share in (0.0, 1.0)]
    half = classification_loss(LOGITS, mixed(0.25), loss="ce")
    torch.testing.assert_close(half, 0.75 * ends[0] + 0.25 * ends[1])


def test_smoothing_spreads_a_share_over_all_classes():
    smooth = classification_loss(LOGITS, LABELS, loss="ce", smoothing=0.2)
    targets = 0.8 * F.one_hot(LABELS, 5) + 0.2 / 5
    torch.testing.assert_close(smooth, classification_loss(LOGITS, targets, loss="ce"))


def test_cosub_of_equal_halves_has_no_gradient_between_them():
    first, second = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    cosub_loss(first, second, mixed(1.0)).backward()
    torch.testing.assert_close(first.grad, second.grad)
    alone = LOGITS.clone().requires_grad_()
    (0.25 * classification_loss(alone, LABELS)).backward()
    torch.testing.assert_close(first.grad, alone.grad)


def test_cosub_is_linear_in_the_targets():
    ends = [cosub_loss(LOGITS, LOGITS, mixed(share)) for share in (0.0, 1.0)]
    torch.testing.assert_close(
        cosub_loss(LOGITS, LOGITS, mixed(0.25)), 0.75 * ends[0] + 0.25 * ends[1]
    )


def test_each_subnetwork_learns_the_labels_and_what_the_other_says():
    """The gradient of each is a quarter of: its share less the label's, and less the other's."""
    first, second = LOGITS.clone().requires_grad_(), LOGITS.flip(1).requires_grad_()
    cosub_loss(first, second, mixed(0.3)).backward()
    p, q = first.detach().sigmoid(), second.detach().sigmoid()
    scale = 0.25 / LOGITS.numel()
    torch.testing.assert_close(first.grad, scale * (p - mixed(0.3) + p - q))
    torch.testing.assert_close(second.grad, scale * (q - mixed(0.3) + q - p))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_that_agrees_asks_for_nothing_or_for_more_of_the_same(kind):
    distillation = Distillation(teacher=nn.Identity, kind=kind, tau=3.0)
    logits = LOGITS.clone().requires_grad_()
    loss = distillation(LOGITS, logits)
    loss.backward()
    if kind == "soft":
        torch.testing.assert_close(loss.detach(), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits))
    else:
        best = LOGITS.argmax(1)
        torch.testing.assert_close(loss, F.cross_entropy(logits, best))


def test_a_teacher_may_be_made_already() -> None:
    """A node of a config without `_partial_` gives the network itself."""
    distillation = Distillation(teacher=nn.Identity(), kind="hard")
    assert isinstance(distillation.teacher, nn.Identity)


def test_soft_distillation_by_hand():
    """tau^2 KL(teacher || student) over the number of logits."""
    told = LOGITS.flip(1)
    ours = Distillation(teacher=nn.Identity, kind="soft", tau=2.0)(told, LOGITS)
    p, q = (told / 2).softmax(1), (LOGITS / 2).softmax(1)
    torch.testing.assert_close(ours, 4 * (p * (p / q).log()).sum() / LOGITS.numel())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "warm"}, "soft, hard"),
        ({"tau": 0.0}, "tau must be finite and above 0"),
        ({"alpha": 1.5}, "alpha must"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Distillation(teacher=nn.Identity, **options)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="tells 4 classes, the classifier 5"):
        Distillation(teacher=nn.Identity)(LOGITS[:, :4], LOGITS)


def test_a_teacher_is_loaded_to_the_last_key(tmp_path):
    net = nn.Linear(5, 3)
    torch.save({"model": net.state_dict()}, tmp_path / "teacher.pth")
    made = Distillation(teacher=lambda: nn.Linear(5, 3), weights=str(tmp_path / "teacher.pth"))
    assert torch.equal(made.teacher.weight, net.weight)
    with pytest.raises(ValueError, match="distillation.weights .*teacher.pth"):
        Distillation(teacher=lambda: nn.Linear(5, 4), weights=str(tmp_path / "teacher.pth"))
