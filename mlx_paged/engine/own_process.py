"""An engine belongs to the process that made it: MLX's threads and streams do not live on in a fork."""

import os


class OwnProcess:
    """Remembers the process in which it was made."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_fork(self) -> bool:
        """Whether this is another process, a fork."""
        return os.getpid() != self._pid

    def require_own(self) -> None:
        """Raise RuntimeError in a fork."""
        if self.is_fork:
            raise RuntimeError(
                f"this engine was made in process {self._pid} and can't be used in its fork {os.getpid()}: make it in "
                'the process that uses it, or start processes with multiprocessing\'s "spawn"'
            )
