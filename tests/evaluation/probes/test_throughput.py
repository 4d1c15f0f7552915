"""Speed as a probe: figures, and in a training a file with what they depend on."""

import json

import pytest
from torch import nn

from evaluation.probes.throughput import ThroughputProbe
from utils import distributed
from utils.errors import UserError
from utils.probing import ProbeRunner


def test_the_figures_lie_beside_their_protocol(tmp_path, capsys):
    """A training writes them; an evaluation, with the name of the net, not the probe."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    probe = ThroughputProbe(batch_size=2, steps=1, repeats=2, input_size=8)
    found = ProbeRunner({"throughput": probe}, net, {}, tmp_path)(7)
    assert "timing 2 x 1 batches" in capsys.readouterr().out
    written = json.loads((tmp_path / "throughput/results.json").read_text())["throughput"]
    assert {f"throughput/{key}": value for key, value in written["figures"].items()} == found
    assert written["protocol"] == probe.protocol | {"step": 7}
    probe(net, {}, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_several_processes_are_refused_before_anything_is_trained_or_judged(monkeypatch):
    """The probes are made at the start; the refusal does not wait for this one's turn."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="speed is that of one process"):
        ThroughputProbe()
