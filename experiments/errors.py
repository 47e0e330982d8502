"""What bad input raises: one line with cause and remedy, exit code 2."""

BAD_INPUT = 2
"""The exit code of a command that was given what it cannot use."""


class UserError(Exception):
    """The run cannot start or go on because of what it was given."""
