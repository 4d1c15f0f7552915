"""Numbers that a launcher or a user left in the environment."""

import os
from collections.abc import Mapping

from utils.errors import UserError


def whole_number(
    name: str, default: int | None = None, env: Mapping[str, str] | None = None
) -> int:
    """The whole number in a variable; UserError where there is none, nor a `default`.

    An empty variable (`RANK=$SLURM_PROCID` outside of a job) is a mistake too, default or not.
    """
    text = (os.environ if env is None else env).get(name, default)
    try:
        return int(str(text))
    except ValueError:
        raise UserError(f"{name} is {text!r}; set it to a whole number, or unset it") from None
