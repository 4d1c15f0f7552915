"""Train with the DINOv2 recipe; configs/dinov2/ holds the runs, --help lists flags and groups."""

from slurm.launch import launch
from utils.config import parse_config

if __name__ == "__main__":
    launch("utils.training.train", parse_config(default="dinov2/quickstart.yaml"))
