"""Turn errors that a user can fix into one line (UserError), in any command, at any time."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from utils.config.build import place_of, raised_by_us
from utils.errors import FULL, UserError, one_line

LESS_MEMORY = (
    "smaller batches take less (recipe.accumulation keeps the images of a training's step), and so "
    "do training.activation_checkpointing=true and training.sharding=shard"
)
NEEDS_COMPILER = (
    "torch found no compiler for C and C++, which compiling a net needs: install gcc and g++, name "
    "others in CC and CXX, or do without, training.compile=false"
)
_NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")
_SHOWN = "_octic_shown"  # attribute of an error whose traceback was printed
# A place that the user named, or its owner, is in the way.
BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """UserError for our own ValueErrors, a full disk, an unusable path, and lack of memory or of a
    compiler.

    With OCTIC_TRACEBACK=1 in the environment the whole traceback is printed first, to debug code of
    one's own.
    """
    try:
        yield
    except UserError as error:
        _show_origin(error)
        if type(error) is UserError:
            raise
        raise UserError(str(error)) from None  # by this name a launcher finds the line in a log
    except ValueError as error:
        _show_origin(error)
        if not raised_by_us(error):
            raise
        raise UserError(one_line(error) + place_of(error)) from None
    except OSError as error:
        if (told := _told(error)) is None:
            raise
        _show_origin(error)
        raise UserError(told) from None
    except RuntimeError as error:
        if _NO_COMPILER.search(str(error)):
            told = NEEDS_COMPILER
        elif is_short_of_memory(error):
            told = f"{_first_sentences(error)}; {LESS_MEMORY}"
        else:
            raise
        _show_origin(error)
        raise UserError(told) from None


def is_short_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library of CUDA that it calls, lacked memory on the device or host."""
    torch = sys.modules.get("torch")  # a launcher does without
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # A library of CUDA that takes its own memory has no error of that kind.
    said = ("DefaultCPUAllocator: can't allocate memory", "_STATUS_ALLOC_FAILED")
    return on_gpu or any(words in str(error) for words in said)


def _first_sentences(error: RuntimeError) -> str:
    """What was asked for and what there is, without advice on the allocator's settings."""
    words = one_line(error)
    if said := re.search(r"DefaultCPUAllocator: (.*? bytes)\.", words):
        return said[1]
    return re.split(r"\.? (?:Including|Of the allocated|If reserved|See documentation)", words)[0]


def _told(error: OSError) -> str | None:
    name = str(error.filename) if error.filename else ""
    if error.errno == errno.ENAMETOOLONG:
        return f"a path of {len(name)} characters is too long: {name[:60]}..."
    if error.errno in FULL:
        where = f"{name}: " if name else ""
        return f"{where}{error.strerror}; what was written before stays"
    if error.errno in BARRED and name:
        return f"{name}: {error.strerror}"
    return None


def _show_origin(error: BaseException) -> None:
    if os.environ.get("OCTIC_TRACEBACK", "0") == "0":
        return
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    if not getattr(error, _SHOWN, False):  # by a `mistakes_told` inside this one
        setattr(error, _SHOWN, True)
        traceback.print_exception(error)
