"""Four beams: the blocks that they hold while they search, then the hypotheses, best first."""

from mlx_paged import LLM, BeamSearchParams
from mlx_paged.tools.block_picture import draw_blocks

llm = LLM(num_kv_blocks=32, block_size=8)
llm.engine.add_request("Once upon a time, there was a girl named Rosa.", BeamSearchParams(beam_width=4, max_tokens=40))

results = []
while llm.engine.has_unfinished():
    results += llm.engine.step()
    if llm.stats().num_steps == 30:  # what beams have in common is the same blocks in their tables
        beams = enumerate(llm.engine.block_manager.seq_ids, start=1)
        draw_blocks(llm.engine.block_manager, {seq_id: f"beam {number}" for number, seq_id in beams})

(result,) = results
for hypothesis in result.sequences:
    print(f"{hypothesis.score:7.3f}  {hypothesis.text}")
print(f"\nat most {result.num_blocks} blocks; {result.num_unshared_blocks} without sharing")
