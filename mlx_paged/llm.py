"""The Python API: load a model, chat, generate, stream."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast, overload

import mlx.nn as nn

from mlx_paged.config import EngineConfig, excerpt
from mlx_paged.cpu.blas import blas_name
from mlx_paged.engine.chat_template import ChatTemplate, Message, TemplateOptions
from mlx_paged.engine.engine import Engine
from mlx_paged.engine.profile import Profile
from mlx_paged.models import adapters, loading
from mlx_paged.models.patch import PatchedModel, patch_model
from mlx_paged.outputs import BeamSearchOutput, EngineStats, Output, RequestOutput
from mlx_paged.progress import ProgressBar
from mlx_paged.request import Request
from mlx_paged.runner.memory_plan import blocks_for_requests
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams, as_int, as_list
from mlx_paged.speculation.load_draft import load_draft

Params = TypeVar("Params", SamplingParams, BeamSearchParams)
Prompt = str | Sequence[int]
KnownRequests = Callable[["LLM"], Iterable[tuple[Prompt, SamplingParams | BeamSearchParams]] | None]


class LLM:
    """A model with a paged KV cache.

        llm = LLM("qwen2")
        answer = llm.chat([{"role": "user", "content": "Why is the sky blue?"}], SamplingParams(max_tokens=64))
        print(answer.outputs[0].text)

    model: an alias, a Hugging Face repository, a folder, or None for the bundled demo model; the other arguments are
    those of `EngineConfig`. Raises ModelError for a model that can't be had or run, ValueError for a value out of
    range or a cache that does not fit. A model and its engine belong to the thread that made them.
    """

    def __init__(self, model: str | Path | None = None, **config: Any) -> None:
        engine_config = EngineConfig(**config)
        self._start(loading.load(model, engine_config.dtype, engine_config.adapter_path), engine_config)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, **config: Any) -> "LLM":
        """Make an engine for an mlx-lm model that is already loaded, and which goes on working in mlx-lm.

        tokenizer: mlx-lm's TokenizerWrapper; without one prompts are token ids and no text comes out. The weights
        are converted only if `dtype` is given; an adapter of `adapter_path` stays on the model. Raises ModelError for
        what is neither.
        """
        engine_config = EngineConfig(**config)
        loading.check_model(model)
        loading.check_tokenizer(tokenizer)
        adapters.add_adapter(model, adapters.check_adapter(engine_config.adapter_path))
        if engine_config.dtype is not None:
            loading.set_dtype(model, engine_config.dtype)
        context = loading.context_of_model(model)
        llm = cls.__new__(cls)
        llm._start(loading.LoadedModel(model, tokenizer, context, {}), engine_config)
        return llm

    @classmethod
    def for_requests(cls, model: str | Path | None, requests: KnownRequests, **config: Any) -> "LLM":
        """Make an engine whose pool, if `config` gives it no size, is no larger than requests that are known need.

        requests: called when the tokenizer is there and the weights are not, for the prompts that will be run and
        their parameters, or None. What it raises ends the start.
        """
        engine_config = EngineConfig(**config)
        llm = cls.__new__(cls)
        llm._start(loading.load(model, engine_config.dtype, engine_config.adapter_path), engine_config, requests)
        return llm

    def _start(self, loaded: loading.LoadedModel, config: EngineConfig, requests: KnownRequests | None = None) -> None:
        asked, context = config.max_model_len, loaded.max_model_len
        if asked is not None and context is not None and asked > context:
            raise ValueError(
                f"max_model_len={asked} is more than the {context} tokens of context that the model was made for"
            )
        max_model_len = context if asked is None else asked
        self.tokenizer = loaded.tokenizer
        self.sampling_defaults = loaded.sampling_defaults
        """What the model's generation_config.json says of SamplingParams, by their names; it may be empty."""
        self._outputs: dict[int, deque[Output]] = {}  # where the run that a request belongs to finds its outputs
        self._chat_template = ChatTemplate(self.tokenizer, threading.Lock())
        num_needed = None if requests is None else self._blocks_needed(requests, config, max_model_len)

        def draft(model: PatchedModel) -> PatchedModel | None:
            return load_draft(model, config, loaded.tokenizer, max_model_len)

        if config.num_ranks > 1:
            from mlx_paged.runner.follower import make_runner

            self._runner: ModelRunner = make_runner(loaded.model, config, max_model_len, num_needed, draft)
        else:
            model = patch_model(loaded.model, max_model_len)
            self._runner = ModelRunner(model, config, max_model_len, num_needed, draft(model))
        config = self._runner.config
        self.engine = Engine(self._runner, loaded.tokenizer, config, max_model_len)
        self._chat_template = self.engine.input_processor.chat_template

    def _blocks_needed(self, requests: KnownRequests, config: EngineConfig, max_model_len: int | None) -> int | None:
        if (known := requests(self)) is None:
            return None
        sized = [
            (len(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt), params)
            for prompt, params in known
        ]
        return blocks_for_requests(sized, config, max_model_len)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them batched. Returns their outputs in the prompts' order.

        A prompt is continued as it stands: no chat template is applied, and a model that was trained to answer often
        ends at once, or rambles. `chat` asks such a model.

        prompts: texts or lists of token ids, or a single one. params: for all prompts, or one for each; None is
        SamplingParams(), which draws from the model's own distribution. progress: show a bar on stderr if that is a
        terminal. Everything is validated before anything runs: raises ValueError, or TypeError, as
        `Engine.add_request` does. When it is interrupted, what it held is freed.
        """
        return cast(list[RequestOutput], self._complete(prompts, params, SamplingParams, progress))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[BeamSearchOutput]:
        """Find the best hypotheses for each prompt, all prompts batched. Arguments and errors are `generate`'s."""
        return cast(list[BeamSearchOutput], self._complete(prompts, params, BeamSearchParams, progress))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
        **options: Unpack[TemplateOptions],
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **options: Unpack[TemplateOptions],
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **options: Unpack[TemplateOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation through the model's chat template, or each of a list of them, all batched.

        Returns the answer, or a list of answers in the conversations' order. messages: [{"role": "user", "content":
        ...}, ...], where content is text or a list of parts, {"type": "text", "text": ...}. options: what the template
        may use, as in `encode_chat`. params and progress, and what is raised, are those of `generate`;
        `get_default_sampling_params` returns what the model's makers recommend.
        """
        conversations = as_list(messages)
        if conversations and not isinstance(conversations[0], Mapping):
            return self.generate(
                [self.encode_chat(each, **options) for each in conversations], params, progress=progress
            )
        conversation = cast(Sequence[Message], messages if conversations is None else conversations)
        return self.generate([self.encode_chat(conversation, **options)], params, progress=progress)[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[TemplateOptions]
    ) -> Iterator[RequestOutput]:
        """Answer one conversation piece by piece, as `stream` completes a prompt. Its arguments are `chat`'s."""
        return self.stream(self.encode_chat(messages, **options), params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt piece by piece: each output has the text and tokens that are new, the last is finished.

        The prompt is validated at once. Closing the iterator ends the request and frees its blocks.
        """
        request = self.engine.make_request(prompt, SamplingParams() if params is None else params, stream=True)
        return cast(Iterator[RequestOutput], self.run([request]))

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> Generator[Output]:
        """Run requests that `engine.make_request` made; yields what is new of them as it comes.

        That is the whole output of a request when it has ended, and the deltas of one that is streamed. Several runs
        may be read in turn: each makes steps for all of them. Outputs of requests that are nobody's run are kept for
        `engine.step()`. Closing a run ends its requests and frees their blocks. on_step: called after each step.
        """
        arrived: deque[Output] = deque()
        unfinished: set[int] = set()
        try:
            for request in requests:
                unfinished.add(request_id := self.engine.submit(request))
                self._outputs[request_id] = arrived
            while arrived or unfinished:
                while not arrived:
                    for output in self.engine.step(self._outputs):
                        self._outputs[output.request_id].append(output)
                    if on_step is not None:
                        on_step()
                output = arrived.popleft()
                if output.finished:
                    unfinished.remove(output.request_id)
                    del self._outputs[output.request_id]
                yield output
        finally:
            for request_id in unfinished:
                self.engine.abort(request_id)
                self._outputs.pop(request_id, None)  # not there yet if its submission was interrupted

    def _complete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None,
        kind: type[Params],
        progress: bool,
    ) -> list[Output]:
        """Run requests of one kind to their ends."""
        all_prompts = _as_prompts(prompts)
        each = as_list(params)
        if each is None:
            each = [kind() if params is None else params] * len(all_prompts)
        if len(each) != len(all_prompts):
            counts = f"{len(all_prompts)} prompts but {len(each)} sampling parameters"
            raise ValueError(f"{counts}: give one for all or each")
        for one in each:
            if not isinstance(one, kind):
                got = f"{type(one).__name__}: give one for all prompts, or a list of one for each"
                raise TypeError(f"params must be {kind.__name__}, got {got}")
        requests = [self.engine.make_request(prompt, p) for prompt, p in zip(all_prompts, each, strict=True)]
        outputs = []
        with ProgressBar(requests, shown=progress) as bar, closing(self.run(requests, bar.show)) as arriving:
            bar.show()
            for output in arriving:
                outputs.append(output)
                bar.count(output)
                bar.show()
        return sorted(outputs, key=lambda output: output.request_id)  # ids are given in the prompts' order

    def get_default_sampling_params(self) -> SamplingParams:
        """Return SamplingParams as the model's generation_config.json has them, its other fields at their defaults.

        `dataclasses.replace` changes one. The command line starts from these; `generate` and `chat` take them only if
        they are given, so that a script's answers don't change with a file of the model.
        """
        return SamplingParams(**self.sampling_defaults)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer says how a conversation is written."""
        return self._chat_template.exists

    def encode_chat(self, messages: Sequence[Message], **options: Unpack[TemplateOptions]) -> list[int]:
        """Write a conversation as the model's chat template does. Returns its token ids, ready for the answer.

        options: `tools`, `documents` and `chat_template_kwargs`, which the template may use or ignore. Raises
        ValueError if there is no chat template, or if it does not take this conversation, TypeError for what is none.
        """
        return self._chat_template.encode(messages, **options)

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary: token ids are below it."""
        return self._runner.vocab_size

    def stats(self) -> EngineStats:
        """Count what the engine has done, and look at its block pool."""
        return replace(self.engine.stats(), blas=blas_name())

    @property
    def profile(self) -> Profile | None:
        """Where the time of steps went, if `profile=True` was given: its `table()`, and `write(path)` for a trace."""
        profile = self.engine.profile
        return profile if profile.enabled else None

    @property
    def attention_backends(self) -> list[str]:
        """The backends of `paged_attention` that were chosen for the layers: "metal", "cuda", "cpu", "reference"."""
        return sorted(self._runner.backends)

    def describe_memory(self) -> str:
        """Say in one line how the device's memory is divided."""
        return str(self._runner.plan)

    def describe_shared_prefixes(self) -> list[str]:
        """Say, in a line for each kind of layers, which shared prefixes are computed once for all, and why."""
        return self._runner.describe_sharing()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Return a list of prompts, where there may be a single one. Raises TypeError for what is neither."""
    values = [prompts] if isinstance(prompts, str) else as_list(prompts)
    if values is None:
        raise TypeError(f"prompts must be texts or lists of token ids, or a single one, got {excerpt(prompts)}")
    return [values] if values and as_int(values[0]) is not None else values
