#!/usr/bin/env bash
# What has to be seen on a Mac, in one go and ten minutes at most, but for the packages that it installs first.
#
#   bash benchmarks/on_a_mac.sh                 everything, into mlx-paged-on-a-mac.json: the file to send back
#   bash benchmarks/on_a_mac.sh --quick         small sizes and few tests, to see it run
#
# --output FILE    another file
# --only PART,...  these parts, beside what the file has; on_a_mac.py names all, with the question that each answers
# --python FILE    an environment that has the project already; otherwise one is made, .venv-on-a-mac
# --anywhere       on another machine too: what it reports is then no Mac's
#
# A part that fails, or is cut off at its limit, is reported and does not keep the others from running. Exit codes: 0,
# 1 (a part failed or was cut off), 2 (bad usage, or no Mac). Needs Python 3.11 or newer, 2 GB of disk and the network,
# for the packages; no model is downloaded. This script has not been run on a Mac yet.
set -uo pipefail

# A file as it is named in the folder that the script is run in, which it leaves.
from_here() {
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

output=mlx-paged-on-a-mac.json python='' anywhere='' options=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) options+=(--quick) ;;
        --anywhere) anywhere=yes ;;
        --output | --python | --only)
            [ $# -ge 2 ] || { echo "on_a_mac.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --output) output=$(from_here "$2") ;;
                --python) python=$(from_here "$(command -v "$2" || echo "$2")") ;;
                --only) options+=(--only "$2") ;;
            esac
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
if [ -n "$python" ] && [ ! -x "$python" ]; then
    echo "on_a_mac.sh: there is no $python" >&2
    exit 2
fi
if [ -z "$python" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$(python3 --version 2>&1) || found='no Python'
    echo "on_a_mac.sh: python3 is $found, and 3.11 or newer is needed: put one first on the PATH, or name it by --python" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit 1
{ : >>"$output"; } 2>/dev/null || { echo "on_a_mac.sh: $output can't be written" >&2; exit 2; }
[ -s "$output" ] || rm -f "$output"

if [ -z "$python" ]; then
    python=.venv-on-a-mac/bin/python
    echo "==> installing the packages into .venv-on-a-mac"
    { python3 -m venv .venv-on-a-mac && "$python" -m pip install --quiet -e '.[cpu,test]'; } || {
        echo "on_a_mac.sh: the packages could not be installed; why is said above" >&2
        exit 1
    }
fi
exec "$python" benchmarks/on_a_mac.py --json "$output" "${options[@]+"${options[@]}"}"
