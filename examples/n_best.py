"""Draws many samples, which share the prompt's blocks, and ranks those that a verifier accepts."""

from mlx_paged import LLM, SamplingParams

story = "The kite was red. The key was under the bench. The dog was called Biscuit. The basket cost nine coins."


def is_supported(answer: str) -> bool:
    """The verifier: the story says just that."""
    return answer.strip() in story


llm = LLM()
question = [{"role": "user", "content": f"{story}\nWhere was the key?"}]
# Hot enough for mistakes; the seed makes the 16 samples the same ones every time.
output = llm.chat(question, SamplingParams(n=16, temperature=2.0, seed=3, max_tokens=20))

# The model's own log-probability decides among what the verifier lets through.
ranked = sorted(output.outputs, key=lambda one: (is_supported(one.text), one.cumulative_logprob), reverse=True)
for sample in ranked:
    print(f"{'yes' if is_supported(sample.text) else 'no':4}{sample.cumulative_logprob:7.2f}  {sample.text}")
print(f"\nthe best: {ranked[0].text}")
print(f"{llm.stats().num_cow_copies} blocks were copied, each the last one of the prompt; the others are shared")
