"""Count parameters and multiply-adds of a net, with every operator accounted for."""

from typing import NamedTuple

from evaluation.cost.models import Node, make_net
from utils.errors import UserError
from utils.flops import Operations, count_one_image


class Cost(NamedTuple):
    """Costs that do not depend on the machine; operations are those of one image."""

    parameters: int
    trainable: int
    operations: Operations  # a multiply-add is two

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a forward pass."""
        return self.operations.forward // 2

    @property
    def training_multiply_adds(self) -> int:
        """Multiply-adds of a forward and a backward pass."""
        return self.operations.total // 2


def count_cost(name: str, node: Node, *, size: int = 224) -> Cost:
    """Count a net on the meta device, or on the CPU if it does not run there.

    UserError, with the model and the operator, if an operator that may multiply has no formula,
    forward or backward, because its arithmetic would be missing silently.
    """
    net = make_net(name, node, "meta")
    try:
        operations = count_one_image(net, size)
    except RuntimeError:
        # No kernel for meta, no autocast on it, or shapes that depend on values, as where a reducer
        # counts the tokens it keeps. What is truly wrong is raised again.
        net = make_net(name, node, "cpu")
        operations = count_one_image(net, size)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    check_counted(name, operations)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    trainable = sum(count for count, trained in sizes if trained)
    return Cost(sum(count for count, _ in sizes), trainable, operations)


def check_counted(name: str, operations: Operations) -> None:
    """UserError if the count lacks some operator."""
    if operations.uncounted:
        raise UserError(
            f"{name}: no formula says what {', '.join(operations.uncounted)} computes, so its "
            "multiply-adds would be missing; torch.utils.flop_counter.register_flop_formula "
            "gives it one"
        )
