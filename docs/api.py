"""Builds the API reference from docstrings: python docs/api.py [FOLDER]. Needs pip install '.[docs]'."""

import sys
import warnings
from pathlib import Path

try:
    import pdoc
except ImportError:
    sys.exit("docs/api.py needs pdoc: pip install -e '.[docs]'")

MODULES = (
    "mlx_paged",
    "mlx_paged.outputs",
    "mlx_paged.engine.chat_template",
    "mlx_paged.engine.engine",
    "mlx_paged.engine.profile",
    "mlx_paged.tools.block_picture",
)

warnings.simplefilter("error")  # a name that can't be resolved, a docstring that can't be read
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
pdoc.pdoc(*MODULES, output_directory=folder)
print(f"open {folder / 'index.html'}")
