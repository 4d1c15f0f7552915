"""The probes of a training: what they leave in the run folder."""

import json
from pathlib import Path

import torch
from torch import nn

from utils.probing import ProbeRunner
from utils.results_file import write_results


class Silent:
    """A probe of a user's own, which writes nothing."""

    protocol = {"size": 8, "dtype": torch.float32}

    def __call__(self, net, data, output_dir, step):
        return {"figure": 1, "share": torch.tensor(0.5)}


class Writing(Silent):
    """One that writes more than it returns."""

    def __call__(self, net, data, output_dir, step):
        write_results(output_dir, "other", protocol={}, figures={"rows": [1, 2]})
        return {"figure": step}


class Blind(Silent):
    """One that needs no images."""

    splits = ()


def test_every_probe_leaves_its_results(tmp_path: Path) -> None:
    """The runner writes them for a probe that does not, and leaves the others' alone."""
    probes = {"silent": Silent(), "writing": Writing(), "blind": Blind()}
    runner = ProbeRunner(probes, nn.Identity(), {"val": range(3)}, tmp_path, every=2)
    for step in (2, 4):  # the second time the files are there already
        runner(step)
        found = {
            name: json.loads((tmp_path / name / "results.json").read_text()) for name in probes
        }
        said = {"size": 8, "dtype": "torch.float32"}
        figures = {"figure": 1, "share": 0.5}
        protocol = said | {"data": "range(0, 3)", "step": step}
        assert found["silent"] == {"silent": {"protocol": protocol, "figures": figures}}
        assert found["blind"]["blind"]["protocol"] == said | {"step": step}
        assert found["writing"] == {"other": {"protocol": {}, "figures": {"rows": [1, 2]}}}
