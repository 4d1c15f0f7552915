"""The average of a network, whatever happened to its tensors since it was made."""

import copy

import pytest
import torch
from torch import nn

from utils.moving_average import Held, MovingAverage


class Net(nn.Module):
    """Shared and plain parameters, batch statistics, and a table that is in no file."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.first.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def expected(average, net, share):
    """The rule, tensor by tensor."""
    theirs, found = net.state_dict(), {}
    for name, tensor in average.state_dict().items():
        moved = tensor.lerp(theirs[name], share) if tensor.is_floating_point() else theirs[name]
        found[name] = moved.clone()
    return found


def shaken(net):
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 8)
    return net


def replace_tensors(net):
    for part in net.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().clone()))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.clone())
    net.again.weight = net.first.weight


CHANGES = {
    "nothing": lambda net: None,
    "moved": lambda net: net.double(),
    "replaced": replace_tensors,
    "loaded": lambda net: net.load_state_dict(shaken(Net()).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_and_buffers_of_the_state_dict_move_once(change):
    """Bit for bit; a shared weight does not move twice, and a table does not move."""
    average, net = shaken(Net()), shaken(Net())
    moving = MovingAverage(average, net)
    change(average), change(net)
    net.table.fill_(7)
    wanted = expected(average, net, 0.3)
    moving.update(0.3)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert average.table.tolist() == [0, 1, 2]
    assert len(Held(net).parameters()) == len(list(net.parameters()))


def test_networks_of_different_makes_are_refused():
    with pytest.raises((RuntimeError, ValueError)):
        MovingAverage(Net(), nn.Linear(3, 3)).update(0.5)


def test_a_copy_holds_the_tensors_of_the_copy():
    """So that a recipe may be copied with its average."""
    net = Net()
    net.held = Held(net)
    other = copy.deepcopy(net)
    assert other.held.parameters()[0] is other.first.weight is not net.first.weight
