"""Calls that have to come, by a grammar in the model's own form; thinking and its budget; forms behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.grammars import walk
from helpers.scripted_model import make_scripted_model
from helpers.servers import post, serving
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlx_paged import SamplingParams
from mlx_paged.async_llm import AsyncLLM
from mlx_paged.sampling.grammar import GrammarCompiler
from mlx_paged.server.answer_form import with_form
from mlx_paged.server.answer_parts import AnswerParts, join_parts
from mlx_paged.server.tool_grammar import call_grammar, calls_are_plain

CITIES = ["Paris", "Rom\u00e9"]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": CITIES},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "at": {"type": "array", "items": {"$ref": "#/$defs/hour"}, "maxItems": 2},
    },
    "$defs": {"hour": {"enum": [6, 18]}},
    "required": ["city", "at"],
    "additionalProperties": False,
}
USER: list[Any] = [{"role": "user", "content": "hi"}]


def tool(name: str, parameters: Any = None) -> Any:
    function = {"name": name} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER), tool("stop_it")]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(make_scripted_model(tmp_path_factory.mktemp("scripted")))


def with_parser(tokenizer: Any, parser: Any, *, in_pieces: bool = False) -> Any:
    """The tokenizer of a model that writes calls otherwise. in_pieces: its markers are no tokens."""
    markers = {}
    if parser is not None:
        names = ("[CALL]", "[/CALL]") if in_pieces else (parser.tool_call_start, parser.tool_call_end)
        markers = {"tool_call_start": names[0], "tool_call_end": names[1], "tool_parser": parser.parse_tool_call}
    return TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=tokenizer.eos_token_ids, **markers)


def answers(tokenizer: Any, grammar: str, num: int = 12) -> list[str]:
    """Random answers of a grammar."""
    compiler = GrammarCompiler(tokenizer, 640, tokenizer.eos_token_ids)
    matcher = compiler.matcher(SamplingParams(grammar=grammar))
    return [tokenizer.decode(walk(matcher.copy(), seed, tokenizer.eos_token_ids)) for seed in range(num)]


def is_weather(arguments: dict[str, Any]) -> bool:
    at = arguments.pop("at")
    days = arguments.pop("days", 1)
    return arguments.pop("city") in CITIES and set(at) <= {6, 18} and 1 <= days <= 9 and not arguments


@pytest.mark.parametrize("parser", [json_tools, qwen3_coder, mistral, None])
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("choice, parallel", [("required", True), ("required", False), ("get_weather", True)])
def test_what_a_grammar_allows_is_read_as_calls_of_the_tools(
    parser: Any, in_pieces: bool, choice: str, parallel: bool, scripted: Any
) -> None:
    tokenizer = with_parser(scripted, parser, in_pieces=in_pieces)
    numbers, names = set(), set()
    for answer in answers(tokenizer, call_grammar(tokenizer, TOOLS, choice, parallel=parallel)):
        parts = AnswerParts(tokenizer, TOOLS, is_plain_call=calls_are_plain(tokenizer))
        found = join_parts([part for letter in answer for part in parts.feed(letter)] + parts.finish(cut=False))
        assert {part.kind for part in found} == {"call"}, answer
        assert parts.num_calls == len(found)
        for part in found:
            arguments = json.loads(part.text)
            assert is_weather(arguments) if part.name == "get_weather" else arguments == {}
        numbers.add(len(found))
        names |= {part.name for part in found}
    several = parallel and choice == "required" and parser in (json_tools, qwen3_coder)
    assert max(numbers) > 1 if several else numbers == {1}
    assert names == ({"get_weather", "stop_it"} if choice == "required" else {"get_weather"})


def test_text_of_an_argument_is_written_as_it_is_and_ends_at_its_marker(scripted: Any) -> None:
    tokenizer = with_parser(scripted, qwen3_coder)
    grammar = call_grammar(tokenizer, [tool("f", {"properties": {"a": {"type": "string"}}, "required": ["a"]})], "f")
    compiler = GrammarCompiler(tokenizer, 640, tokenizer.eos_token_ids)
    text = 'x = "<a>"\n</parameter\n'

    def matcher_after(value: str) -> Any:
        matcher = compiler.matcher(SamplingParams(grammar=grammar))
        written = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"
        for token_id in tokenizer.encode(written, add_special_tokens=False):
            matcher.advance(token_id)
        return matcher

    assert matcher_after(text).is_finished
    with pytest.raises(ValueError, match="does not allow"):
        matcher_after("a</parameter>b")


def test_a_schema_is_kept_as_far_as_can_be_unless_it_is_strict(scripted: Any) -> None:
    odd = tool("odd", {"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"const": 1}})
    written = '<tool_call>\n{"name": "odd", "arguments": [1]}\n</tool_call>'
    assert written in answers(scripted, call_grammar(scripted, [odd], "odd"))
    odd["function"]["strict"] = True
    with pytest.raises(ValueError, match="uniqueItems"):
        answers(scripted, call_grammar(scripted, [odd], "odd"))


def test_an_answer_may_be_json_or_call_where_both_are_asked_for(scripted: Any) -> None:
    params = SamplingParams(json_schema={"const": {"a": 7}})
    options: dict[str, Any] = {"parallel": False, "max_thinking_tokens": None, "max_model_len": 99}
    both = with_form(params, scripted, [tool("stop_it")], None, **options)
    assert both.max_thinking_tokens == 99 and both.json_schema is None and both.grammar is not None
    call = '<tool_call>\n{"name": "stop_it", "arguments": {}}\n</tool_call>'
    assert set(answers(scripted, both.grammar)) == {'{"a":7}', call}
    plain = with_form(params, with_parser(scripted, None), [tool("stop_it")], None, **options)
    assert plain.json_schema == params.json_schema


def test_the_smaller_budget_of_thinking_counts_and_a_model_without_thinking_has_none(scripted: Any) -> None:
    def budget(asked: int | None, most: int | None, tokenizer: Any = scripted) -> int | None:
        params = SamplingParams(max_thinking_tokens=asked)
        options: dict[str, Any] = {"parallel": True, "max_thinking_tokens": most, "max_model_len": 99}
        return with_form(params, tokenizer, [], None, **options).max_thinking_tokens

    assert [budget(*each) for each in ((None, None), (5, None), (None, 6), (5, 6), (6, 0))] == [None, 5, 6, 5, 0]
    silent = with_parser(scripted, None)
    silent._think_start = None
    assert budget(5, 6, silent) is None


def answer_of(client: openai.OpenAI, **request: Any) -> Any:
    """The choice of a whole answer, which the stream has to join to."""
    request = {"model": "scripted", "messages": USER, "temperature": 0} | request
    whole = client.chat.completions.create(**request).choices[0]
    text, thinking, calls, reason = "", "", list[list[str]](), None
    for chunk in client.chat.completions.create(stream=True, **request):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
        text += delta.content or ""
        thinking += getattr(delta, "reasoning_content", "")
        for call in delta.tool_calls or []:
            if call.id:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
    assert (text, thinking) == (whole.message.content or "", getattr(whole.message, "reasoning_content", ""))
    assert calls == [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or []]
    assert reason == whole.finish_reason
    return whole


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def test_a_tool_is_called_because_the_client_says_so(client: openai.OpenAI) -> None:
    for choice in ("required", named("get_weather")):
        # The model alone would say "All done".
        messages = [{"role": "system", "content": "SCRIPT:answer"}, *USER]
        answer = answer_of(client, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert call.function.name == "get_weather" if choice != "required" else True
        arguments = json.loads(call.function.arguments)
        assert is_weather(arguments) if call.function.name == "get_weather" else arguments == {}


def test_only_allowed_tools_are_offered_and_one_of_them_is_called_if_it_has_to_be(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "SCRIPT:two_calls"}, *USER]

    def answer(mode: str, *names: str) -> Any:
        choice = allowed(*names, mode=mode)
        return answer_of(client, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)

    (call,) = answer("required", "stop_it").message.tool_calls
    assert call.function.name == "stop_it"
    (call,) = answer("auto", "get_weather").message.tool_calls
    assert call.function.name == "get_weather"
    assert answer("auto").message.tool_calls is None


def test_thinking_comes_before_the_call_that_has_to_come_and_before_a_form(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "SCRIPT:exec_command"}, *USER]
    answer = answer_of(client, messages=messages, tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=False)
    assert answer.message.reasoning_content == "I should run it."
    assert [call.function.name for call in answer.message.tool_calls] == ["stop_it"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": [1]}}}
    answer = answer_of(client, messages=messages, response_format=form)
    assert (answer.message.reasoning_content, answer.message.content) == ("I should run it.", "[1]")
    answer = answer_of(client, messages=messages[1:], response_format=form)
    assert answer.message.content == "[1]" and not hasattr(answer.message, "reasoning_content")


def test_thinking_is_closed_when_its_budget_is_used_up(llm: AsyncLLM, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "SCRIPT:exec_command"}, *USER]
    answer = answer_of(client, messages=messages, extra_body={"max_thinking_tokens": 1})
    assert answer.message.reasoning_content == "I should "
    with serving(llm, max_thinking_tokens=0) as url:
        body = {"messages": messages, "max_thinking_tokens": 50, "temperature": 0}
        message = post(f"{url}/v1/chat/completions", body).json()["choices"][0]["message"]
        assert "reasoning_content" not in message and message["content"].strip().startswith("<tool_call>")


@pytest.fixture(scope="module")
def plain_url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of a model whose template knows no tools."""
    folder: Path = make_scripted_model(tmp_path_factory.mktemp("plain"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    llm = AsyncLLM(folder, num_kv_blocks=200)
    with serving(llm) as url:
        yield url
    llm.close()


def test_a_model_that_knows_no_tools_is_told_of_them_and_has_to_call(plain_url: str) -> None:
    with openai.OpenAI(base_url=f"{plain_url}/v1", api_key="any", max_retries=0) as client:
        answer = answer_of(client, tools=TOOLS, tool_choice=named("get_weather"))
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and is_weather(json.loads(call.function.arguments))
        request: dict[str, Any] = {"model": "scripted", "messages": USER, "tools": TOOLS, "max_tokens": 1}
        free, told = (
            client.chat.completions.create(**request, tool_choice=choice).usage.prompt_tokens
            for choice in ("auto", "required")
        )
        assert told > free + 100


@pytest.mark.parametrize(
    "body, param",
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("nothing")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": allowed("nothing")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("stop_it", mode="must")}, "tool_choice.allowed_tools.mode"),
        ({"tools": TOOLS, "tool_choice": allowed(mode="required")}, "tool_choice"),
        ({"tools": [tool("f", {"type": "nothing"})], "tool_choice": "required"}, "tools"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
    ],
)
def test_what_can_not_be_called_is_refused_by_name(body: Any, param: str, url: str) -> None:
    response = post(f"{url}/v1/chat/completions", {"messages": USER} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
