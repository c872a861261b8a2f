"""`python -m mlx_paged` is the command line, and what the ranks of a command are started by."""

from mlx_paged.cli.main import main
from mlx_paged.cli.ranks import take_rank

if __name__ == "__main__":
    take_rank()
    main()
