"""Completes several prompts at once; equal beginnings are computed and stored once."""

from mlx_paged import LLM, SamplingParams

llm = LLM()  # the bundled demo model; LLM("qwen2") downloads a real one
print(llm.describe_memory())

prompts = ["Once upon a time", "Long ago", "In a small town"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40)):
    completion = output.outputs[0]
    print(f"\n{output.prompt}{completion.text}\n  [{len(completion.token_ids)} tokens, {completion.finish_reason}]")
