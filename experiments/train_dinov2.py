"""Train with the DINOv2 recipe; configs/dinov2/ holds the runs, --help lists flags and groups."""

from functools import partial

from slurm.command import main
from utils.config.compose import parse_config

if __name__ == "__main__":
    main("utils.run.train", partial(parse_config, "dinov2/quickstart.yaml"))
