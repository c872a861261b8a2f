#!/usr/bin/env bash
# Drives a real server with clients and agents as people install them: tests/agents/run.sh [--folder FOLDER] [NAME ...]
# Without names, all. Installs what is not yet in FOLDER (default: a temporary one), which can be kept and given again.
# What is installed runs in a namespace whose network is a loopback and nothing else, and whose processes end with it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v "$here/../../.venv/bin/python" || command -v python3)}
folder=
if [ "${1:-}" = --folder ]; then
    mkdir -p "${2:?--folder needs a name}"
    folder=$(cd "$2" && pwd)
    shift 2
fi
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
"$python" "$here/clients.py" "$folder" "$@"
unshare --map-root-user --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && exec "$@"' - "$python" "$here/drive.py" "$folder" "$@"
