"""The error that a user's mistake raises, a test for running out of memory, and the program's last line."""

import sys
import traceback


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


def explained(error: Exception) -> str:
    """The line that the program ends with. For what is neither a user's mistake nor the system's, the traceback is
    printed before it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return clean(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    print(*map(clean, traceback.format_exc().splitlines()), sep="\n", file=sys.stderr)
    cause = "out of memory" if is_out_of_memory(error) else "a bug in Strop or in a library"
    return f"{cause} (traceback above); completed stages are kept, and the same command resumes"
