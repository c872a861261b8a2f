"""The grammar of an answer that has to call a tool, in the form in which the model writes its calls.

A marker that is one token of its own stands in the grammar as that token, since a grammar's text never matches it.
Thinking comes before it, see `SamplingParams.max_thinking_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Tools = Sequence[dict[str, Any]]

_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as models write calls
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_JSON_TYPES = ("integer", "number", "boolean", "object", "array")
_VALUE_END = "\n</parameter>\n"
# Any text and the end of its value. A terminal never gives back what it has taken, so the end is part of it, and after
# the end it can't go on.
_TEXT = r"TEXT: /(.|\n)*\n<\/parameter>\n/ & ~/(.|\n)*<\/parameter>(.|\n)(.|\n)+/ & ~/(.|\n)*<\/tool_call>(.|\n)*/"
_DEFINITIONS = ("$defs", "definitions")


def calls_are_plain(tokenizer: Any) -> bool:
    """Whether a call that has to come is JSON without markers: for models of whose own form there is no grammar."""
    return _form(tokenizer) not in ("json_tools", "qwen3_coder")


def call_grammar(tokenizer: Any, tools: Tools, choice: str, *, parallel: bool = True, form: Any = None) -> str:
    """Write the grammar, in Lark's syntax, of an answer that calls tools and says nothing else.

    choice: "required" for any of the tools, or the name of one, which is called once. parallel: several may be called.
    form: a JSON schema that the answer may follow instead. Raises ValueError for a choice that is none of the tools.
    """
    chosen = [tool["function"] for tool in tools if choice in ("required", tool["function"]["name"])]
    if not chosen:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise ValueError(f"{choice!r} is none of the tools: {names}" if names else "there are no tools to call")
    rules: list[str] = []
    if calls_are_plain(tokenizer):
        calls = [_json_call(function, i, rules) for i, function in enumerate(chosen)]
        start = "call"
    else:
        write = _json_call if _form(tokenizer) == "json_tools" else _xml_call
        calls = [write(function, i, rules) for i, function in enumerate(chosen)]
        begin, end = (_marker(tokenizer, each) for each in (tokenizer.tool_call_start, tokenizer.tool_call_end))
        rules.append(f'marked: {begin} "\\n" call "\\n" {end}')
        start = 'marked ("\\n" marked)*' if parallel and choice == "required" else "marked"
    if form is not None:
        rules.append(f"form: {_json(form, strict=True, compact=True)}")
        start = f"({start}) | form"
    return "\n".join([f"start: {start}", f"call: {' | '.join(calls)}", *rules])


def _form(tokenizer: Any) -> str:
    """The name of mlx-lm's parser of the model's calls."""
    return "" if tokenizer.tool_parser is None else tokenizer.tool_parser.__module__.rpartition(".")[2]


def _marker(tokenizer: Any, marker: str) -> str:
    token_id = tokenizer.get_added_vocab().get(marker)
    return _quoted(marker) if token_id is None else f"<[{token_id}]>"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Any, *, strict: bool, compact: bool = False) -> str:
    """Write a rule for JSON. strict: a schema that can't be kept is refused; else it is kept as far as can be."""
    layout: dict[str, Any] = {"whitespace_flexible": False} if compact else dict(_SPACED)
    text = json.dumps(schema)
    if "\\u" not in text:
        layout["json_allowed_escapes"] = 'nrbtf\\"'
    options = {"x-guidance": layout | {"lenient": not strict}}
    return f"%json {json.dumps(options | schema if isinstance(schema, dict) else schema)}"


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    return {"type": "object"} | schema if isinstance(schema, dict) and schema else _NO_ARGUMENTS


def _json_call(function: dict[str, Any], index: int, rules: list[str]) -> str:
    """{"name": .., "arguments": {..}}"""
    arguments = _json(_parameters(function), strict=bool(function.get("strict")))
    rules.append(f"arguments_{index}: {arguments}")
    begin = f'{{"name": {_quoted(function["name"])}, "arguments": '
    return f'{_quoted(begin)} arguments_{index} "}}"'


def _xml_call(function: dict[str, Any], index: int, rules: list[str]) -> str:
    """<function=name>, a <parameter=name> for each argument with its value in lines of its own, </function>."""
    schema = _parameters(function)
    properties, required = schema.get("properties"), schema.get("required")
    written = [_quoted(f"<function={function['name']}>\n")]
    for i, (name, each) in enumerate(properties.items() if isinstance(properties, dict) else ()):
        value = _xml_value(each, schema, bool(function.get("strict")))
        if value is not None:
            rules.append(f"value_{index}_{i}: {value}")
        end = "TEXT" if value is None else f"value_{index}_{i} {_quoted(_VALUE_END)}"
        parameter = f"{_quoted(f'<parameter={name}>{chr(10)}')} {end}"
        is_required = isinstance(required, list) and name in required
        written.append(parameter if is_required else f"({parameter})?")
    if _TEXT not in rules:
        rules.append(_TEXT)
    return " ".join([*written, '"</function>"'])


def _xml_value(schema: Any, parameters: dict[str, Any], strict: bool) -> str | None:
    """What may stand for a value: JSON for what is no text; None for any text."""
    if not isinstance(schema, dict):
        return None
    if schema.get("type") in _JSON_TYPES:
        definitions = {name: parameters[name] for name in _DEFINITIONS if name in parameters}
        return _json(definitions | schema, strict=strict)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return " | ".join(map(_quoted, values))
    return None
