"""The errors that callers may want to tell apart; everything else is a ValueError or KeyError where it happens."""


class OutOfBlocks(RuntimeError):
    """The block pool has too few free blocks; nothing was changed."""


class ModelError(ValueError):
    """A model can't be found, read or run; the message is one line that says what to do."""
