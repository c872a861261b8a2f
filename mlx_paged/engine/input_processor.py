"""From a prompt and parameters to a request that can be served, or one line on why not."""

import threading
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from mlx_paged.config import EngineConfig, excerpt
from mlx_paged.engine.chat_template import ChatTemplate
from mlx_paged.engine.detokenizer import Detokenizer, readable
from mlx_paged.engine.text_stream import TextStream
from mlx_paged.errors import PromptTooLong
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request
from mlx_paged.sampling.bad_words import BadWords, TokenTexts
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.sampling.grammar import GrammarCompiler
from mlx_paged.sampling.thinking import ThinkingMatcher
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams, as_int, as_list, is_text


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
        self._token_texts = TokenTexts(tokenizer, vocab_size)
        self._tokenizer_lock = threading.Lock()  # fast tokenizers do not like to be used twice at once
        self.chat_template = ChatTemplate(tokenizer, self._tokenizer_lock)

    def make_request(
        self,
        prompt: str | SequenceOf[int],
        params: SamplingParams | BeamSearchParams,
        *,
        stream: bool = False,
        clamp_max_tokens: bool = False,
    ) -> Request:
        """A request without an id. Raises ValueError or TypeError as `Engine.add_request` does.

        clamp_max_tokens: where max_tokens is more than fits, take what fits.
        """
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise TypeError(f"params must be SamplingParams or BeamSearchParams, got {excerpt(params)}")
        token_ids = self._encode(prompt)
        beams = isinstance(params, BeamSearchParams)
        width = params.beam_width if isinstance(params, BeamSearchParams) else params.n
        self._check_token_ids("the prompt", token_ids)
        for name in ("logit_bias", "stop_token_ids"):
            self._check_token_ids(name, getattr(params, name, None) or ())
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none: use stop_token_ids")
        if beams and stream:
            raise ValueError("a beam search can't be streamed: its hypotheses are known at its end")
        if beams and width > self._config.max_num_seqs:
            raise ValueError(f"beam_width={width} beams can't run at once: max_num_seqs is {self._config.max_num_seqs}")
        wanted, room = params.max_tokens, self._config.block_size * self._num_blocks - len(token_ids) + 1
        if clamp_max_tokens and wanted is not None and not beams:
            wanted = max(1, min(wanted, room))
        max_tokens = self._max_new_tokens(len(token_ids), wanted, width if beams else 1)
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
            matcher=self._matcher(params, token_ids),
            bad_words=self._bad_words(params),
            prompt_logprobs=None if getattr(params, "prompt_logprobs", None) is None else [None],
            in_waves=not beams and width > self._config.max_num_seqs,
            num_opening=getattr(prompt, "num_opening", 0),
        )

    def _check_token_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                what = f"{name}: token id {excerpt(token_id)}"
                raise ValueError(f"{what} is outside the model's vocabulary of {self._vocab_size}")

    def _beam_search(self, params: SamplingParams | BeamSearchParams, max_tokens: int) -> BeamSearch | None:
        if not isinstance(params, BeamSearchParams):
            return None
        text_stream = None
        if params.stop_strings and self.detokenizer is not None:
            text_stream = TextStream.of(self.detokenizer, params)
        return BeamSearch(params, max_tokens, self.eos_token_ids, text_stream)

    def _matcher(self, params: SamplingParams | BeamSearchParams, token_ids: list[int]) -> Any:
        """What says which tokens may come next: a GrammarMatcher, a ThinkingMatcher, or None where any may."""
        if not isinstance(params, SamplingParams):
            return None
        grammar = self._grammars.matcher(params) if params.is_constrained else None
        if params.max_thinking_tokens is None:
            return grammar
        if not getattr(self._tokenizer, "has_thinking", False):
            raise ValueError("max_thinking_tokens needs a model that marks its thinking, and this one does not")
        with self._tokenizer_lock:
            budget = params.max_thinking_tokens
            return ThinkingMatcher(self._tokenizer, token_ids, self._vocab_size, budget, grammar)

    def _bad_words(self, params: SamplingParams | BeamSearchParams) -> BadWords | None:
        words = getattr(params, "bad_words", None)
        return BadWords(self._token_texts, words, params.skip_special_tokens) if words else None

    def _encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer: give the prompt as token ids")
            if not is_text(prompt):
                raise ValueError("the prompt is not UTF-8 text: it has half of a surrogate pair")
            with self._tokenizer_lock:
                token_ids = self._encode_text(prompt) if prompt else []
        else:
            token_ids = _token_ids(prompt)
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
        room = self._num_blocks * block_size
        most = room if context is None else min(room, context - 1)
        if context is not None:
            if num_prompt >= context:
                raise PromptTooLong(
                    f"the prompt has {num_prompt} tokens and the context is {context}: shorten the prompt "
                    "or raise max_model_len if the model allows it",
                    num_prompt,
                    most,
                )
            wanted = min(wanted, context - num_prompt)
        # The last token put out is never fed back, so it needs a place in the context but no slot in the pool.
        shared = num_prompt // block_size  # blocks that all beams have in common
        tail = -(-(num_prompt + wanted - 1) // block_size) - shared
        needed = shared + tail * (num_beams if wanted > 1 else 1)  # beams of one token write nothing
        if needed > self._num_blocks:
            what = f"{wanted} more" if num_beams == 1 else f"{num_beams} beams of {wanted} more"
            raise PromptTooLong(
                f"a prompt of {num_prompt} tokens and {what} need {needed} blocks of {block_size} "
                f"tokens and the pool has {self._num_blocks}: shorten the prompt, lower max_tokens, or raise "
                "num_kv_blocks or kv_cache_memory",
                num_prompt,
                most,
            )
        if max_tokens is not None:
            return wanted
        left = room - num_prompt + 1
        return left if context is None else min(left, context - num_prompt)


def _token_ids(prompt: object) -> list[int]:
    """Copy a prompt of token ids. Raises TypeError for anything else, bytes too, which would be numbers of letters."""
    values = as_list(prompt)
    if values is not None:
        token_ids: list[Any] = values if set(map(type, values)) <= {int} else list(map(as_int, values))
        if None not in token_ids:
            return token_ids
        prompt = values[token_ids.index(None)]
    hint = "; a conversation goes to chat" if isinstance(prompt, Mapping) else ""
    hint = "; decode bytes first" if isinstance(prompt, bytes | bytearray) else hint
    inside = "" if values is None else " in a list"
    raise TypeError(f"a prompt is text or a list of token ids, got {excerpt(prompt)}{inside}{hint}")
