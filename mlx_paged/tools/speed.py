"""The speed of one model: tokens per second of prompts, and of decoding, by batch size."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mlx_paged.sampling_params import SamplingParams
from mlx_paged.tools.report import Columns, Row

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

COLUMNS: Columns = {
    "test": ("test", ""),
    "batch": ("batch", ",d"),
    "tokens_per_s": ("tokens/s", ",.1f"),
    "deviation": ("±", ",.1f"),
}
_PROBE = 64, 4  # tokens of a prompt and of an output that tell roughly how fast a model is


def measure_speed(
    llm: LLM,
    num_prompt: int,
    num_output: int,
    batch_sizes: Sequence[int],
    repetitions: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Measure each batch size: yields a row for prompts, pp512 say, and one for decoding, tg128, unless they are 0.

    pp: as many random prompts as the batch has, up to the first token of each. tg: as many sequences that begin with
    one token. Each is run once before, to warm up. tokens_per_s and deviation are the mean and the standard deviation
    of the repetitions, whose values are in `samples`.
    """
    draw = random.Random(0)
    for batch in batch_sizes:
        for test, prompt, output in (("pp", num_prompt, 1), ("tg", 1, num_output)):
            size = prompt if test == "pp" else output
            if size == 0:
                continue
            samples = []
            for repetition in range(-1, repetitions):
                progress(f"{test}{size} x {batch}: {'warming up' if repetition < 0 else repetition + 1}")
                seconds = _seconds(llm, batch, prompt, output, draw)
                if repetition >= 0:
                    samples.append(batch * size / seconds)
            yield {
                "test": f"{test}{size}",
                "batch": batch,
                "tokens_per_s": statistics.mean(samples),
                "deviation": statistics.stdev(samples) if len(samples) > 1 else 0.0,
                "samples": samples,
            }


def estimate_duration(
    llm: LLM, num_prompt: int, num_output: int, batch_sizes: Sequence[int], repetitions: int
) -> float:
    """Estimate roughly the seconds that `measure_speed` takes with these arguments, from short runs of each kind."""
    for prompt, output in (
        (num_prompt or 1, 1),
        (1, num_output or 1),
    ):  # what can never fit is refused
        llm.engine.make_request([0] * prompt, SamplingParams(max_tokens=output))
    draw, (prompt, output) = random.Random(0), _PROBE
    prompt, output = min(prompt, max(1, num_prompt)), min(output, max(1, num_output))
    _seconds(llm, 1, prompt, 1, draw)  # with what is only done once
    of_prompts = _seconds(llm, 1, prompt, 1, draw) / prompt * num_prompt * sum(batch_sizes)
    of_outputs = sum(_seconds(llm, batch, 1, output, draw) / output * num_output for batch in batch_sizes)
    return (repetitions + 1) * (of_prompts + of_outputs)


def _seconds(llm: LLM, batch: int, num_prompt: int, num_output: int, draw: random.Random) -> float:
    """Time the outputs of a batch of random prompts."""
    prompts = [[draw.randrange(llm.vocab_size) for _ in range(num_prompt)] for _ in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - started
