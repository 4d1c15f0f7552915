"""Buffers are put back as they were, however the forward pass changed them."""

import torch
from torch import nn

from utils.health import Health


class Counting(nn.Module):
    """Changes one buffer in place, replaces another, makes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("later", None)

    def forward(self, x):
        self.seen = self.seen + len(x)
        self.later = torch.ones(2)
        return self.norm(x)


def test_a_step_is_undone_whatever_it_did_to_the_buffers(monkeypatch):
    net, health = Counting(), Health()
    for _ in range(2):
        health.remember(net)
        net(torch.randn(4, 3))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    monkeypatch.setattr(nn.Module, "named_modules", None)  # the modules are walked once
    health.remember(net)
    net(torch.full((4, 3), torch.nan))
    assert net.norm.running_mean.isnan().all() and net.seen == 12
    health.undo()
    monkeypatch.undo()
    assert dict(net.named_buffers()).keys() == before.keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    other = Counting()
    health.remember(other)
    other(torch.randn(4, 3))
    health.undo()
    assert other.seen == 0 and net.seen == 8
