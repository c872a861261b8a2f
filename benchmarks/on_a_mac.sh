#!/usr/bin/env bash
# What has to be seen on a Mac, in one go: tests on the device, the attention benchmark, a model at work.
#
#   bash benchmarks/on_a_mac.sh                 everything, into mlx-paged-on-a-mac.json: the file to send back
#   bash benchmarks/on_a_mac.sh --quick         small sizes and few tests, to see it run
#
# --output FILE    another file
# --python FILE    an environment that has the project already; otherwise one is made, .venv-on-a-mac
# --anywhere       on another machine too: what it reports is then no Mac's
#
# A step that fails is reported and does not keep the others from running. Exit codes: 0, 1 (a step failed), 2 (bad
# usage, or no Mac). Needs Python 3.11 or newer, 2 GB of disk and the network, for the packages; no model is downloaded.
# This script has not been run on a Mac yet.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

output=mlx-paged-on-a-mac.json python='' quick='' anywhere=''
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --anywhere) anywhere=yes ;;
        --output | --python)
            [ $# -ge 2 ] || { echo "on_a_mac.sh: $1 needs a file" >&2; exit 2; }
            [ "$1" = --output ] && output=$2 || python=$2
            shift
            ;;
        *) echo "on_a_mac.sh: there is no option $1 (the first lines of the script name them)" >&2; exit 2 ;;
    esac
    shift
done
if [ -z "$anywhere" ] && [ "$(uname -sm)" != "Darwin arm64" ]; then
    echo "on_a_mac.sh: this is $(uname -sm), not a Mac with Apple silicon (--anywhere runs it all the same)" >&2
    exit 2
fi
{ : >"$output"; } 2>/dev/null || { echo "on_a_mac.sh: $output can't be written" >&2; exit 2; }
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

failed='' order=()
step() {  # step NAME COMMAND...: runs it; its output, exit code and seconds go into the report
    local name=$1 began=$SECONDS code
    shift
    printf '\n==> %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
    printf '%s\n%s\n%s\n' "$*" "$code" "$((SECONDS - began))" >"$work/$name.step"
    order+=("$name")
    [ "$code" -eq 0 ] || failed="$failed $name"
    return "$code"
}

if [ -z "$python" ]; then
    step venv python3 -m venv .venv-on-a-mac
    python=.venv-on-a-mac/bin/python
    step install "$python" -m pip install --quiet -e '.[cpu,test]'
fi
run() {  # run NAME ARGUMENTS...: a step in the environment
    local name=$1
    shift
    step "$name" "$python" "$@"
}

tests=(tests/attention/test_kernels_*.py tests/attention/test_kernel_backend.py tests/attention/test_paged_attention.py tests/system/test_parity.py tests/cache/test_kv_cache.py)
tests+=(tests/sampling/test_draw_kernel.py tests/system/test_memory_flat.py tests/system/test_pipelining*.py tests/models/test_demo.py)
sizes=()
bench=(-p 512 -g 128 -b 1,8,32 -n 5)
if [ -n "$quick" ]; then
    tests=(tests/cache/test_kv_cache.py)
    sizes=(--quick)
    bench=(-p 16 -g 8 -b 1,2 -n 1)
fi

run device -c 'import json, mlx.core as mx; print(json.dumps(mx.device_info(), default=str))'
run tests -m pytest -rs -k "not cuda" "${tests[@]}"
run generate -m mlx_paged generate --verbose --profile "$work/trace.json" "Tell me a story." "Write a story about Tom."
run attention benchmarks/attention.py "${sizes[@]+"${sizes[@]}"}" --json "$work/attention.json"
# Long prompts by the kernels, and by MLX's own attention over keys that are copied together: which is faster here?
for way in kernel gathered; do
    MLX_PAGED_PREFILL=$way run "prefill-$way" benchmarks/attention.py --only prefill "${sizes[@]+"${sizes[@]}"}" --json "$work/prefill-$way.json"
done
run latent benchmarks/latent.py "${sizes[@]+"${sizes[@]}"}" --json "$work/latent.json"
# Tokens drawn by the kernel, and by plain operations.
run draws benchmarks/draws.py "${sizes[@]+"${sizes[@]}"}" --json "$work/draws.json"
# How decode is divided among simdgroups: query heads of each, and how many of them; and what Metal gives each kernel.
run layouts benchmarks/decode_layouts.py "${sizes[@]+"${sizes[@]}"}" --json "$work/layouts.json"
# Recurrences, which here take prompts one after the other, and mlx-lm's batch all at once with padding.
run hybrids benchmarks/hybrids.py --only short_prompts "${sizes[@]+"${sizes[@]}"}" --json "$work/hybrids.json"
run bench -m mlx_paged bench "${bench[@]}" -o json
# MLX ends a command buffer at 40 or 50 million elements that its operations take and make: what if it did not?
MLX_MAX_MB_PER_BUFFER=1000000 run bench-large-buffers -m mlx_paged bench "${bench[@]}" -o json
# Is the kernel worth it that writes into the pools?
MLX_PAGED_WRITE=scatter run bench-scatter -m mlx_paged bench "${bench[@]}" -o json

"$python" - "$work" "$output" "${order[@]}" <<'END' || exit 1
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def json_or_none(path: Path):
    """What a file holds, from the first line on that begins like JSON."""
    try:
        text = path.read_text()
        return json.JSONDecoder().raw_decode(text, re.search(r"^[\[{]", text, re.MULTILINE).start())[0]
    except (OSError, ValueError, AttributeError):
        return None


work, output, *names = sys.argv[1:]
steps = []
for name in names:
    command, exit_code, seconds = (Path(work) / f"{name}.step").read_text().splitlines()
    log = (Path(work) / f"{name}.log").read_text(errors="replace")
    steps.append(
        {"name": name, "command": command, "exit_code": int(exit_code), "seconds": int(seconds), "output": log[-20000:]}
    )
report = {
    "machine": {
        "platform": platform.platform(),
        "chip": said_by("sysctl", "-n", "machdep.cpu.brand_string"),
        "memory_bytes": said_by("sysctl", "-n", "hw.memsize"),
        "macos": platform.mac_ver()[0] or None,
        "commit": said_by("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "device": json_or_none(Path(work) / "device.log"),
    }
    | {package: of(package) for package in ("mlx", "mlx-lm", "numpy")},
    "steps": steps,
    "attention": json_or_none(Path(work) / "attention.json"),
    "prefill_kernel": json_or_none(Path(work) / "prefill-kernel.json"),
    "prefill_gathered": json_or_none(Path(work) / "prefill-gathered.json"),
    "hybrids": json_or_none(Path(work) / "hybrids.json"),
    "latent": json_or_none(Path(work) / "latent.json"),
    "draws": json_or_none(Path(work) / "draws.json"),
    "layouts": json_or_none(Path(work) / "layouts.json"),
    "bench": json_or_none(Path(work) / "bench.log"),
    "bench_large_buffers": json_or_none(Path(work) / "bench-large-buffers.log"),
    "bench_scatter": json_or_none(Path(work) / "bench-scatter.log"),
    "profile": json_or_none(Path(work) / "trace.json"),
}
Path(output).write_text(json.dumps(report, indent=1) + "\n")
END

echo
if [ -n "$failed" ]; then
    echo "failed:$failed; $output says how, please send it back"
    exit 1
fi
echo "all done; please send back $output"
