"""Output of a given form, by a JSON schema and by a regular expression. Needs pip install '.[structured]'."""

import json

from mlx_paged import LLM, SamplingParams

schema = {
    "type": "object",
    "properties": {"answer": {"type": "string", "pattern": "^The dog was called [A-Z][a-z]+\\.$"}},
    "required": ["answer"],
    "additionalProperties": False,
}
llm = LLM()
question = [{"role": "user", "content": "The kite was red. The dog was called Biscuit.\nWhat was the dog called?"}]

# The demo model has never seen JSON: the form is the schema's, what fills it is the model's.
answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=60, json_schema=schema)).outputs[0]
print("schema:", json.loads(answer.text))

form = r"(A|The) (cat|dog) was called [A-Z][a-z]+\."
answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=60, regex=form)).outputs[0]
print("regex: ", answer.text)
