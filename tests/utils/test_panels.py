"""What of a run's metrics is drawn, and what stands in one panel."""

from utils.panels import panels


def test_what_was_logged_once_is_no_curve() -> None:
    values = (1.0, float("nan"), 2.0)
    lines = [{"step": step, "a": value} for step, value in enumerate(values)]
    assert panels(lines[:2]) == {} and list(panels(lines)) == ["a"]


def test_values_that_belong_together_share_a_panel() -> None:
    lines = [{"step": step, "lr": 1.0, "x/a": 1, "x/b": 2, "loss": 3} for step in range(3)]
    assert list(panels(lines)) == ["loss", "learning rate", "x"]
