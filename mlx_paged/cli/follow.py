"""`python -m mlx_paged.cli.follow JSON`: another rank than 0 of a command, which starts it. Fails in one line."""

from __future__ import annotations

import json
import signal
import sys
import warnings

from mlx_paged.distributed.launch import LOST, hold_lifeline


def main(told: str) -> int:
    """Load what rank 0 loads, and follow it to its end. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # what all processes of a terminal or a service get is rank 0's
        signal.signal(number, signal.SIG_IGN)
    hold_lifeline(sys.stdin.fileno())
    warnings.simplefilter("ignore")
    request = json.loads(told)
    engine, shape = request["engine"], request["shape"]
    from mlx_paged import LLM
    from mlx_paged.errors import LostRanks, one_line

    try:
        if shape is not None:
            from mlx_paged.tools.random_models import make_random_model

            LLM.from_model(make_random_model(shape, engine.get("dtype")).model, **engine)
        else:
            LLM(request["model"], **engine)
    except LostRanks:
        return LOST
    except Exception as error:
        print(f"mlx-paged: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
