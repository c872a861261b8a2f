"""Plans memory before anything is downloaded or run: from a config.json alone, as `mlx-paged inspect` does."""

import subprocess
import sys

from mlx_paged.config import format_memory
from mlx_paged.models import hub
from mlx_paged.tools import cache_cost

model = sys.argv[1] if len(sys.argv) > 1 else None  # an alias, a repository, a folder; None: the demo model
room = 8 * 10**9

size = cache_cost.read_model(hub.resolve(model, config_only=True))
per_token = sum(group.bytes_per_token for group in size.groups)
print(f"{size.family}: weights {format_memory(size.weight_bytes)}, one token {format_memory(per_token)} of K and V\n")
for context in (512, 1024, 2048):
    lengths = cache_cost.typical_lengths(num_requests=64, context=context)
    ways = cache_cost.compare(size.groups, lengths, context, block_size=16)
    fit = ", ".join(f"{way.name} {way.fitting(room - size.weight_bytes):,}" for way in ways)
    print(f"contexts up to {context}: in {format_memory(room)} fit {fit}")

print("\nThe same from the command line, with the arithmetic:\n", flush=True)
arguments = [*([model] if model else []), "--memory", "8GB", "--context", "2048"]
subprocess.run([sys.executable, "-m", "mlx_paged", "inspect", *arguments], check=True)
