"""Host memory of the patch probes: a model of the peak, and a measurement to hold it against.

    python -m evaluation.segmentation.memory --patches 3565044 --queries 396116 --dim 1280
    python -m evaluation.segmentation.memory --patches 80000 --queries 8000 --dim 1280 --measure

The model computes what is held throughout (labels) and what each phase adds, for features in a file
and everything on the CPU. On a GPU, queries, chunks and similarities are in GPU memory instead. The
measurement runs the real store, standardisation, search and fit on synthetic patches in its own
process. Letters: N training patches and Q queries of one process (with as many test patches), D
width, k neighbours.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation.probes.logistic import fit_logistic
from evaluation.probes.measure import forget_peak, peak_bytes, run_apart
from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.patch_logreg import hold_batches, predict
from evaluation.segmentation.patches import majority_labels
from evaluation.segmentation.probe import MOMENT_ROWS
from evaluation.segmentation.standardize import Standardizer, fit_standardizer
from evaluation.segmentation.store import PatchStore, Shape
from utils.command import Parser, as_command
from utils.folders import make_folder

FLOAT, DOUBLE, INDEX = 4, 8, 8  # bytes
NUM_CLASSES = 150


class Plan(NamedTuple):
    """The size of a probe, per process."""

    patches: int  # N
    queries: int  # Q
    dim: int  # D
    pixels: int = 256  # of a patch
    neighbours: int = 30  # k, the largest
    chunk_size: int = 65536
    query_batch: int = 1024


def stays(plan: Plan) -> dict[str, int]:
    """Bytes held from extraction to the end."""
    rows = plan.patches + 2 * plan.queries
    return {"pixel labels": rows * plan.pixels, "patch labels, rows that count": 2 * rows}


def phases(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes that each phase adds while it runs."""
    chunk = min(plan.chunk_size, plan.patches)
    matrix = chunk * plan.dim * FLOAT
    moments = min(MOMENT_ROWS, plan.patches) * plan.dim
    judged = min(plan.chunk_size, max(plan.patches, plan.queries))
    pixels = judged * plan.pixels
    return {
        "standardize": {
            "chunk as read": moments * FLOAT,
            "float64: copy, centred, squares": 3 * moments * DOUBLE,
        },
        "knn": {
            "queries": plan.queries * plan.dim * FLOAT,
            "chunk: read, counting rows, standardised, prepared": 4 * matrix,
            "similarities": plan.query_batch * chunk * FLOAT,
            "best lists: by block, joined, sorted": (
                3 * plan.queries * plan.neighbours * (FLOAT + INDEX)
            ),
            "labels of a block's neighbours": 4 * plan.query_batch * plan.neighbours * plan.pixels,
        },
        "logreg": {
            "chunk: read, counting rows, standardised, centred": 4 * judged * plan.dim * FLOAT,
            "logits and residuals": 2 * judged * NUM_CLASSES * FLOAT,
            "pixels of a chunk, counted": pixels * (2 + FLOAT + INDEX),
        },
    }


def peak(plan: Plan) -> tuple[int, str]:
    """Peak bytes, without Python and torch themselves, and the phase of the peak."""
    sums = {name: sum(parts.values()) for name, parts in phases(plan).items()}
    highest = max(sums, key=sums.__getitem__)
    return sum(stays(plan).values()) + sums[highest], highest


def measure(plan: Plan, scratch: Path | None = None) -> dict[str, dict[str, float]]:
    """Peak bytes above those after the imports, and seconds, by phase; runs in its own process."""
    if scratch is not None:
        make_folder(scratch, "--scratch-dir")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return run_apart(
            "segmentation probe",
            "evaluation.segmentation.memory",
            json.dumps(plan._asdict()),
            folder,
        )


def work(settings: str, folder: str) -> None:
    """Body of the measuring process: measure each phase on synthetic patches, print as JSON."""
    plan = Plan(**json.loads(settings))
    begin = forget_peak()
    found: dict[str, dict[str, float]] = {"imports": {"bytes": begin, "seconds": 0}}
    device = torch.device("cpu")

    def run(name: str, work: Callable[[], None]) -> None:
        forget_peak()
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        found[name] = {"bytes": peak_bytes() - begin, "seconds": seconds}

    stores: list[PatchStore] = []
    run("extract", lambda: stores.extend(_fill(plan, Path(folder))))
    train, queries, _ = stores

    def read() -> Iterator[torch.Tensor]:
        return (features for features, _ in train.chunks(MOMENT_ROWS, device))

    fitted: list[Standardizer] = []
    run(
        "standardize",
        lambda: fitted.append(fit_standardizer("StandardScaler", read, dim=plan.dim)),
    )
    rows = FitRows(
        [train], ignore_labels=[0, 255], standardizer=fitted[0], chunk_size=plan.chunk_size
    )

    def search() -> None:
        knn = PatchKnn(num_neighbors=[1, plan.neighbours], query_batch=plan.query_batch)
        for _ in knn.predictions(
            rows, queries, distance="L2", ks=[1, plan.neighbours], device=device
        ):
            pass

    def fit() -> None:
        batches = hold_batches(rows, device, hold_gb=0)
        model = fit_logistic(
            batches, num_classes=len(rows.classes), dim=rows.dim, C=1.0, max_iter=1
        )
        for _ in predict(model, rows, queries, device=device):
            pass

    run("knn", search)
    run("logreg", fit)
    print(json.dumps(found))


def _fill(plan: Plan, folder: Path) -> list[PatchStore]:
    """Stores of random patches, written in batches as an extraction does."""
    generator = torch.Generator().manual_seed(0)
    stores = []
    for count in (plan.patches, plan.queries, plan.queries):
        shape = Shape(count, 1, plan.pixels, plan.dim)
        store = PatchStore(shape, dtype=torch.float32, folder=folder)
        for start in range(0, count, 4096):
            size = min(4096, count - start)
            label = torch.randint(NUM_CLASSES + 1, (size, 1), generator=generator)
            labels = label.to(torch.uint8).repeat(1, plan.pixels)
            features = torch.randn(size, plan.dim, generator=generator)
            store.write(start, features, labels, majority_labels(labels))
        stores.append(store)
    return stores


def _print(plan: Plan, measured: dict[str, dict[str, float]] | None) -> None:
    print(f"{plan.patches:,} training patches, {plan.queries:,} queries, width {plan.dim}")
    kept = stays(plan)
    for name, count in kept.items():
        print(f"  {name:<52} {count / 1e9:8.3f} GB")
    for phase, parts in phases(plan).items():
        print(f"{phase}:")
        for name, count in parts.items():
            print(f"  {name:<52} {count / 1e9:8.3f} GB")
        total = sum(kept.values()) + sum(parts.values())
        line = f"  {'with what stays':<52} {total / 1e9:8.3f} GB"
        if measured:
            found = measured[phase]
            line += f"; measured {found['bytes'] / 1e9:.3f} GB"
            line += f" = {found['bytes'] / total:.2f} x, in {found['seconds']:.0f} s"
        print(line)
    highest, phase = peak(plan)
    base = f" ({measured['imports']['bytes'] / 1e9:.2f} GB)" if measured else ""
    print(f"peak of the model: {highest / 1e9:.2f} GB ({phase}), beside Python and torch{base}")


@as_command()
def main() -> None:
    """Print the model, and with --measure the peak of the real code; a mistake is one line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=3_565_044, help="training patches")
    parser.add_argument("--queries", type=int, default=396_116)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--measure", action="store_true", help="run it, on synthetic patches")
    parser.add_argument("--scratch-dir", type=Path, help="folder of the features, for --measure")
    arguments = parser.parse_args()
    plan = Plan(arguments.patches, arguments.queries, arguments.dim)
    if min(plan) < 1:
        parser.error("--patches, --queries and --dim must be 1 or more")
    _print(plan, measure(plan, arguments.scratch_dir) if arguments.measure else None)


if __name__ == "__main__":
    main()
