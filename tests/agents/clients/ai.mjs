// The AI SDK, over chat and over messages.

import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { ANSWER, BASE_URL, BUSY_URL, CITY, LONG, MODEL, THOUGHT, freed, retried, texts } from "./wire.mjs";

const providers = {
  chat: (url) => createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, apiKey: "any", includeUsage: true })(MODEL),
  messages: (url) => createAnthropic({ baseURL: `${url}/v1`, apiKey: "any" })(MODEL),
};
const prompt = "hi";
for (const [wire, make] of Object.entries(providers)) {
  const model = make(BASE_URL);
  const say = (what) => `${wire}: ${what}`;

  // text, usage
  const whole = await generateText({ model, prompt });
  const streamed = streamText({ model, prompt });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  assert.equal(whole.text, ANSWER, say("text"));
  assert.equal(text, ANSWER, say("stream"));
  assert.ok((await streamed.usage).outputTokens > 0, say("usage"));
  assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens, say("usage"));

  // tools: a loop to its end, with thinking before the call
  const ran = [];
  const describe = (name, ...names) => ({
    [name]: tool({ description: "x", inputSchema: jsonSchema(texts(...names)), execute: async (input) => { ran.push(input); return "ran"; } }),
  });
  const stopWhen = stepCountIs(4);
  const loop = streamText({ model, prompt, tools: describe("exec_command", "cmd"), stopWhen });
  await loop.consumeStream();
  const steps = await loop.steps;
  assert.deepEqual(ran, [{ cmd: "echo marker-7 | tee marker.txt" }], say("the tool"));
  assert.equal(steps.length, 2, say("steps"));
  assert.equal(steps[0].reasoningText, THOUGHT, say("thinking"));
  assert.equal(await loop.text, ANSWER, say("the end"));
  assert.ok(steps[1].usage.cachedInputTokens > 0, say("the cache"));
  const other = await generateText({ model, prompt, tools: describe("get_weather", "city"), stopWhen });
  assert.deepEqual([ran[1], other.text], [{ city: CITY }, ANSWER], say("the whole loop"));

  // abort
  const aborting = new AbortController();
  const endless = streamText({ model, system: "SCRIPT:endless", prompt, abortSignal: aborting.signal });
  let count = 0;
  for await (const _ of endless.textStream) if (++count === 5) aborting.abort();
  await freed();

  // errors
  const is = (status) => (e) => APICallError.isInstance(e) && e.statusCode === status;
  await assert.rejects(generateText({ model, prompt: LONG, maxRetries: 0 }), is(400), say("too long"));
  const answer = await retried(() => generateText({ model: make(BUSY_URL), prompt, maxRetries: 5 }));
  assert.equal(answer.text, ANSWER, say("retried"));
}
