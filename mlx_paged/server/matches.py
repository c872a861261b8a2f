"""What the cache had of the last prompts, and where they left it: for the log, and for who asks."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mlx_paged.outputs import PrefixMatch
from mlx_paged.request import Request

LOG = logging.getLogger("mlx_paged.server")

_WANTED_S = 600.0
_MOST = 32


class Matches:
    """Remembers how the last prompts compared with the cache, while somebody wants to know."""

    def __init__(self, *, log: bool) -> None:
        """log: write a line for each."""
        self._log = log
        self._wanted_until = math.inf if log else -math.inf
        self._last: deque[tuple[str | None, str | None, PrefixMatch]] = deque(maxlen=_MOST)

    def ask(self, request: Request) -> None:
        """Have a request that is about to be run compared with the cache, if that is wanted."""
        request.wants_prefix_match = time.monotonic() < self._wanted_until

    def note(self, request: Request, num_cached_tokens: int, decode: Callable[[Sequence[int]], str] | None) -> None:
        """Remember the match of a request that runs, if it has one. decode: where prompts may be logged."""
        match: PrefixMatch | None = request.prefix_match
        if match is None:
            return
        request.prefix_match = None
        if num_cached_tokens != match.num_cached_tokens:
            match.num_cached_tokens = num_cached_tokens
            match.reason = f"the cache changed while it waited; when it came, {match.reason}"
        self._last.appendleft((request.client_id, request.params.cache_salt, match))
        if self._log:
            LOG.info("id=%s %s", request.client_id, in_words(match, decode))

    def newest(self, salt: str | None) -> list[tuple[str | None, PrefixMatch]]:
        """Return the matches of this key's requests, and what clients call these; go on to remember for ten minutes.

        salt: that of the key that asks, if there are several.
        """
        self._wanted_until = max(self._wanted_until, time.monotonic() + _WANTED_S)
        return [(name, match) for name, own, match in self._last if is_of_key(own, salt)]


def is_of_key(cache_salt: str | None, salt: str | None) -> bool:
    """Say whether a request came with the key of a salt; None: there are not several keys, so it did."""
    return salt is None or (cache_salt or "").startswith(f"{salt}:")


def in_json(match: PrefixMatch, decode: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    """Describe a match as an object. decode: turns tokens into text, where texts of prompts may be told."""
    differs: dict[str, Any] | None = None
    if match.tokens:
        at = match.num_tokens_before
        differs = {"position": match.num_matching_tokens, "token": match.tokens[at], "cached_token": None}
        if decode is not None:  # a cached token tells as much as its text
            differs["cached_token"] = match.cached_tokens[at]
            differs |= {"text": decode(match.tokens), "cached_text": decode(match.cached_tokens)}
    return {
        "num_tokens": match.num_tokens,
        "num_cached_tokens": match.num_cached_tokens,
        "num_matching_tokens": match.num_matching_tokens,
        "differs": differs,
        "reason": match.reason,
    }


def in_words(match: PrefixMatch, decode: Callable[[Sequence[int]], str] | None) -> str:
    """Describe a match in one line of the log."""
    line = f"{match.num_cached_tokens} of {match.num_tokens} prompt tokens were cached: {match.reason}"
    if match.tokens:
        line += f" (token {match.tokens[match.num_tokens_before]})"
        if decode is not None:
            line += f", {decode(match.tokens)!r} instead of {decode(match.cached_tokens)!r}"
    return line
