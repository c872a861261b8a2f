"""The command line as a program: the console script, `python -m mlx_paged`, and what starts the ranks of a command."""

import os
import sys


def run() -> None:
    """Run the command line. Ctrl-C while it is being imported ends it as it does later, without a traceback."""
    try:
        from mlx_paged.cli.main import main
        from mlx_paged.cli.ranks import take_rank
    except KeyboardInterrupt:
        os.write(2, b"\n")
        sys.exit(130)  # cli.terminal's INTERRUPTED
    take_rank()
    main()


if __name__ == "__main__":
    run()
