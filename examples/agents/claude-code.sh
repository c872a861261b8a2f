#!/usr/bin/env bash
# Claude Code with the model that mlx-paged serves: bash claude-code.sh [arguments of claude]
export ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=any
export ANTHROPIC_MODEL=qwen3 ANTHROPIC_DEFAULT_HAIKU_MODEL=qwen3
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
exec claude "$@"
