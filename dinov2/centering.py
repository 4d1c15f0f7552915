"""Targets from the teacher's logits: softmax after centring, or Sinkhorn-Knopp assignment.

Caron et al. 2021 (centre), Caron et al. 2020 (Sinkhorn-Knopp in SwAV). Both look at the batch of
all ranks, so every rank must call them, and both work without a process group. Letters in shapes:
B rows (images or patches), K prototypes.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_max, all_reduce_mean
from utils.precision import at_least_float32
from utils.ranges import check_word

CENTERINGS = ("centering", "sinkhorn_knopp")
PIECE = 2**23  # logits that Sinkhorn-Knopp works on at a time


class Targets(nn.Module):
    """Probabilities [B K] for logits [B K], by one of the two centerings.

    valid [B] marks the rows that count; the others only pad, and their result is to be ignored.
    """

    def __init__(self, num_prototypes: int, *, centering: str = "centering") -> None:
        super().__init__()
        check_word("centering", centering, CENTERINGS)
        self.centering = centering
        self.ema = EmaCenter(num_prototypes)

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """Targets [B K] of a batch; with centring its mean is also kept for `update`."""
        with torch.autocast(device_type=logits.device.type, enabled=False):
            if self.centering == "sinkhorn_knopp":
                return sinkhorn_knopp(at_least_float32(logits), temperature, valid=valid)
            return self.ema(logits, temperature, valid)

    def update(self) -> None:
        """Move the centre by the batches since the last call; once per optimiser step."""
        if self.centering == "centering":
            self.ema.update()


class EmaCenter(nn.Module):
    """Moving average of the mean logits over micro-batches and ranks: c <- m c + (1 - m) mean.

    The update is lagged: the logits of a step move the centre after the step, so no step sees its
    own mean. Until then the means are summed in two buffers, which are zero between steps and not
    saved. Every micro-batch with a valid row has the same weight, so k micro-batches on one rank
    move the centre as one on each of k ranks.

    Departs from DINOv2: the moved centre is stored at the end of the step instead of at the next
    use, because a checkpoint between the two would lose it. The centres used are the same.
    """

    center: Tensor
    waiting: Tensor
    num_waiting: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("waiting", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("num_waiting", torch.zeros(()), persistent=False)

    def forward(self, logits: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
        """Softmax of logits [B K] minus the centre; their mean is kept for `update`."""
        logits = at_least_float32(logits)
        targets = torch.softmax((logits - self.center) / temperature, dim=-1)
        self.keep(logits, valid)
        return targets

    def keep(self, logits: Tensor, valid: Tensor | None = None) -> None:
        """Note the mean of the valid rows of [B K] for the next update."""
        if valid is None:
            valid = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        num_valid = valid.sum()
        total = torch.where(valid[:, None], logits, 0).sum(dim=0)
        self.waiting += total / num_valid.clamp(min=1)
        self.num_waiting += num_valid > 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre. Collective: every rank must call this."""
        total = all_reduce_mean(torch.cat([self.waiting, self.num_waiting[None]]))
        share = total[-1]  # micro-batches with valid rows, mean over the ranks
        mean = total[:-1] / share.clamp(min=1e-12)
        moved = self.momentum * self.center + (1 - self.momentum) * mean
        self.center.copy_(torch.where(share > 0, moved, self.center))
        self.waiting.zero_()
        self.num_waiting.zero_()


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, *, valid: Tensor | None = None, num_iterations: int = 3
) -> Tensor:
    """Share the rows of [B K] evenly among the prototypes: rows of the result sum to 1.

    Alternately scales exp(z / temperature) so that every prototype, then every row has the same
    mass, over all ranks. Done with logarithms (r of the prototypes, c of the rows), so logits of
    any size stay finite; the constants of the published form cancel in its last step. Beside the
    result, tensors of at most `PIECE` values (or one row) are made.
    Departs from DINOv2: exponentials there have no maximum subtracted and overflow at logits of 4.
    With accumulation the rows of one micro-batch are shared, the others being unknown.
    """
    top = logits.amax(dim=1, keepdim=True)
    scores = (logits - top).div_(temperature)  # [B K], at most 0
    pieces = scores.split(max(1, PIECE // logits.shape[1]))
    c = top[:, 0] / temperature
    r = logits.new_zeros(logits.shape[1])
    for _ in range(num_iterations):
        if valid is not None:
            c = torch.where(valid, c, -torch.inf)
        r = _add_over_ranks(_logsumexp_of_columns(pieces, c))
        c = torch.cat([-torch.logsumexp(piece - r, dim=1) for piece in pieces])
    for piece in pieces:
        piece.copy_(torch.softmax(piece - r, dim=1))
    return scores


def _logsumexp_of_columns(pieces: Sequence[Tensor], c: Tensor) -> Tensor:
    """Log-sum-exp [K] over the rows of all pieces [b K], each row shifted by its entry of c [B]."""
    shifts = c.split([len(piece) for piece in pieces])
    parts = [
        torch.logsumexp(piece + shift[:, None], dim=0)
        for piece, shift in zip(pieces, shifts, strict=True)
    ]
    return reduce(torch.logaddexp, parts)


def _add_over_ranks(local: Tensor) -> Tensor:
    """Logarithms [K] of a rank's sums to those of all ranks', up to a constant, which cancels."""
    top = all_reduce_max(local)
    top = torch.where(top.isfinite(), top, 0)  # -inf: no rank has a row
    result = top + torch.log(all_reduce_mean(torch.exp(local - top)))
    return torch.where(result.isfinite(), result, 0)
