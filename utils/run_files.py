"""The files of a run folder, by the names that their writers and their readers share."""

CONFIG = "config.yaml"  # utils/run_folder.py
CODE = "git.txt"  # utils/run_folder.py
LOCK = ".lock"  # utils/lock.py
LAUNCHES = "launches.jsonl"  # slurm/record.py
METRICS = "metrics.jsonl"  # utils/metrics.py
PROGRESS = "progress.json"  # utils/metrics.py
CURVES = "curves.png"  # utils/curves.py
CHECKPOINTS = "checkpoints"  # a folder: utils/checkpoints/checkpoint.py
EXPORTED = "exported/model.safetensors"  # the trained network: utils/run_end.py
IN_HUB = "model.safetensors"  # that of a folder in the hub's format (vit.hub)
FORMERLY = "exported/teacher.safetensors"  # the same, in the folders of older runs
SUMMARY = "summary.json"  # utils/summary.py
RESULTS = "results.json"  # utils/results_file.py
