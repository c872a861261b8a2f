"""The command line."""


def main() -> None:
    """The console script."""
    from mlx_paged.cli.main.main import main

    main()
