"""What bad input raises: one line with cause and remedy, exit code 2."""


class UserError(Exception):
    """The run cannot start or go on because of what it was given."""
