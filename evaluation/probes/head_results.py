"""Report many heads: percentages of each, and a table of the best."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from evaluation.results import print_table

SHOWN_HEADS = 10


def by_head(
    names: Sequence[str], columns: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[str, float]]:
    """Percentages of every head, by data set and k."""
    return {
        name: {
            f"{column} top-{k}": 100 * fractions[index].item()
            for column, by_k in columns.items()
            for k, fractions in by_k.items()
        }
        for index, name in enumerate(names)
    }


def print_heads(
    names: Sequence[str], by_k: Mapping[int, Tensor], judged_on: str, protocol: Mapping[str, object]
) -> None:
    """Print the best heads; ties are in the order of the grid."""
    top1 = by_k[1].tolist()
    order = sorted(range(len(names)), key=lambda index: -top1[index])
    rows = [(names[i], *(100 * by_k[k][i].item() for k in by_k)) for i in order[:SHOWN_HEADS]]
    print_table(
        f"best of {len(names)} heads on {judged_on}",
        ("head", *(f"top-{k} %" for k in by_k)),
        rows,
        protocol=f"{protocol['iterations']:,} steps of {protocol['global_batch_size']:,} images, "
        f"{protocol['train_transform']}; judged: {protocol['transform']}",
    )
