"""The error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in a recipe, a file, a model or the machine's setup, in one line per mistake.

    The message names file, line, key and value, and what to do. The program prints it without a traceback; every other
    exception except OSError is a bug of ours and keeps its traceback.
    """
