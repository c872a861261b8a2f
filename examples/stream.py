"""Shows text as it comes, and stops when it has seen enough: leaving the loop gives the blocks back."""

from contextlib import closing

from mlx_paged import LLM, SamplingParams

llm = LLM()
text = "Once upon a time"
print(text, end="")
with closing(llm.stream(text, SamplingParams(temperature=0, max_tokens=200))) as stream:
    for output in stream:
        print(output.outputs[0].text, end="", flush=True)
        text += output.outputs[0].text
        if text.count(".") == 3:
            break

stats = llm.stats()
print(f"\n\nstopped after {stats.num_steps} steps; {stats.num_free_blocks} of {stats.num_blocks} blocks are free")
