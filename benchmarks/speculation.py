"""What drafts save: time with them over time without, of tasks that repeat their prompt and of one that does not.

    python benchmarks/speculation.py [--model MODEL] [--draft-model MODEL] [--json FILE]   measure, write raw numbers
    python benchmarks/speculation.py --markdown FILE                                       the table of such a file

`code` asks for a file with a name changed, `summary` for the main points of a text, `copy` for a text as it is, `chat`
for something that no prompt has. Each is asked so many times at once, greedily, of an engine without drafts, of one
that has them where they pay, and of one that always has some; with --draft-model also of two whose guesses a second
model makes, and of mlx-lm, one answer at a time, with and without that model. --deeper 4 is for where no smaller model
of the vocabulary is at hand: it asks a model of the layers of --model and three times as many that add nothing, which
takes what a larger one does, and --model itself makes the drafts, which are always right. Runs alternate; a ratio, of a
system with drafts over the same without, is the median of those of the runs. Seconds are the CPU's, which other
processes disturb less; where a GPU computes they say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import report
from mlx_lm.generate import generate_step, speculative_generate_step
from report import Part, Row

from mlx_paged.models import loading

PARSER = argparse.ArgumentParser(add_help=False)
PARSER.add_argument("--model", help="a folder or a name of Hugging Face; the bundled one, if not given")
PARSER.add_argument("--draft-model", metavar="MODEL", help="a smaller one of the same vocabulary; none, if not given")
PARSER.add_argument(
    "--deeper", type=int, default=1, metavar="N", help="N times as many layers; --model is its draft model"
)
PARSER.add_argument("--tokens", type=int, default=128, metavar="N", help="of an answer: 128")
PARSER.add_argument("--batches", default="1,4,16", metavar="N,N,...", help="requests at once: 1,4,16")
PARSER.add_argument("--repetitions", type=int, default=5, metavar="N", help="of what is timed: 5")
OPTIONS = PARSER.parse_known_args()[0]

ROOT = Path(__file__).parents[1]
CODE = (ROOT / "mlx_paged" / "blocks" / "compaction.py").read_text()
PROSE = " ".join((ROOT / "LICENSE").read_text().split())[:1500]
PASSAGE = """The harbour lay quiet under a thin grey mist. Two fishermen mended their nets on the stone steps, and a dog
slept between the baskets. Far out, a white sail moved slowly along the line where the water met the sky. Nobody spoke.
When the bell of the small church rang seven, the older man folded his net, looked once at the sea, and walked home past
the shuttered shops.""".replace("\n", " ")
TASKS = {
    "code": f"Rewrite this file and rename `manager` to `blocks`. Answer with the code alone.\n\n{CODE}",
    "summary": f"Summarise this text in its own words:\n\n{PROSE}",
    "copy": f"Repeat the following text exactly, word for word:\n\n{PASSAGE}",
    "chat": "Tell me about the moon.",
}
CONFIGS: dict[str, dict[str, Any] | None] = {"none": None, "where they pay": {}, "always": {"adaptive": False}}
MLX_LM = ("mlx-lm, none", "mlx-lm, a model's")


def drafts(quick: bool) -> Iterator[Row]:
    """Greedy answers of so many tokens."""
    loaded = loading.load(OPTIONS.model, None)
    second = None
    if OPTIONS.draft_model or OPTIONS.deeper > 1:
        second = loading.load(OPTIONS.draft_model or OPTIONS.model, None).model
    deepen(loaded.model, OPTIONS.deeper)
    configs = CONFIGS | ({} if second is None else {
        "a model's, where they pay": {"model": second}, "a model's, always": {"model": second, "adaptive": False},
    })  # fmt: skip
    num_tokens, repetitions = (8, 1) if quick else (OPTIONS.tokens, OPTIONS.repetitions)
    batches = [1] if quick else [int(each) for each in OPTIONS.batches.split(",")]
    prompts = {task: encode(loaded.tokenizer, text[: 200 if quick else None]) for task, text in TASKS.items()}
    most_blocks = -(-(max(map(len, prompts.values())) + num_tokens) // 16) + 3
    for batch in batches:
        engines = {
            name: LLM.from_model(
                loaded.model, speculative_config=config, num_kv_blocks=batch * most_blocks, max_num_seqs=batch
            )
            for name, config in configs.items()
        }
        peers = {} if second is None or batch > 1 else dict(zip(MLX_LM, (None, second), strict=True))
        for task, tokens in prompts.items():
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [*engines, *peers]}
            for repetition in range(repetitions):
                # Equal prompts of a repetition share their blocks, and those of the next one find none of them.
                params = SamplingParams(
                    temperature=0, max_tokens=num_tokens, ignore_eos=True, cache_salt=str(repetition)
                )
                for name, llm in engines.items():
                    runs[name].append(answer(llm, tokens, batch, params))
                for name, draft in peers.items():
                    runs[name].append(answer_by_mlx_lm(loaded.model, draft, tokens, num_tokens))
            yield from summarise(task, batch, runs)


def deepen(model: Any, times: int) -> None:
    """Follow each layer of a model of Llama's layers by others that take as long and add nothing to what it put out."""
    layers = []
    for layer in model.model.layers:
        layers.append(layer)
        for _ in range(times - 1):
            idle = type(layer)(model.args)
            idle.update(layer.parameters())
            for last in (idle.self_attn.o_proj, idle.mlp.down_proj):
                last.weight = mx.zeros(last.weight.shape, last.weight.dtype)
            mx.eval(idle.parameters())
            layers.append(idle)
    model.model.layers = layers


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Write a question as the model's chat template does, if there is one. Returns its token ids."""
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))


def summarise(task: str, batch: int, runs: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    """Put the repetitions of each way into a row."""
    expected = runs["none"][0]["tokens"]
    for name, done in runs.items():
        base = runs[MLX_LM[0] if name in MLX_LM else "none"]
        ratios = [run["s"] / plain["s"] for run, plain in zip(done, base, strict=True)]
        yield {
            "task": task,
            "batch": batch,
            "drafts": name,
            "decode_s": statistics.median(run["s"] for run in done),
            "ratio": statistics.median(ratios),
            "steps": done[0]["steps"],
            "verified": done[0]["drafts"],
            "right": done[0]["right"],
            "equal": "yes" if all(run["tokens"] == expected for run in done) else "no",
        }


def answer(llm: LLM, tokens: list[int], batch: int, params: SamplingParams) -> dict[str, Any]:
    """Answer a prompt so many times at once. The prompts' time is not counted."""
    before = llm.stats()
    requests = [llm.engine.make_request(tokens, params) for _ in range(batch)]
    steps = [(time.monotonic(), time.process_time())]
    outputs = list(llm.run(requests, lambda: steps.append((time.monotonic(), time.process_time()))))
    last = max(output.metrics.first_token_time or 0.0 for output in outputs if output.metrics)
    first = next(cpu for moment, cpu in steps if moment >= last)
    after = llm.stats()
    return {
        "s": steps[-1][1] - first,
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "steps": after.num_steps - before.num_steps,
        "drafts": after.num_draft_tokens - before.num_draft_tokens,
        "right": after.num_accepted_tokens - before.num_accepted_tokens,
    }


def answer_by_mlx_lm(model: Any, draft: Any, tokens: list[int], num_tokens: int) -> dict[str, Any]:
    """Do as `answer` with mlx-lm's own loop, which takes as many drafts of a model as it is told, if it has one."""
    prompt, options = mx.array(tokens), {"max_tokens": num_tokens}
    if draft is None:
        steps: Iterator[Any] = generate_step(prompt, model, **options)
    else:
        steps = speculative_generate_step(prompt, model, draft, num_draft_tokens=4, **options)
    found, first = [], 0.0
    for step in steps:
        found.append((int(step[0]), draft is not None and step[2]))
        first = first or time.process_time()
    right = sum(from_draft for _, from_draft in found)
    steps_taken = len(found) - right + found[-1][1]  # the last one may have been cut short
    return {
        "s": time.process_time() - first,
        "tokens": [[token for token, _ in found]],
        "steps": steps_taken,
        "drafts": 0 if draft is None else 4 * steps_taken,
        "right": right,
    }


PARTS = [
    Part(
        drafts,
        "Decoding with drafts, and without",
        {
            "task": ("task", ""),
            "batch": ("at once", "d"),
            "drafts": ("drafts", ""),
            "decode_s": ("CPU s", ".2f"),
            "ratio": ("times without", ".2f"),
            "steps": ("steps", ",d"),
            "verified": ("drafts", ",d"),
            "right": ("right", ",d"),
            "equal": ("same tokens", ""),
        },
    ),
]

if __name__ == "__main__":
    model = str(OPTIONS.model or "demo")
    report.main("speculation.py", __doc__ or "", PARTS, own_options=[PARSER], model=model)
