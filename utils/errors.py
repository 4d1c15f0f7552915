"""The error of a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback."""
