"""What of a run's metrics is drawn, and what stands in one panel."""

from utils.panels import panels


def test_what_was_logged_once_is_drawn_and_what_was_never_finite_is_not() -> None:
    lines = [{"step": 0, "a": 1.0, "b": float("nan")}, {"step": 1, "b": float("inf")}]
    assert panels(lines) == {"a": {"a": [(0, 1.0)]}}


def test_values_that_belong_together_share_a_panel() -> None:
    lines = [{"step": step, "lr": 1.0, "x/a": 1, "x/b": 2, "loss": 3} for step in range(3)]
    assert list(panels(lines)) == ["loss", "learning rate", "x"]
