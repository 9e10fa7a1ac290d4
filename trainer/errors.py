"""The error that a user's mistake raises, and a test for running out of memory."""


def clean(text: str) -> str:
    """The text with line breaks and all that could drive a terminal escaped, so that it prints as one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """A mistake in a recipe, a file, a model or the machine's setup; each argument is a mistake and becomes one line.

    The message names file, line, key and value, and what to do. The program prints it without a traceback; every
    other exception except OSError is a bug of ours and keeps its traceback.
    """

    def __init__(self, *mistakes: str):
        super().__init__("\n".join(map(clean, mistakes)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory. For host memory, PyTorch raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
