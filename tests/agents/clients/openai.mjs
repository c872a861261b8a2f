// OpenAI's client: chat and responses.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { ANSWER, BASE_URL, BUSY_URL, CITY, LONG, MODEL, THOUGHT, USER, freed, retried, script, texts } from "./wire.mjs";

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "any", maxRetries: 0 });
const chat = client.chat.completions;
const func = (name, ...names) => ({ type: "function", function: { name, parameters: texts(...names) } });

// text, usage
const whole = await chat.create({ model: MODEL, messages: USER });
const streamed = chat.stream({ model: MODEL, messages: USER, stream_options: { include_usage: true } });
assert.equal(whole.choices[0].message.content, ANSWER);
assert.equal(await streamed.finalContent(), ANSWER);
assert.ok(whole.usage.prompt_tokens > 0 && whole.usage.completion_tokens > 0);
assert.equal((await streamed.totalUsage()).completion_tokens, whole.usage.completion_tokens);

// tools: a loop to its end
const asked = [];
const weather = func("get_weather", "city");
weather.function.parse = JSON.parse;
weather.function.function = ({ city }) => { asked.push(city); return `sun in ${city}, `.repeat(50); };
for (const stream of [true, false]) {
  const runner = chat.runTools({ model: MODEL, messages: USER, tools: [weather], stream });
  assert.equal(await runner.finalContent(), ANSWER);
}
assert.deepEqual(asked, [CITY, CITY]);
const call = await chat.create({ model: MODEL, messages: USER, tools: [func("get_weather", "city")] });
assert.equal(call.choices[0].finish_reason, "tool_calls");
const turn = [...USER, call.choices[0].message, { role: "tool", tool_call_id: call.choices[0].message.tool_calls[0].id, content: "sun" }];
const second = await chat.create({ model: MODEL, messages: turn, tools: [func("get_weather", "city")] });
assert.ok(second.usage.prompt_tokens_details.cached_tokens >= call.usage.prompt_tokens - 32);

// thinking
let thought = "";
for await (const chunk of await chat.create({ model: MODEL, messages: USER, tools: [func("exec_command", "cmd")], stream: true }))
  thought += chunk.choices[0]?.delta.reasoning_content ?? "";
assert.equal(thought, THOUGHT);

// responses
const tools = [{ type: "function", name: "exec_command", parameters: texts("cmd"), strict: false }];
const first = await client.responses.create({ model: MODEL, input: "hi", tools });
const stream = client.responses.stream({ model: MODEL, input: "hi", tools });
const kinds = (response) => response.output.map((item) => [item.type, item.arguments ?? item.content[0].text]);
assert.deepEqual(kinds(await stream.finalResponse()), kinds(first));
assert.deepEqual(first.output.map((item) => item.type), ["reasoning", "function_call"]);
const output = { type: "function_call_output", call_id: first.output[1].call_id, output: "ran" };
const last = await client.responses.create({ model: MODEL, input: [...USER, ...first.output, output], tools });
assert.equal(last.output_text, ANSWER);
assert.ok(last.usage.input_tokens_details.cached_tokens > 0);

// abort
let count = 0;
const endless = await chat.create({ model: MODEL, messages: script("endless"), stream: true });
for await (const _ of endless) if (++count === 5) break;
await freed();

// errors
await assert.rejects(chat.create({ model: "other", messages: USER }), (e) => e instanceof OpenAI.NotFoundError && e.code === "model_not_found");
await assert.rejects(
  chat.create({ model: MODEL, messages: [{ role: "user", content: LONG }], stream: true }),
  (e) => e instanceof OpenAI.BadRequestError && e.code === "context_length_exceeded",
);
const busy = new OpenAI({ baseURL: `${BUSY_URL}/v1`, apiKey: "any", maxRetries: 5 });
assert.equal((await retried(() => busy.chat.completions.create({ model: MODEL, messages: USER }))).choices[0].message.content, ANSWER);
for await (const model of client.models.list()) assert.equal(model.id, MODEL);
