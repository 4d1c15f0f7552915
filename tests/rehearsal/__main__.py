"""Rehearse accidents and print what came of them.

kills    SIGKILL a small run at random moments; every resume must end bit for bit as undisturbed
configs  mutated configs: each must run, or be refused in one clear line
images   corrupted images: each must be read, or be refused in one clear line
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("kills", "configs", "images"))
    parser.add_argument("--count", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the accidents (0)")
    parser.add_argument("--processes", type=int, default=1, help="of a run that is killed (1)")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = (words.folder or Path(temporary)).absolute()
        if words.what == "kills":
            from tests.rehearsal.kills import rehearse

            figures = rehearse(words.count, folder, seed=words.seed, processes=words.processes)
        elif words.what == "configs":
            from tests.rehearsal.configs import rehearse as rehearse_configs

            figures = rehearse_configs(words.count, folder, seed=words.seed)
        else:
            from tests.rehearsal.images import rehearse as rehearse_images

            figures = rehearse_images(words.count, folder, seed=words.seed)
    print("  ".join(f"{key}: {value}" for key, value in figures.items()))
    return int(bool(figures.get("faults")))


if __name__ == "__main__":
    sys.exit(main())
