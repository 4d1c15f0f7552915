"""Train a classifier with the DeiT III recipe; configs/deit/ holds the runs, --help the flags."""

from functools import partial

from slurm.command import main
from utils.config import parse_config

if __name__ == "__main__":
    main("utils.training.train", partial(parse_config, "deit/imagenet.yaml", runs="deit"))
