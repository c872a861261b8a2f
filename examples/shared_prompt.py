"""Many questions about one text: its blocks are computed once and held once, however many requests use them."""

from mlx_paged import LLM, SamplingParams
from mlx_paged.tools.block_picture import draw_blocks

story = "The kite was red. The key was under the bench. The dog was called Biscuit. The basket cost nine coins."
questions = ["What colour was the kite?", "Where was the key?", "What was the dog called?"]

llm = LLM(block_size=8, num_kv_blocks=32)
asked = {}
for question in questions:
    prompt = llm.encode_chat([{"role": "user", "content": f"{story}\n{question}"}])
    asked[llm.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=20))] = question

llm.engine.step()  # all prompts start in this step; the pool while they run:
draw_blocks(llm.engine.block_manager)

while llm.engine.has_unfinished():
    for output in llm.engine.step():
        print(f"{asked[output.request_id]} {output.outputs[0].text}")

stats = llm.stats()
print(f"\n{stats.prefix_hit_tokens} of {stats.prefix_query_tokens} prompt tokens were shared instead of computed")
