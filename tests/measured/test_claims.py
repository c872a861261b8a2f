"""What pages claim in words are numbers of the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.run_benchmark import RESULTS, ROOT

PAGES = ("benchmarks.md", "quantised_cache.md", "scaling.md")
Results = dict[str, list[dict[str, Any]]]


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The row that has these values."""
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def even(results: Results) -> Iterator[str]:
    (theirs, ours, llama_cpp) = results["W1"]
    yield f"(W1: {llama_cpp['cpu_speedup']:.2f} times mlx-lm, this engine {ours['cpu_speedup']:.2f})"
    assert 0.45 < ours["kv_peak_mb"] / theirs["kv_peak_mb"] < 0.55
    (theirs, ours, llama_cpp) = results["W2"]
    yield f"**W2, mixed lengths: {ours['speedup']:.2f} times mlx-lm's tokens per second, in a third of its memory**"
    assert 0.28 < ours["kv_peak_mb"] / theirs["kv_peak_mb"] < 0.38
    yield f"{ours['kv_peak_mb']:.0f} MB, where mlx-lm takes {theirs['kv_peak_mb']:.0f}"
    yield f"and llama.cpp {llama_cpp['kv_peak_mb']:.0f}, since it is given room for 16 of the longest"


def sharing(results: Results) -> Iterator[str]:
    rows = [row for row in results["W4"] if row["case"] == "512 shared"]
    ours, *theirs = (of(rows, system=name) for name in ("mlx-paged", "mlx-lm", "mlx-lm, prompt cache", "llama.cpp"))
    times = [ours["speedup"] / row["speedup"] for row in theirs]
    yield f"With 512 tokens shared 16 times {times[0]:.1f} times mlx-lm's tokens per second, {times[1]:.1f} times those"
    yield f"and {times[2]:.1f} times llama.cpp's, each of whose slots computes it: in {ours['kv_peak_mb']:.0f} MB"
    yield "where they take {:.0f}, {:.0f} and {:.0f}".format(*(row["kv_peak_mb"] for row in theirs))
    cached, plain = (
        of(results["W4"], case="512, none shared", system=f"mlx-paged{name}") for name in ("", ", no prefix cache")
    )
    assert abs(cached["cpu_speedup"] / plain["cpu_speedup"] - 1) < 0.02
    rows = [row for row in results["W5"] if row["case"] == "6 samples"]
    ours, *theirs = (of(rows, system=name) for name in ("mlx-paged, n=6", "mlx-lm, 6 requests", "llama.cpp"))
    times = [ours["speedup"] / row["speedup"] for row in theirs]
    yield f"give {times[0]:.1f} times mlx-lm's tokens per second and {times[1]:.1f} times llama.cpp's"
    yield "in {:.0f} MB, where they take {:.0f} and {:.0f}".format(*(row["kv_peak_mb"] for row in (ours, *theirs)))


def long_contexts(results: Results) -> Iterator[str]:
    _, ours, scattered, codes, llama_cpp = results["W6"]
    yield f"**W6, four prompts of 4,096 tokens: {ours['cpu_speedup']:.2f} times mlx-lm's tokens per second**"
    yield f"llama.cpp's {llama_cpp['cpu_speedup']:.2f}. Scattered blocks {scattered['cpu_speedup']:.2f}"
    yield f"**In int8 blocks {codes['cpu_speedup']:.2f}, with {codes['kv_peak_mb']:.0f} MB of K and V"
    yield f"where float32 takes {ours['kv_peak_mb']:.0f}"


def windows(results: Results) -> Iterator[str]:
    theirs, ours, scattered, codes, llama_cpp = results["W6"]
    assert ours["case"] == "1 x 16,384 in"
    yield (
        f"one prompt of 16,384 tokens: {ours['cpu_speedup']:.2f} times mlx-lm's tokens per second, llama.cpp's "
        f"{llama_cpp['cpu_speedup']:.2f}."
    )
    yield f"K and V take {ours['kv_peak_mb']:.0f} MB, in mlx-lm {theirs['kv_peak_mb']:.0f}, in llama.cpp"
    yield f"whose chunks have 512, {llama_cpp['kv_peak_mb']:.0f}."
    yield f"**In int8 blocks {codes['cpu_speedup']:.2f}, with {codes['kv_peak_mb']:.0f} MB.**"
    assert scattered["cpu_speedup"] > 0.98 * ours["cpu_speedup"]


def room(results: Results) -> Iterator[str]:
    reserved, *_, ours, llama_cpp = results["W3"]
    yield f"all {ours['peak_concurrency']} requests run at once where reserved rows take four**"
    yield f"with {ours['cpu_speedup']:.2f} times the tokens per second, and {ours['kv_waste']:.1%} of the blocks"
    yield f"llama.cpp, with four slots, {llama_cpp['cpu_speedup']:.2f}"
    assert reserved["peak_concurrency"] == llama_cpp["peak_concurrency"] == 4
    _, again, swapped = results["W7"]
    yield f"{again['cpu_speedup']:.2f} of the tokens per second**, and {swapped['cpu_speedup']:.2f} with swap"
    assert again["preemptions"] == swapped["preemptions"] == 4
    wastes = [row["kv_waste"] for row in results["W8"]]
    yield f"{min(wastes):.1%} in blocks of 8, {max(wastes):.1%} in blocks of 128"


def server(results: Results) -> Iterator[str]:
    rows = results["throughput"]
    ours = [row for row in rows if row["system"] == "mlx-paged serve"]
    theirs = [row for row in rows if row["system"] == "mlx_lm.server"]
    yield "{:.2f}, {:.2f} and {:.2f} of its tokens per second with 1, 8 and 32 streams".format(
        *(row["of_async_llm"] for row in ours)
    )
    ratios = (one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(ours, theirs, strict=True))
    yield "and {:.2f}, {:.2f} and {:.2f} of those of mlx-lm's server".format(*ratios)
    yield "have their first text after {:.1f} s, with mlx-lm's server after {:.1f}".format(
        *(row["first_ms_p50"] / 1000 for row in (ours[-1], theirs[-1]))
    )
    llama_cpp = [row["of_async_llm"] for row in rows if row["system"] == "llama.cpp's server"]
    yield "**llama.cpp's server gives {:.1f}, {:.1f} and {:.1f} times AsyncLLM's tokens on a CPU**".format(*llama_cpp)


def scripted(results: Results) -> Iterator[str]:
    rows = results["throughput"]
    ours = [row for row in rows if row["system"] == "mlx-paged serve"]
    yield "gives {:.2f}, {:.2f} and {:.2f} of AsyncLLM's tokens per second".format(*(r["of_async_llm"] for r in ours))
    alone, theirs = (of(rows, system=system, streams=32) for system in ("AsyncLLM", "mlx_lm.server"))
    yield f"{ours[-1]['tokens_per_s']:,.0f} of them with 32 streams"
    yield (
        f"for {ours[-1]['cpu_ms_per_token']:.2f} ms of CPU time per token where AsyncLLM takes "
        f"{alone['cpu_ms_per_token']:.2f}"
    )
    yield f"({of(rows, system='mlx_lm.server', streams=1)['of_async_llm']:.1f} times AsyncLLM)"
    yield f"it gives {theirs['of_async_llm']:.2f} of AsyncLLM's tokens"


def memory(results: Results) -> Iterator[str]:
    waste = {row["held_in"]: row["waste"] for row in results["waste"]}
    yield f"{waste['blocks of 16']:.1%} in blocks of 16 (the paper: under 4%)"
    yield f"{waste['2048 tokens reserved']:.1%} where 2,048 tokens are reserved"
    prefill, decode = (row["share"] for row in results["prefix_cost"])
    yield f"adds {prefill:.2%} to a prefill step of the demo model, and {decode:.2%} to a decode step"

    plain = [row for row in results["operations"] if row["allocator"] != "buddy"]
    ranges = [
        "{:.1f} to {:.1f}".format(*(most(row[name] for row in rows) / 1000 for most in (min, max)))
        for name, rows in (("allocate", plain), ("append", results["operations"]))
    ]
    yield f"{ranges[0]} microseconds to allocate a block"
    yield f"{ranges[1]} to append a token by the public methods"
    pairs = zip(results["operations"][::3], results["operations"][2::3], strict=True)
    ratios = [buddy[name] / lru[name] for lru, buddy in pairs for name in ("append_block", "free")]
    yield f"{min(ratios):.1f} to {max(ratios):.1f} times as much as `lru` per block"
    saved = [row[f"of_{n}"] for row in results["savings"] for n in (2, 4, 6) if row["sharing"] == "parallel sampling"]
    yield f"saves {100 * min(saved):.1f} to {max(saved):.1%} of the blocks with 2 to 6 samples"
    works = ("attention", "move_blocks", "gather")
    costs = [max(row["ratio"] - 1 for row in results["fragmentation"] if row["work"] == work) for work in works]
    yield "cost up to {:.0%} in attention and {:.0%} in copies, and up to {:.0%} in a plain gather".format(*costs)


def fair_steps(results: Results) -> Iterator[str]:
    (rows,) = results.values()
    bound, free, theirs = (row["longest_gap_ms"] / 1000 for row in rows)
    yield f"{rows[0]['prompt_tokens']:,} tokens is {bound:.1f} s, where it is {free:.1f} s without the bound"
    yield f"and {theirs:.1f} s in mlx-lm's server"
    yield "it gets {:.1f} tokens per second, {:.1f} and {:.1f}".format(*(row["tokens_per_s"] for row in rows))
    yield "its first token comes after {:.0f} s, {:.0f} s and {:.0f} s".format(*(row["first_token_s"] for row in rows))


def hybrids(results: Results) -> Iterator[str]:
    ratios = [row["ratio"] for row in results["short_prompts"]]
    yield f"take {min(ratios):.2f} to {max(ratios):.2f} of the time of mlx-lm's BatchGenerator"


def host(results: Results) -> Iterator[str]:
    sums = [
        row["cpu_median_us"] for row in results["host_work"] if (row["step"], row["part"]) == ("decode", "sum of these")
    ]
    yield f"costs {min(sums):.0f} to {max(sums):.0f} microseconds of CPU time"
    graphs = [of(results["host_work"], step="decode", part="sampling graph", context=10**n) for n in (3, 4, 5)]
    yield "takes {:.0f} to {:.0f} more".format(*(each["cpu_median_us"] for each in (graphs[0], graphs[-1])))
    streamed = {row["part"]: row["cpu_median_us"] / 1000 for row in results["detokenising"][3:]}
    yield f"cost {streamed['sum of these']:.1f} ms a step, and {streamed['detokenising']:.1f} ms for their text"
    joins = [row["cpu_median_us"] / 1000 for row in results["host_work"] if row["step"] == "join"]
    yield f"{joins[0]:.1f} ms at 1,000 tokens, {joins[-1]:.0f} ms at 100,000"
    own = [row["own_work"] for row in results["end_to_end"]]
    yield f"the engine's own work is {100 * min(own):.1f} to {max(own):.1%} of the thread's time"


def growth(results: Results) -> Iterator[str]:
    one, *_, most = results["sequences"]
    yield f"{most['sequences']} sequences take {most['host_us'] / one['host_us']:.1f} times the engine's own work"
    yield f"MLX builds graphs with {most['graph_us'] / one['graph_us']:.1f} times the work"
    assert max(row["host_us"] for row in results["pool"]) < 1.2 * results["pool"][0]["host_us"]
    short, *_, long = results["context"]
    yield f"from {short['context']:,} to {long['context']:,} tokens"
    yield f"a step costs {long['host_us'] / short['host_us']:.1f} times the engine's own work**"
    yield f"and MLX's graphs {long['graph_us'] / short['graph_us']:.1f} times"
    few, *_, many = results["prefixes"]
    assert many["prefixes"] == 2**20 and many["host_us"] < 1.1 * few["host_us"]
    yield f"takes {many['hit_us']:.1f} microseconds of the host's time"
    yield f"where it takes {few['hit_us']:.1f} among a thousand"


def accuracy(results: Results) -> Iterator[str]:
    share = {(row["task"], row["metric"]): row["engine"] for row in results["metrics"]}
    for row in results["metrics"]:
        assert row["metric"] == "word_perplexity" or row["mlx-lm"] == row["engine"] == row["server"]
    yield f"is right in {share['paged_stories', 'acc']:.1%} of 80 questions on stories"
    licences = (share["paged_licences", metric] for metric in ("acc", "acc_norm"))
    yield "in {:.1%} of 80 on licences ({:.1%} by `acc_norm`)".format(*licences)
    yield f"and in {20 * share['paged_answers', 'exact_match']:.0f} of 20 answers to the letter"
    assert all(row["equal"] == row["answers"] for row in results["texts"])
    assert all(row["largest"] < 0.0003 and row["others"] == 0 for row in results["differences"])
    asked = sum(row["answers"] for row in results["differences"] if row["way"] == "engine")
    yield f"No log-likelihood of {asked} differs by more than 0.0003 nats"


def ranks(results: Results) -> Iterator[str]:
    alone, shared = results["held"]
    assert shared["ranks"] == 3
    yield f"a rank has {shared['weights_mb']:.1f} MB of its {alone['weights_mb']:.1f} MB of weights"
    yield f"{shared['peak_mb']:.1f} MB were the most that rank 0 held while it loaded"
    yield f"a token takes {shared['kv_bytes']:,} bytes of its pool, where one process has {alone['kv_bytes']:,}"


def mixed(results: Results) -> Iterator[str]:
    rows = {name: [row for row in results["mixed_load"] if row["system"] == name] for name in ("mlx-paged", "mlx-lm")}
    (answered,) = {each[-1]["answered"] for each in rows.values()}
    yield f"{rows['mlx-lm'][-1]['minute']:.0f} minutes, {answered:,} requests that both answered"
    held, running = (max(row[name] for row in rows["mlx-lm"]) for name in ("held_mb", "running_mb"))
    yield f"mlx-lm held {held:.0f} MB at the most, of which up to {running:.0f} were of the batch that runs"
    assert all(abs(row["held_mb"] / 16 - 1) < 0.01 for row in rows["mlx-paged"])


def kept_prompts(results: Results) -> Iterator[str]:
    whole = json.loads((RESULTS / "mixed-load-linux-cpu.json").read_text())["results"]["mixed_load"]
    held, otherwise = (
        max(row["held_mb"] for row in rows if row["system"] == "mlx-lm" and row["minute"] < 10.01)
        for rows in (results["mixed_load"], whole)
    )
    yield f"they and the batch take {held:.0f} MB at the most in the first ten minutes, and not {otherwise:.0f}"


def quantised_time(results: Results) -> Iterator[str]:
    rows = {tuple(row["system"].split(", ")): row for row in results["speed"]}
    kinds = ("plain", "int8", "k8v4", "fp8")
    prompts, decoding = (
        [rows["mlx-paged", "4 at once", kind][part] for kind in kinds] for part in ("prompt_s", "decode_s")
    )
    yield f"{min(prompts[1:]):.1f} to {max(prompts[1:]):.1f} s for four at once, plain ones {prompts[0]:.1f} s"
    yield "{:.1f}, {:.1f} and {:.1f} s for four at once, plain {:.1f} s".format(*decoding[1:], decoding[0])
    slower = [seconds / decoding[0] - 1 for seconds in decoding[1:]]
    yield "by {:.0%} with `int8`**, {:.0%} with `k8v4` and {:.0%} with `fp8`".format(*slower)
    ratios = [[row[kind] / row["plain"] for row in results["attention"] if row["queries"] == 1] for kind in kinds[1:]]
    ranges = [f"{min(each):.1f} to {max(each):.1f}" for each in ratios]
    yield f"take {ranges[0]} times as long with `int8`, {ranges[1]} with `k8v4`, {ranges[2]} with `fp8`"
    ours, plain = (rows["mlx-paged", "1 at once", kind] for kind in ("int8", "plain"))
    yield f"{ours['kv_bytes'] / 1e6:.1f} MB where plain float32 takes {plain['kv_bytes'] / 1e6:.1f}"
    theirs = rows["mlx_lm", "1 at once", "--kv-bits 8 --quantized-kv-start 0"]
    yield f"it takes {theirs['kv_bytes'] / 1e6:.1f} MB"
    yield f"where this engine's `int8` takes {ours['kv_bytes'] / 1e6:.1f}"
    yield f"{theirs['decode_s']:.1f} s for decoding where this takes {ours['decode_s']:.1f}"
    assert ours["equal"] == theirs["equal"] == "32 of 32"


def with_spaces(name: str) -> Callable[[Results], Iterator[str]]:
    def claims(results: Results) -> Iterator[str]:
        costs = [row["ratio"] - 1 for row in results["quality"][1:]]
        yield "{} {:.1%}, {:.1%} and {:.1%}".format(name, *costs)

    return claims


CLAIMS: list[tuple[str, Callable[[Results], Iterator[str]]]] = [
    ("workloads-smollm2-linux-cpu.json", even),
    ("workloads-smollm2-sharing-linux-cpu.json", sharing),
    ("workloads-smollm2-long-linux-cpu.json", long_contexts),
    ("workloads-gemma3-long-linux-cpu.json", windows),
    ("workloads-smollm2-room-linux-cpu.json", room),
    ("server-smollm2-linux-cpu.json", server),
    ("server-scripted-linux-cpu.json", scripted),
    ("memory-linux-cpu.json", memory),
    ("fair-steps-linux-cpu.json", fair_steps),
    ("hybrids-linux-cpu.json", hybrids),
    ("host-overhead-linux-cpu.json", host),
    ("growth-linux-cpu.json", growth),
    ("parallel-smollm2-linux-cpu.json", ranks),
    ("mixed-load-linux-cpu.json", mixed),
    ("kept-prompts-linux-cpu.json", kept_prompts),
    ("quantised-cache-speed-linux-cpu.json", quantised_time),
    ("quantised-cache-smollm2-spaces-linux-cpu.json", with_spaces("SmolLM2")),
    ("quantised-cache-gemma3-spaces-linux-cpu.json", with_spaces("Gemma 3 270M")),
    ("accuracy-smollm2-linux-cpu.json", accuracy),
]


@pytest.mark.parametrize("file, claims", CLAIMS, ids=lambda each: each if isinstance(each, str) else "")
def test_the_numbers_in_words_are_those_of_the_results(file: str, claims: Callable[[Results], Iterator[str]]) -> None:
    page = " ".join(" ".join((ROOT / "docs" / name).read_text() for name in PAGES).split())
    for claim in claims(json.loads((RESULTS / file).read_text())["results"]):
        assert claim in page
