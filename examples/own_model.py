"""An mlx-lm model of your own: loaded and changed by your code, run by the engine, and still at work in mlx-lm."""

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that on Linux it finds OpenBLAS)
import mlx.nn as nn
from mlx_lm import generate, load

from mlx_paged.models.hub import DEMO_FOLDER

model, tokenizer = load(str(DEMO_FOLDER))
nn.quantize(model, group_size=64, bits=8)

llm = LLM.from_model(model, tokenizer, num_kv_blocks=64)
prompt = "Once upon a time, there was a girl named Rosa."
completion = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
print("paged: ", completion.text)
print("mlx-lm:", generate(model, tokenizer, prompt, max_tokens=40))
