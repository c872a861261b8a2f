// Anthropic's client.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { ANSWER, BASE_URL, BUSY_URL, CITY, LONG, MODEL, THOUGHT, USER, freed, retried, texts } from "./wire.mjs";

const client = new Anthropic({ baseURL: BASE_URL, apiKey: "any", maxRetries: 0 });
const request = { model: MODEL, max_tokens: 500, messages: USER };
const tool = (name, ...names) => ({ name, description: "x", input_schema: texts(...names) });
const said = (message) => message.content.map(({ type, text, thinking, name, input }) => ({ type, text, thinking, name, input }));

// text, usage
const whole = await client.messages.create(request);
assert.equal(whole.content[0].text, ANSWER);
const streamed = await client.messages.stream(request).finalMessage();
assert.deepEqual(said(streamed), said(whole));
assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);
assert.ok(whole.usage.input_tokens + whole.usage.cache_read_input_tokens > 0);

// tools: a loop to its end
const tools = [tool("get_weather", "city")];
const first = await client.messages.stream({ ...request, tools }).finalMessage();
assert.equal(first.stop_reason, "tool_use");
assert.deepEqual(first.content[0].input, { city: CITY });
const result = { type: "tool_result", tool_use_id: first.content[0].id, content: [{ type: "text", text: "sun" }] };
const turn = [...USER, { role: "assistant", content: first.content }, { role: "user", content: [result] }];
const second = await client.messages.create({ ...request, tools, messages: turn });
assert.equal(second.content[0].text, ANSWER);
assert.ok(second.usage.cache_read_input_tokens > 0);
const counted = await client.messages.countTokens({ model: MODEL, messages: turn, tools });
assert.equal(counted.input_tokens, second.usage.input_tokens + second.usage.cache_read_input_tokens);

// thinking
const exec = { ...request, tools: [tool("exec_command", "cmd")], thinking: { type: "enabled", budget_tokens: 1024 }, max_tokens: 2048 };
const thinking = await client.messages.stream(exec).finalMessage();
assert.deepEqual(said(thinking), said(await client.messages.create(exec)));
assert.equal(thinking.content[0].thinking, THOUGHT);

// abort
const endless = client.messages.stream({ ...request, system: "SCRIPT:endless", max_tokens: 100_000 });
let count = 0;
await assert.rejects(async () => {
  for await (const _ of endless) if (++count === 8) endless.abort();
}, Anthropic.APIUserAbortError);
await freed();

// errors
await assert.rejects(client.messages.create({ ...request, model: "other" }), (e) => e instanceof Anthropic.NotFoundError);
await assert.rejects(
  client.messages.stream({ ...request, messages: [{ role: "user", content: LONG }] }).finalMessage(),
  (e) => e instanceof Anthropic.BadRequestError && /prompt is too long: \d+ tokens > \d+ maximum/.test(e.message),
);
const busy = new Anthropic({ baseURL: BUSY_URL, apiKey: "any", maxRetries: 5 });
assert.equal((await retried(() => busy.messages.create(request))).content[0].text, ANSWER);
for await (const model of client.models.list()) assert.equal(model.display_name, MODEL);
