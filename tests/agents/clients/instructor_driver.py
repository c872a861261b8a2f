"""Instructor: answers in the form of a class, by tools and by JSON."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict
from wire import BASE_URL, MODEL, script


class Answer(BaseModel):
    """A yes or no."""

    model_config = ConfigDict(extra="forbid")  # or a model that follows nothing but the form may never end
    is_so: bool


client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="any", max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    asker = instructor.from_openai(client, mode=mode)
    answer = asker.chat.completions.create(
        model=MODEL, messages=script("is_so"), response_model=Answer, max_retries=0, max_tokens=200
    )
    assert isinstance(answer, Answer), (mode, answer)
