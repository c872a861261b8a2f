"""`python -m mlx_paged` is the command line."""

from mlx_paged.cli.main import main

if __name__ == "__main__":
    main()
