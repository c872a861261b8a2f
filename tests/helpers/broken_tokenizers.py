"""A tokenizer that can't decode one token."""

from __future__ import annotations

from typing import Any


class BrokenTokenizer:
    """As the tokenizer that it wraps, but to decode `bad_token` raises."""

    def __init__(self, tokenizer: Any, bad_token: int) -> None:
        self.bad_token = bad_token
        self.error: Exception = ValueError(f"no text for\n  {bad_token}")
        self._wrapped = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __len__(self) -> int:
        return len(self._wrapped)

    def decode(self, token_ids: Any, **options: Any) -> str:
        if self.bad_token in token_ids:
            raise self.error
        return str(self._wrapped.decode(token_ids, **options))
