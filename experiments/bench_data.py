"""Time the data path stage by stage, the published pipeline beside ours: [--root FOLDER]."""

from evaluation.commands.bench_data import parse_bench_data
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.cost.data_path.measure", parse_bench_data)
