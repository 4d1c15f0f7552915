"""Losses of a classifier's logits: cross entropies, distillation, co-training of submodels.

Letters in shapes: B images, C classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.precision import at_least_float32
from utils.ranges import check_range, check_share, check_word
from vit.weights import load_net, read_state

LOSSES = ("bce", "ce")
KINDS = ("soft", "hard")


def present_classes(targets: Tensor, logits: Tensor) -> Tensor:
    """1 for every class with a share in the target, else 0: [B C], of the logits' dtype."""
    return (soft_targets(targets, logits.shape[1]) > 0).to(logits.dtype)


def soft_targets(targets: Tensor, num_classes: int) -> Tensor:
    """Targets [B C] as they are, class indices [B] as one-hot rows."""
    return targets if targets.ndim == 2 else F.one_hot(targets, num_classes).float()


def classification_loss(
    logits: Tensor, targets: Tensor, *, loss: str = "bce", smoothing: float = 0.0
) -> Tensor:
    """Loss of logits [B C] for class indices [B] or mixed targets [B C], a scalar.

    bce: a sigmoid per class, mean over images and classes; every class with a share in the target
    counts in full, so an image mixed of two classes is of both (Touvron et al. 2022, Wightman et
    al. 2021). ce: cross entropy, mean over images; `smoothing` spreads that share of indices
    evenly over the classes, while mixed targets bring their own.
    """
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, present_classes(targets, logits))
    if targets.ndim == 2:
        return F.cross_entropy(logits, targets.to(logits.dtype))
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def cosub_loss(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """Two subnetworks' logits [B C] against the targets and each other (Touvron et al. 2023).

    Drop path makes the subnetworks: the same images go through the network twice. Each also learns
    what the other says, through which no gradient flows. targets: a share [B C] in [0, 1] of each
    class for itself, taken as it is.
    """
    bce = F.binary_cross_entropy_with_logits
    told = bce(first, targets) + bce(second, targets)
    shared = bce(first, second.detach().sigmoid()) + bce(second, first.detach().sigmoid())
    return 0.25 * (told + shared)


class Distillation(nn.Module):
    """A frozen teacher that the classifier learns from beside the labels (Touvron et al. 2021).

    teacher: the teacher, or what makes it without arguments. weights: file that it is loaded from,
    which must fit to the last key; None for a teacher that brings its own. kind: `hard`, the
    teacher's best class by cross entropy, or `soft`, its probabilities at temperature `tau` by KL
    divergence, times tau^2 over the number of logits. alpha: the teacher's share of the loss.
    """

    def __init__(
        self,
        *,
        teacher: Callable[..., nn.Module],
        weights: str | None = None,
        kind: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        check_word("kind", kind, KINDS)
        check_share("alpha", alpha)
        check_range("tau", tau, ends="()")
        self.kind, self.alpha, self.tau = kind, alpha, tau
        made = teacher if isinstance(teacher, nn.Module) else teacher()
        self.teacher = made.requires_grad_(False).eval()
        if weights:
            _load(self.teacher, weights)

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """The teacher's part of the loss, for the classifier's logits [B C]."""
        with torch.no_grad():
            told = at_least_float32(self.teacher(images))
        if told.shape != logits.shape:
            raise ValueError(
                f"the teacher tells {told.shape[1]} classes, the classifier {logits.shape[1]}"
            )
        if self.kind == "hard":
            return F.cross_entropy(logits, told.argmax(dim=1))
        ours = F.log_softmax(logits / self.tau, dim=1)
        theirs = F.log_softmax(told / self.tau, dim=1)
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        return divergence * self.tau**2 / logits.numel()


def _load(net: nn.Module, path: str) -> None:
    try:
        load_net(net, read_state(path))
    except ValueError as error:
        raise ValueError(f"distillation.weights {path}: {error}") from None
