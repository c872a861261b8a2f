"""Counts lines of code, those without blanks, comments and docstrings: python docs/count_lines.py.

The core path is what a greedy request runs: what `import mlx_paged.llm` loads, but for what `OPTIONAL` names.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_CORE_LINES = 4500
MAX_FILE_LINES = 350
LAYOUT = {
    getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
}  # tokens that are no code
OPTIONAL = {
    "mlx_paged/attention/chunks.py": "attention in chunks",
    "mlx_paged/attention/cpu.py": "a backend for CPUs",
    "mlx_paged/attention/cuda.py": "a backend for NVIDIA's cards",
    "mlx_paged/attention/kernel_backend.py:unsupported": "layers that have no kernel",
    "mlx_paged/attention/shared_prefix.py": "prefixes that requests share",
    "mlx_paged/attention/found_at_load.py": "kernels tried and timed at load, on a GPU",
    "mlx_paged/attention/metadata.py:TableUpdate": "more than one device",
    "mlx_paged/attention/work_items.py:widths_of_codes": "quantised KV blocks",
    "mlx_paged/attention/work_items.py:SharedWorkItems": "prefixes that requests share",
    "mlx_paged/attention/work_items.py:shared_items": "prefixes that requests share",
    "mlx_paged/attention/gathered.py": "GPUs with matrix units of their own",
    "mlx_paged/blocks/checkpoints.py": "recurrent layers",
    "mlx_paged/blocks/free_lists.py:BuddyFreeBlocks": "another allocator",
    "mlx_paged/blocks/block_manager.py:cached_prefixes": "swap and saved prompts",
    "mlx_paged/blocks/block_manager.py:compact": "compaction on request",
    "mlx_paged/blocks/cache_groups.py:_parked_position": "recurrent layers, with swap",
    "mlx_paged/blocks/cache_groups.py:_tails": "recurrent layers, with swap",
    "mlx_paged/blocks/cache_groups.py:_unpark": "recurrent layers, with swap",
    "mlx_paged/blocks/cache_groups.py:forget": "recurrent layers, with swap",
    "mlx_paged/blocks/cache_groups.py:load_done": "swap and saved prompts",
    "mlx_paged/blocks/cache_groups.py:cached_prefixes": "swap and saved prompts",
    "mlx_paged/blocks/cache_groups.py:compact": "compaction on request",
    "mlx_paged/blocks/compaction.py": "on request, and with the buddy allocator",
    "mlx_paged/blocks/inspection.py": "stats and check",
    "mlx_paged/blocks/block_manager.py:parts": "who looks inside",
    "mlx_paged/blocks/prefix_bars.py": "who looks inside",
    "mlx_paged/attention/paged_attention.py:_check_arrays": "attention without an engine",
    "mlx_paged/attention/paged_attention.py:_checked_metadata": "attention without an engine",
    "mlx_paged/attention/paged_attention.py:paged_attention": "attention without an engine",
    "mlx_paged/blocks/prefix_tree.py:block_ids": "who looks inside",
    "mlx_paged/blocks/prefix_tree.py:check": "stats and check",
    "mlx_paged/blocks/prefix_tree.py:nodes": "who looks inside",
    "mlx_paged/blocks/prefix_tree.py:num_nodes": "who looks inside",
    "mlx_paged/blocks/sequence_blocks.py:mark_worth_storing": "swap and saved prompts",
    "mlx_paged/blocks/stored_states.py": "recurrent layers, with swap and saved prompts",
    "mlx_paged/blocks/transfers.py:StateLoad": "recurrent layers, with swap and saved prompts",
    "mlx_paged/blocks/transfers.py:StateSave": "recurrent layers, with swap and saved prompts",
    "mlx_paged/cache/block_mover.py:_load": "swap and saved prompts",
    "mlx_paged/cache/block_mover.py:_read": "swap and saved prompts",
    "mlx_paged/cache/block_mover.py:_time": "swap and saved prompts",
    "mlx_paged/cache/block_mover.py:round_trip_s": "swap and saved prompts",
    "mlx_paged/cache/block_mover.py:store_prompt": "saved prompts",
    "mlx_paged/cache/block_mover.py:_read_state": "recurrent layers, with swap and saved prompts",
    "mlx_paged/cache/block_mover.py:_write_state": "recurrent layers, with swap and saved prompts",
    "mlx_paged/cache/block_mover.py:num_swapped_states": "recurrent layers, with swap",
    "mlx_paged/cache/block_files.py": "swap and saved prompts",
    "mlx_paged/cache/block_store.py": "swap and saved prompts",
    "mlx_paged/cache/codes.py": "quantised KV blocks",
    "mlx_paged/cache/layer_spec.py:quantised": "quantised KV blocks",
    "mlx_paged/cache/states.py": "recurrent layers",
    "mlx_paged/config.py:SpeculativeConfig": "drafts",
    "mlx_paged/config.py:_check_ranks": "more than one device",
    "mlx_paged/cpu": "for CPUs",
    "mlx_paged/engine/chat_template.py": "conversations",
    "mlx_paged/engine/detokenizer.py:DecodeStream": "streams and stop strings",
    "mlx_paged/engine/engine.py:compact": "compaction on request",
    "mlx_paged/engine/engine.py:match_prefix": "who looks inside",
    "mlx_paged/engine/engine.py:snapshot": "who looks inside",
    "mlx_paged/engine/engine.py:stats": "stats and check",
    "mlx_paged/engine/forking.py:process_beams": "beams",
    "mlx_paged/engine/forking.py:_advance_beams": "beams",
    "mlx_paged/engine/forking.py:_count_blocks": "beams",
    "mlx_paged/engine/output_processor.py:_beam_search_output": "beams",
    "mlx_paged/engine/output_processor.py:fail_sequence": "structured output, bad words, fewest tokens",
    "mlx_paged/engine/own_process.py": "whether this is a fork",
    "mlx_paged/engine/logits_rules.py": "structured output, bad words, fewest tokens, logits processors",
    "mlx_paged/engine/profile.py": "where the time goes",
    "mlx_paged/engine/sampling_step.py:_choose_candidates": "beams",
    "mlx_paged/engine/snapshot.py": "stats and check, and who looks inside",
    "mlx_paged/errors.py:DeadEnd": "structured output, bad words, fewest tokens",
    "mlx_paged/llm.py:_blocks_needed": "memory by need",
    "mlx_paged/llm.py:beam_search": "beams",
    "mlx_paged/llm.py:chat": "conversations",
    "mlx_paged/llm.py:encode_chat": "conversations",
    "mlx_paged/llm.py:describe_memory": "who looks inside",
    "mlx_paged/llm.py:describe_shared_prefixes": "prefixes that requests share",
    "mlx_paged/llm.py:for_requests": "memory by need",
    "mlx_paged/llm.py:from_model": "a model that is already loaded",
    "mlx_paged/llm.py:profile": "where the time goes",
    "mlx_paged/llm.py:stats": "stats and check",
    "mlx_paged/llm.py:stream": "streams",
    "mlx_paged/llm.py:stream_chat": "conversations",
    "mlx_paged/outputs.py:BeamHypothesis": "beams",
    "mlx_paged/outputs.py:BeamSearchOutput": "beams",
    "mlx_paged/outputs.py:EngineStats": "stats and check",
    "mlx_paged/outputs.py:PoolSnapshot": "who looks inside",
    "mlx_paged/outputs.py:PrefixBar": "who looks inside",
    "mlx_paged/outputs.py:PrefixMatch": "who looks inside",
    "mlx_paged/outputs.py:RequestSnapshot": "who looks inside",
    "mlx_paged/outputs.py:Snapshot": "who looks inside",
    "mlx_paged/outputs.py:StepSizes": "stats and check",
    "mlx_paged/progress.py": "a bar on a terminal",
    "mlx_paged/runner/fingerprint.py": "saved prompts",
    "mlx_paged/distributed": "more than one device",
    "mlx_paged/runner/follower.py": "more than one device",
    "mlx_paged/runner/rank_runner.py": "more than one device",
    "mlx_paged/runner/memory_plan.py:__str__": "memory in words",
    "mlx_paged/runner/memory_plan.py:blocks_for_requests": "memory by need",
    "mlx_paged/runner/memory_plan.py:count_states": "recurrent layers",
    "mlx_paged/runner/memory_plan.py:fit_to_states": "recurrent layers",
    "mlx_paged/runner/memory_plan.py:num_checkpoints": "recurrent layers",
    "mlx_paged/runner/memory_plan.py:of_draft": "drafts",
    "mlx_paged/llm.py:draft": "drafts",
    "mlx_paged/runner/in_flight.py:drafts_ahead": "drafts",
    "mlx_paged/runner/model_runner.py:measure_steps": "drafts",
    "mlx_paged/runner/warmup.py:step_seconds": "drafts",
    "mlx_paged/runner/layer_kinds.py": "kernels tried and timed at load, on a GPU",
    "mlx_paged/runner/model_runner.py:describe_sharing": "prefixes that requests share",
    "mlx_paged/runner/prepare_kernels.py": "kernels tried and timed at load, on a GPU",
    "mlx_paged/runner/prompt_logprobs.py": "log-probabilities of prompts",
    "mlx_paged/runner/sharing_costs.py": "prefixes that requests share",
    "mlx_paged/runner/stretches.py": "recurrent layers",
    "mlx_paged/runner/trial_writes.py": "a device on which kernels can't write",
    "mlx_paged/sampling/bad_words.py": "strings that must not appear",
    "mlx_paged/sampling/beam_search.py": "beams",
    "mlx_paged/sampling/compilations.py": "structured output",
    "mlx_paged/sampling/draw_kernel.py": "sampling by a GPU's own kernel",
    "mlx_paged/sampling/draws.py": "draws at random",
    "mlx_paged/sampling/grammar.py": "structured output",
    "mlx_paged/sampling/sampler.py:best_tokens": "beams",
    "mlx_paged/sampling/sampler.py:_sort_keys": "beams",
    "mlx_paged/sampling/sampler.py:_PenaltyRows": "penalties",
    "mlx_paged/sampling/sampler.py:_gather_penalties": "penalties",
    "mlx_paged/sampling/sampler.py:_penalise": "penalties",
    "mlx_paged/sampling/thinking.py": "thinking budgets",
    "mlx_paged/sampling/token_bytes.py": "strings that must not appear",
    "mlx_paged/sampling/token_counts.py": "penalties",
    "mlx_paged/sampling_params.py:BeamSearchParams": "beams",
    "mlx_paged/scheduler/kept_prompts.py": "more samples than can run at once",
    "mlx_paged/scheduler/step_budget.py": "streams beside long prompts",
    "mlx_paged/scheduler/schedule.py:Drafts": "drafts",
    "mlx_paged/scheduler/schedule.py:offsets_of": "drafts",
    "mlx_paged/speculation": "drafts",
    "mlx_paged/scheduler/scheduler.py:compact": "compaction on request",
    "models/adapters.py": "adapters",
    "models/aliases.py": "names of models",
    "models/readable_folder.py": "folders that mlx-lm could not read as they are",
    "models/generation_config.py": "what a model's makers recommend",
    "models/hub.py": "downloads",
    "mlx_paged/attention/latent_layout.py": "latent attention",
    "models/latent_attention.py": "latent attention",
    "models/patch.py:_TracedValues": "latent attention",
    "models/patch.py:use_latents": "latent attention",
    "models/patch.py:quantised": "quantised KV blocks",
    "models/recurrent.py": "recurrent layers",
    "models/refusals.py": "models that can't be paged",
    "models/registry.py": "what is known of families",
    "models/replaced.py": "families with code of their own",
}


def count_code(text: str, leave_out: Collection[str] = ()) -> int:
    """Count the lines of a Python file that are not blank, a comment or a docstring.

    leave_out: names of classes and functions.
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        # A string that is a statement: a docstring, or what describes a field under it.
        is_text = isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        is_named = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in leave_out
        if is_text or is_named:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            lines -= set(range(first, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def files() -> list[Path]:
    """Return the Python files of the package and of `models/`, without the scripts that made the demo model."""
    return sorted([*(ROOT / "mlx_paged").rglob("*.py"), *(ROOT / "models").glob("*.py")])


def core_path() -> list[Path]:
    """Return the files that a greedy request needs."""
    code = (
        "import sys, mlx_paged.llm\nprint(*(m.__file__ for n, m in sys.modules.items() if n.startswith('mlx_paged')))"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    loaded = {Path(file).resolve() for file in printed.split()}
    return [file for file in files() if file.resolve() in loaded and not _is_in(file, OPTIONAL)]


def core_code(file: Path) -> int:
    """Count the lines of code of a file of the core path, without its optional classes and functions."""
    name = str(file.relative_to(ROOT))
    return count_code(file.read_text(), [each.split(":")[1] for each in OPTIONAL if each.startswith(f"{name}:")])


def _is_in(file: Path, names: Iterable[str]) -> bool:
    return any(ROOT / name in (file, *file.parents) for name in names)


def main() -> None:
    lines, code = defaultdict[str, int](int), defaultdict[str, int](int)
    core, backend_for_cpus = core_path(), ("mlx_paged/attention/cpu.py", "mlx_paged/cpu")
    for file in files():
        text, parts = file.read_text(), file.relative_to(ROOT).parts
        groups = ["/".join(parts[:-1]) + "/"]
        groups += ["the core path"] if file in core else []
        groups += [] if _is_in(file, backend_for_cpus) else ["all but the backend for CPUs"]
        for group in groups:
            lines[group] += len(text.splitlines())
            code[group] += core_code(file) if group == "the core path" else count_code(text)
    for folder in sorted(lines, key=lambda name: (name.startswith(("the ", "all ")), name)):
        print(f"{folder:32} {lines[folder]:7,} lines {code[folder]:7,} of code")


if __name__ == "__main__":
    main()
