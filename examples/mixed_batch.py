"""One batch, parameters of its own for each prompt: greedy, drawn, penalised, stopped, several samples."""

from mlx_paged import LLM, SamplingParams

llm = LLM()
requests = {
    "Once upon a time": SamplingParams(temperature=0, max_tokens=20),
    "One morning, Mia": SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=20),
    "In a small town": SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=20),
    "Long ago": SamplingParams(temperature=0, stop=[".", "!"], max_tokens=60),
    "There was once a boy named": SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=12, logprobs=0),
}
# A random stream belongs to its request: what else is in the batch changes nothing.
for output in llm.generate(list(requests), list(requests.values())):
    print(f"\n{output.prompt} ...")
    for sample in output.outputs:
        likely = "" if sample.logprobs is None else f"  [log-probability {sample.cumulative_logprob:.1f}]"
        print(f"  {sample.text.strip()}{likely}")
