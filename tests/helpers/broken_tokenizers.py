"""A tokenizer whose streaming detokenizer can't stand one token."""

from __future__ import annotations

from typing import Any, Literal

Moment = Literal["add_token", "finalize"]


class BrokenTokenizer:
    """As the tokenizer that it wraps, but text with `bad_token` raises, when the token comes or only at the end."""

    def __init__(self, tokenizer: Any, bad_token: int, moment: Moment = "add_token") -> None:
        self.bad_token = bad_token
        self.moment = moment
        self.error: Exception = ValueError(f"no text for\n  {bad_token}")
        self._wrapped = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __len__(self) -> int:
        return len(self._wrapped)

    @property
    def detokenizer(self) -> Any:
        return _BrokenDetokenizer(self, self._wrapped.detokenizer)


class _BrokenDetokenizer:
    def __init__(self, owner: BrokenTokenizer, detokenizer: Any) -> None:
        self._owner = owner
        self._detokenizer = detokenizer
        self._met_bad_token = False

    @property
    def last_segment(self) -> str:
        return str(self._detokenizer.last_segment)

    def add_token(self, token: int) -> None:
        self._met_bad_token |= token == self._owner.bad_token
        self._raise_at("add_token")
        self._detokenizer.add_token(token)

    def finalize(self) -> None:
        self._raise_at("finalize")
        self._detokenizer.finalize()

    def _raise_at(self, moment: Moment) -> None:
        if self._met_bad_token and moment == self._owner.moment:
            raise self._owner.error
