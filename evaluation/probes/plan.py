"""The table of experiments/plan_probes.py: the modelled and measured cost of a probe."""

import sys
from collections.abc import Sequence

from evaluation.probes.costs import MODELS, SEARCH_BYTES, Plan, Rates
from evaluation.progress import say
from evaluation.results import print_table
from utils.command import Parser, as_command
from utils.errors import UserError
from utils.nearest import nearest
from utils.ranges import check_count


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of a probe; a mistake prints one line and exits with code 2."""
    probe, plan, measured = read_plan(argv)
    show(probe, plan, with_measurement=measured)


def read_plan(argv: Sequence[str] | None = None) -> tuple[str, Plan, bool]:
    """The probe, its size, and whether to measure it too."""
    default = Plan()
    parser = Parser(description=sys.modules["__main__"].__doc__, allow_abbrev=False)
    parser.add_argument("--probe", default="knn", help=", ".join(MODELS))
    for name, kind in (
        ("train", "training images"),
        ("val", "validation images"),
        ("dim", "channels of the class token: embed_dim"),
        ("classes", "classes"),
        ("processes", "processes, each with a device"),
        ("chunk_size", "knn: training rows moved at a time"),
        ("batch_size", "linear: images per process and pass"),
        ("global_batch_size", "linear: images per step"),
        ("steps", "linear: steps"),
        ("evaluations", "linear: looks at val"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), help=kind
        )
    parser.add_argument("--ks", type=int, nargs="+", default=default.ks, help="knn: neighbours")
    parser.add_argument("--search-precision", default="fp32", help="knn: fp32 or fp16")
    parser.add_argument("--device", help="where the memory and the rates are: cpu or cuda")
    parser.add_argument(
        "--measure", action="store_true", help="also run the real code at this size, on the CPU"
    )
    values = vars(parser.parse_args(argv))
    probe, measured = values.pop("probe"), values.pop("measure")
    if probe not in MODELS:
        raise UserError(
            f"no model of a probe {probe!r}{nearest(probe, MODELS)}; there are {', '.join(MODELS)}"
        )
    if values["search_precision"] not in SEARCH_BYTES:
        raise UserError(f"--search-precision is {' or '.join(SEARCH_BYTES)}")
    if values["device"] is None:
        values["device"] = "cpu" if measured else _device()
    if values["device"] not in ("cpu", "cuda"):
        raise UserError(f"--device is cpu or cuda, not {values['device']!r}")
    numbers = [(name, value) for name, value in values.items() if isinstance(value, int)]
    for name, value in [*numbers, *(("ks", k) for k in values["ks"])]:
        check_count(f"--{name.replace('_', '-')}", value, 1)
    return probe, default._replace(**values | {"ks": tuple(values["ks"])}), measured


def show(probe: str, plan: Plan, *, with_measurement: bool) -> None:
    """Print memory and time by part, by formula, and the measured totals beside them."""
    from evaluation.probes.measure import measure, measure_rates  # late: --help needs no torch

    here = _device() if plan.device == "cuda" else "cpu"
    rates = measure_rates(probe, plan._replace(device=here))
    found = measure(probe, plan) if with_measurement else None
    if found:
        # The speed of a shared machine changes: take the mean of before and after.
        after = measure_rates(probe, plan._replace(device=here))
        say(f"rates before the measurement: {rates}")
        say(f"rates after the measurement: {after}")
        rates = Rates(*(2 / (1 / a + 1 / b) for a, b in zip(rates, after, strict=True)))
    costs = MODELS[probe](plan, rates)
    rows: list[tuple[object, ...]] = [
        (part.what, *(f"{size / 1e9:.3f}" for size in (part.host, part.device)), "")
        for part in costs.parts
    ]
    rows += [(name, "", "", f"{seconds:,.1f}") for name, seconds in costs.seconds.items()]
    total = sum(costs.seconds.values())
    rows.append(
        ("by the model", f"{costs.host / 1e9:.3f}", f"{costs.device / 1e9:.3f}", f"{total:,.1f}")
    )
    if found:
        rows.append(("measured", f"{found.bytes / 1e9:.3f}", "", f"{found.seconds:,.1f}"))
        ratio = f"{found.bytes / costs.host:.2f}"
        rows.append(("measured / model", ratio, "", f"{found.seconds / total:.2f}"))
    size = f"{plan.train:,} + {plan.val:,} images, D = {plan.dim}, {plan.classes:,} classes"
    print_table(
        f"{probe}, one of {plan.processes} processes on {plan.device}: {size}",
        ("part", "host GB", "device GB", "seconds"),
        rows,
        protocol="memory by arithmetic; seconds by arithmetic out of rates measured on this "
        f"machine's {here} just now; the net's own pass over the images is not in it",
    )
    say(f"rates: {rates}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
