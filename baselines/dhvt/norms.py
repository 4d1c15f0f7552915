"""Batch norm whose statistics may be computed over all processes."""

import torch
import torch.distributed as dist
from torch import nn

from utils.ranges import check_word

SYNC = ("all", "stem", "none")


def batch_norm(channels: int, *, sync: bool = True) -> nn.BatchNorm2d | nn.SyncBatchNorm:
    """Batch norm of maps [B C h w]; parameter names are the same in both forms.

    sync: with the statistics of all processes, if the model is built in a process group of several
    that use GPUs; elsewhere torch has no synchronised form, and each process uses its own.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if sync and several and torch.cuda.is_initialized():
        return nn.SyncBatchNorm(channels)
    return nn.BatchNorm2d(channels)


def check_sync(sync_batch_norm: str) -> None:
    """Refuse an unknown choice of norms to synchronise."""
    check_word("sync_batch_norm", sync_batch_norm, SYNC)
