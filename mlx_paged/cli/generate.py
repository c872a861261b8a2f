"""`mlx-paged generate` and `mlx-paged beam-search`: many prompts at once, and what each of them becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from mlx_paged.cli.answers import Answers, JsonAnswers, Question, TextAnswers
from mlx_paged.cli.loading import Params, Prompt, Requests, complete_params
from mlx_paged.cli.options import DEFAULT_MAX_TOKENS, PromptArguments
from mlx_paged.cli.terminal import INTERRUPTED, RunSummary, Terminal
from mlx_paged.outputs import RequestOutput
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM
    from mlx_paged.request import Request


def answer_prompts(
    prompts: PromptArguments,
    load: Callable[[Requests], LLM],
    params: Params,
    terminal: Terminal,
    given: Collection[str] = (),
) -> int:
    """Answer every prompt that can be answered. Returns the exit code: 1 if one could not, 3 if one is not whole.

    load: called if there is a prompt to answer. given: the names of the parameters that are not the model's to decide.
    A single text is shown as it comes. Raises click.UsageError as `prompts.read` does.
    """
    texts = prompts.read()
    questions = [
        Question(number, text, error=_invalid_prompt(text, prompts.raw)) for number, text in enumerate(texts, start=1)
    ]
    stream = isinstance(params, SamplingParams) and params.n == len(texts) == 1 and not prompts.as_json
    answers = JsonAnswers(questions, terminal) if prompts.as_json else TextAnswers(questions, terminal, streamed=stream)
    return answer(questions, prompts, load, params, answers, terminal, given, stream=stream)


def answer(
    questions: Iterable[Question],
    prompts: PromptArguments,
    load: Callable[[Requests], LLM],
    params: Params,
    answers: Answers,
    terminal: Terminal,
    given: Collection[str],
    *,
    stream: bool = False,
) -> int:
    """Answer questions, those that can be, in one batch. Returns the exit code.

    prompts: how they are put. params: what holds for those that say nothing else; given: as in `answer_prompts`.
    stream: there is one, shown as it comes.
    """
    open_questions = []
    for question in questions:
        if question.error is not None:
            answers.fail(question, question.error)
        else:
            open_questions.append(question)
    encoded: list[tuple[Question, Prompt, Params]] = []

    def encode(llm: LLM) -> list[tuple[Prompt, Params]]:
        """Write the questions as the model takes them, before its weights are loaded."""
        completed = complete_params(params, given, llm, terminal)
        if isinstance(completed, SamplingParams) and completed.n > 1 and completed.is_greedy:
            terminal.warn(f"the {completed.n} samples will be equal: --temperature 0.8 makes them differ")
        for question in open_questions:
            own = dataclasses.replace(completed, **question.settings)
            try:
                encoded.append((dataclasses.replace(question, params=own), _encode(llm, question, prompts), own))
            except ValueError as error:
                answers.fail(question, str(error))
        if not encoded:
            raise _NothingLeft
        return [
            (prompt, dataclasses.replace(own, max_tokens=own.max_tokens or DEFAULT_MAX_TOKENS))
            for _, prompt, own in encoded
        ]

    try:
        if open_questions:
            llm = load(encode)
            requests: list[tuple[Question, Request]] = []
            for question, prompt, own in encoded:
                try:
                    requests.append((question, make_request(llm, prompt, own, stream=stream)))
                except ValueError as error:
                    answers.fail(question, str(error))
            _run(llm, requests, answers, terminal, stream=stream)
    except _NothingLeft:
        pass
    except KeyboardInterrupt:
        answers.end()
        return INTERRUPTED
    answers.end()
    return answers.exit_code


def make_request(llm: LLM, prompt: str | list[int], params: Params, *, stream: bool = False) -> Request:
    """Make a request; without max_tokens it gets DEFAULT_MAX_TOKENS, or what fits if that is less."""
    if params.max_tokens is None:
        try:
            limited = dataclasses.replace(params, max_tokens=DEFAULT_MAX_TOKENS)
            return llm.engine.make_request(prompt, limited, stream=stream)
        except ValueError:
            pass
    return llm.engine.make_request(prompt, params, stream=stream)


class _NothingLeft(Exception):
    """There is no prompt that the model could answer."""


def _run(
    llm: LLM, requests: list[tuple[Question, Request]], answers: Answers, terminal: Terminal, *, stream: bool
) -> None:
    """Run requests, show their outputs and what they took."""
    summary = RunSummary()
    asked: dict[int, Question] = {}  # by request id
    text, token_ids = "", list[int]()  # of a stream, so far
    made = [request for _, request in requests]
    with terminal.progress_bar([] if stream else made) as bar, closing(llm.run(made, bar.show)) as outputs:
        bar.show()
        for output in outputs:
            asked = asked or {request.request_id: question for question, request in requests}
            summary.count(output)
            if stream and isinstance(output, RequestOutput):
                (sample,) = output.outputs
                terminal.answer(sample.text)
                text, token_ids = text + sample.text, token_ids + sample.token_ids
                output = dataclasses.replace(
                    output, outputs=[dataclasses.replace(sample, text=text, token_ids=token_ids)]
                )
            if output.finished:
                bar.count(output)
                answers.finish(asked[output.request_id], output)
                bar.show()
    terminal.end_answer()
    if requests and terminal.shows_notes:
        terminal.note(*summary.lines(llm))


def _invalid_prompt(prompt: str, raw: bool) -> str | None:
    """Say what is wrong with a prompt before any model has seen it. Returns None if nothing is."""
    if not (prompt if raw else prompt.strip()):
        return "the prompt is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not UTF-8 text"
    return None


def _encode(llm: LLM, question: Question, prompts: PromptArguments) -> Prompt:
    """Put a question as a model takes it: as a conversation in its chat template, or as it is."""
    if isinstance(question.prompt, str) and (prompts.raw or not llm.has_chat_template):
        for given, option in ((prompts.system, "--system"), (prompts.chat_template_kwargs, "--chat-template-kwargs")):
            if given is not None:
                raise ValueError(f"{option} needs a chat template, and this model has none")
        return question.prompt
    messages = question.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
        if prompts.system is not None:
            messages = [{"role": "system", "content": prompts.system}, *messages]
    if prompts.chat_template_kwargs is None:
        return llm.encode_chat(messages)
    return llm.encode_chat(messages, chat_template_kwargs=prompts.chat_template_kwargs)
