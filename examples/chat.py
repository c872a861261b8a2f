"""A conversation: each turn contains all turns before it, and their blocks are still there."""

from mlx_paged import LLM, SamplingParams

llm = LLM()
greedy = SamplingParams(temperature=0, max_tokens=40)
story = "The kite was red. The key was under the bench. The dog was called Biscuit. The basket cost nine coins."
questions = [f"{story}\nWhat was the dog called?", "Where was the key?", "What colour was the kite?"]

messages = []
for question in questions:
    messages.append({"role": "user", "content": question})
    answer = llm.chat(messages, greedy)
    messages.append({"role": "assistant", "content": answer.outputs[0].text})
    print(f"> {question}\n{answer.outputs[0].text}")
    print(f"  [{answer.num_cached_tokens} of {len(answer.prompt_token_ids)} tokens of the prompt were there already]\n")
