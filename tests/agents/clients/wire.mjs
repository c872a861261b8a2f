// What the drivers of JavaScript clients share: the server's address, what is asked of it, what it counts.

export const { BASE_URL, BUSY_URL, MODEL } = process.env;
export const ANSWER = "All done: the tool said so.";
export const THOUGHT = "I should run it.";
export const LONG = "x y z ".repeat(60_000);  // more than the context
export const CITY = 'Paris \u00e9\n"x"';
export const USER = [{ role: "user", content: "hi" }];

/** A conversation whose answer is a chain of the scripted model. */
export const script = (name) => [{ role: "system", content: `SCRIPT:${name}` }, ...USER];

/** JSON schema of arguments that are texts. */
export const texts = (...names) => ({
  type: "object",
  properties: Object.fromEntries(names.map((name) => [name, { type: "string" }])),
  required: names,
});

async function metric(url, name) {
  const lines = (await (await fetch(`${url}/metrics`)).text()).split("\n");
  return lines.filter((line) => line.startsWith(name)).reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

async function until(condition) {
  for (const end = Date.now() + 60_000; !(await condition()); await new Promise((done) => setTimeout(done, 50)))
    if (Date.now() > end) throw new Error(`it did not come true: ${condition}`);
}

/** Wait until nothing runs and all blocks are free. */
export const freed = () =>
  until(async () => (await metric(BASE_URL, "vllm:num_requests_running")) + (await metric(BASE_URL, "vllm:kv_cache_usage_perc")) === 0);

/** Run `ask` against a server that refuses it at first, as it is busy, and takes it later. */
export async function retried(ask) {
  const before = await metric(BUSY_URL, "mlx_paged:rejected_total");
  const holding = new AbortController();
  const body = JSON.stringify({ messages: script("endless"), stream: true });
  const headers = { "content-type": "application/json" };
  const held = await fetch(`${BUSY_URL}/v1/chat/completions`, { method: "POST", headers, body, signal: holding.signal });
  await held.body.getReader().read();
  const answer = ask();
  await until(async () => (await metric(BUSY_URL, "mlx_paged:rejected_total")) > before);
  holding.abort();
  return answer;
}
