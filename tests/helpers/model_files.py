"""Files of models that hold next to nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_safetensors(path: Path, num_bytes: int = 64) -> None:
    """A file with one uint8 tensor of `num_bytes`."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
