"""From a prompt and parameters to a request that can be served, or one line on why not."""

import threading
import time
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from mlx_paged.config import EngineConfig
from mlx_paged.engine.detokenizer import Detokenizer, readable
from mlx_paged.engine.text_stream import TextStream
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.sampling.grammar import GrammarCompiler
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


class InputProcessor:
    """Validates prompts and parameters against a model, its tokenizer and a pool. May be used by several threads."""

    def __init__(
        self, tokenizer: Any, vocab_size: int, num_blocks: int, max_model_len: int | None, config: EngineConfig
    ) -> None:
        """num_blocks: those of the pool that keeps the whole context. max_model_len: None if only that bounds it."""
        tokenizer = None if tokenizer is None else readable(tokenizer)
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(tokenizer.eos_token_ids) if tokenizer is not None else frozenset()
        self.detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._special_prefix: list[int] | None = None
        self._vocab_size = vocab_size
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._config = config
        self._grammars = GrammarCompiler(tokenizer, vocab_size, self.eos_token_ids)
        self._tokenizer_lock = threading.Lock()  # fast tokenizers do not like to be used twice at once

    def make_request(
        self, prompt: str | SequenceOf[int], params: SamplingParams | BeamSearchParams, *, stream: bool = False
    ) -> Request:
        """A request without an id. Raises ValueError or TypeError as `Engine.add_request` does."""
        token_ids = self._encode(prompt)
        beams = isinstance(params, BeamSearchParams)
        width = params.beam_width if isinstance(params, BeamSearchParams) else params.n
        outside = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none: use stop_token_ids")
        if isinstance(params, SamplingParams):
            outside += [token for token in params.logit_bias or () if token >= self._vocab_size]
        elif stream:
            raise ValueError("a beam search can't be streamed: its hypotheses are known at its end")
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the model's vocabulary of {self._vocab_size}")
        if width > self._config.max_num_seqs:
            asked = f"beam_width={width} beams" if beams else f"n={width} samples"
            raise ValueError(f"{asked} can't run at once: max_num_seqs is {self._config.max_num_seqs}")
        max_tokens = self._max_new_tokens(len(token_ids), params.max_tokens, width if beams else 1)
        return Request(
            request_id=-1,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            seed=0,
            max_tokens=max_tokens,
            stream=stream,
            metrics=RequestMetrics(time.monotonic()),
            search=self._beam_search(params, max_tokens),
            matcher=self._grammar_matcher(params),
        )

    def _beam_search(self, params: SamplingParams | BeamSearchParams, max_tokens: int) -> BeamSearch | None:
        if not isinstance(params, BeamSearchParams):
            return None
        text_stream = None
        if params.stop_strings and self.detokenizer is not None:
            text_stream = TextStream.of(self.detokenizer, params)
        return BeamSearch(params, max_tokens, self.eos_token_ids, text_stream)

    def _grammar_matcher(self, params: SamplingParams | BeamSearchParams) -> Any:
        if isinstance(params, SamplingParams) and params.is_constrained:
            return self._grammars.matcher(params)
        return None

    def _encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer: give the prompt as token ids")
            with self._tokenizer_lock:
                token_ids = self._encode_text(prompt) if prompt else []
        else:
            token_ids = list(prompt)
            types = set(map(type, token_ids))  # few, where tokens are many
            if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in types):
                raise TypeError("a prompt is text or a list of token ids")
            token_ids = [int(token) for token in token_ids]
        if not token_ids:
            raise ValueError("the prompt is empty: give it at least one token")
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        """Tokenize a text that is to be continued: with what the tokenizer puts before every text, but only once.

        A rendered chat has that already. What would come behind the text, such as an end token, is left out.
        """
        assert self._tokenizer is not None
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if self._special_prefix is None:
            whole = list(self._tokenizer.encode(text, add_special_tokens=True))
            places = range(len(whole) - len(token_ids) + 1)
            found = [whole[:start] for start in places if whole[start : start + len(token_ids)] == token_ids]
            if len(found) != 1:  # of a few texts, such as nothing but a start token
                return token_ids if found else whole
            (self._special_prefix,) = found
        is_rendered = token_ids[:1] == self._special_prefix[:1]
        return token_ids if is_rendered else self._special_prefix + token_ids

    def _max_new_tokens(self, num_prompt: int, max_tokens: int | None, num_beams: int) -> int:
        """How many tokens a request may put out. Raises ValueError if its prompt, or what it asks for, can't fit."""
        block_size = self._config.block_size
        wanted = max_tokens or 1
        context = self._max_model_len
        if context is not None:
            if num_prompt >= context:
                raise ValueError(
                    f"the prompt has {num_prompt} tokens and the context is {context}: shorten the prompt "
                    "or raise max_model_len if the model allows it"
                )
            wanted = min(wanted, context - num_prompt)
        # The last token put out is never fed back, so it needs a place in the context but no slot in the pool.
        shared = num_prompt // block_size  # blocks that all beams have in common
        tail = -(-(num_prompt + wanted - 1) // block_size) - shared
        needed = shared + tail * (num_beams if wanted > 1 else 1)  # beams of one token write nothing
        if needed > self._num_blocks:
            what = f"{wanted} more" if num_beams == 1 else f"{num_beams} beams of {wanted} more"
            raise ValueError(
                f"a prompt of {num_prompt} tokens and {what} need {needed} blocks of {block_size} "
                f"tokens and the pool has {self._num_blocks}: shorten the prompt, lower max_tokens, or raise "
                "num_kv_blocks or kv_cache_memory"
            )
        if max_tokens is not None:
            return wanted
        room = self._num_blocks * block_size - num_prompt + 1
        return room if context is None else min(room, context - num_prompt)
