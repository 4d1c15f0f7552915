"""One batch size per optimiser step, whatever the number of GPUs that share it; steps of a run."""

from utils.errors import UserError
from utils.ranges import OutOfRange, check_count, check_range


def micro_batches(
    effective_batch_size: int | None,
    batch_size_per_gpu: int,
    processes: int,
    accumulation: int | None = None,
) -> int:
    """Micro-batches per step that make up `effective_batch_size` images over all processes.

    A given `accumulation` is never changed: UserError, with numbers that would do, where the
    product is another. Without an effective size, `accumulation` or 1.
    """
    check_count("batch_size_per_gpu", batch_size_per_gpu, 1)
    if accumulation is not None:
        check_count("accumulation", accumulation, 1)
    if effective_batch_size is None:
        return accumulation or 1
    check_count("effective_batch_size", effective_batch_size, 1)
    share = batch_size_per_gpu * processes
    needed, rest = divmod(effective_batch_size, share)
    if rest == 0 and accumulation in (None, needed):
        return needed
    times = "" if accumulation is None else f" x accumulation {accumulation}"
    raise UserError(
        f"batch_size_per_gpu {batch_size_per_gpu} x {processes} processes{times} does not make "
        f"effective_batch_size {effective_batch_size}; "
        + _what_would_do(effective_batch_size, batch_size_per_gpu, processes)
        + f", and effective_batch_size={share * (accumulation or 1)} would accept another batch"
    )


def shared_batches(effective_batch_size: int, at_most: int, processes: int) -> tuple[int, int]:
    """Images per micro-batch and micro-batches per step: as few as `at_most` images each allow.

    UserError, with numbers that would do, where the processes cannot share the step evenly.
    """
    own, rest = divmod(effective_batch_size, processes)
    if rest or own < 1 or at_most < 1:
        raise UserError(
            f"{effective_batch_size} images per step, {at_most} at a time, cannot be shared evenly "
            f"by {processes} processes; {max(own, 1) * processes} images per step can"
        )
    count = next(n for n in range(-(-own // at_most), own + 1) if own % n == 0)
    return own // count, count


def count_steps(
    epochs: float, epoch_length: int, *, images: int, batch_size: int
) -> tuple[int, int]:
    """Steps of an epoch and of the whole run, of `batch_size` images each.

    epoch_length <= 0 means one pass over the images. OutOfRange where no step comes out.
    """
    check_range("epochs", epochs, ends="()")
    if epoch_length <= 0:
        epoch_length = max(1, images // batch_size)
    total = round(epochs * epoch_length)
    if total < 1:
        raise OutOfRange(f"epochs {epochs} of {epoch_length} steps each make no step")
    return epoch_length, total


def _what_would_do(effective: int, batch_size_per_gpu: int, processes: int) -> str:
    if effective % processes:
        fewer = max(n for n in range(1, processes) if effective % n == 0)
        return f"{fewer} processes could share it"
    own = effective // processes
    sizes = [n for n in range(1, min(batch_size_per_gpu, own) + 1) if own % n == 0]
    size = max([n for n in sizes if n % 2 == 0] or sizes)
    return f"batch_size_per_gpu={size} accumulation={own // size} would keep it"
