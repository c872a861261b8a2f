"""Errors and warnings that callers may want to tell apart; other errors are a ValueError or KeyError."""

from collections.abc import Iterator
from contextlib import contextmanager


class OutOfBlocks(RuntimeError):
    """The block pool has too few free blocks; nothing was changed."""


class ModelError(ValueError):
    """A model can't be found, read or run. The message is one line and says what to do."""


class PromptTooLong(ValueError):
    """A prompt, with what it asks for, does not fit the context or the pool. The message has the arithmetic."""

    def __init__(self, message: str, num_tokens: int | None = None, most: int | None = None) -> None:
        """num_tokens: of the prompt. most: that a prompt may have."""
        super().__init__(message)
        self.num_tokens = num_tokens
        self.most = most


class QueueFull(RuntimeError):
    """As many requests wait as may; the same one may be taken a little later."""


class DeadEnd(ValueError):
    """What a request asks of its output leaves no token that could come next, or is too much to follow."""


class LostRanks(RuntimeError):
    """Another process of those that a model is divided among has gone, or they are out of step: none can go on."""


class EngineWarning(UserWarning):
    """Something works less well than it was asked to, and the engine goes on."""


@contextmanager
def model_errors_of(name: str) -> Iterator[None]:
    """Have a ValueError that is raised inside say which model it is about, as a ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def one_line(error: BaseException) -> str:
    """Tell an error in one line of at most 160 characters; one without a text by its name."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 160 else line[:157] + "..."
