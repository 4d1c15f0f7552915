"""mypy: an attribute that torch's `Module.__getattr__` finds may be anything.

torch types it `Tensor | Module`, which makes every buffer, sub-module and method of a sub-module an
error where it is used. Attributes that a class declares keep their types.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

GUESS = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def _anything(context: AttributeContext) -> Type:
    found = get_proper_type(context.default_attr_type)
    if isinstance(found, UnionType):
        names = {getattr(get_proper_type(item), "type", None) for item in found.items}
        if {getattr(name, "fullname", "") for name in names} == GUESS:
            return AnyType(TypeOfAny.special_form)
    return found


class TorchPlugin(Plugin):
    """Turns exactly the union `Tensor | Module` into Any."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """mypy's hook: called for every attribute of every class."""
        return _anything


def plugin(version: str) -> type[Plugin]:
    """mypy's entry point."""
    return TorchPlugin
