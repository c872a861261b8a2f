"""A model folder that is complete and holds next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.model_files import write_safetensors


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What every model has: a config, a tokenizer, and weights in one file."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed to run it")
    (folder / "modeling.py").write_text("raise SystemExit('repositories run no code here')")
    write_safetensors(folder / "model.safetensors")
    return folder
