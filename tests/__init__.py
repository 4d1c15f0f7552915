"""The tests mirror the source tree; `tests.parity.harness` serves the parity cases."""
