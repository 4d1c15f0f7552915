"""Write a net as a file that others run: OUTPUT --model NAME --weights FILE [--format onnx]."""

from evaluation.commands.export import parse_export
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.export_net.export_net", parse_export)
