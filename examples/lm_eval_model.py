"""lm-evaluation-harness (pip install lm-eval) over this engine, by its own command line with `--model mlx-paged`."""

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that on Linux it finds OpenBLAS)
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


@register_model("mlx-paged")
class PagedLM(TemplateLM):
    eot_token_id = prefix_token_id = None

    def __init__(self, model=None, batch_size=None, device=None, **config):
        super().__init__()
        self.llm = LLM(model, **config)
        bos, self.eot_token_id = self.llm.tokenizer.bos_token_id, self.llm.tokenizer.eos_token_id
        self.prefix_token_id = self.eot_token_id if bos is None else bos
        self.most = (self.llm.engine.max_model_len or 2048) - 1  # tokens of a prompt, to which one is added

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.llm.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(self, requests, **_):
        prompts = [(context + continuation)[-self.most :] for _, context, continuation in requests]
        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
        scores = []
        for (_, _, wanted), output in zip(requests, outputs, strict=True):
            entries = list(zip(wanted, output.prompt_logprobs[-len(wanted) :], strict=True))
            is_greedy = all(logprobs[token] == max(logprobs.values()) for token, logprobs in entries)
            scores.append((sum(logprobs[token] for token, logprobs in entries), is_greedy))
        return scores

    def loglikelihood_rolling(self, requests, **_):
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.most - 1, 1)
            found = self._loglikelihood_tokens([(text, *make_disjoint_window(window)) for window in windows])
            sums.append(sum(logprob for logprob, _ in found))
        return sums

    def generate_until(self, requests, **_):
        prompts, wishes = zip(*(request.args for request in requests), strict=True)
        params = [SamplingParams(temperature=0, max_tokens=w.get("max_gen_toks", 256), stop=w["until"]) for w in wishes]
        return [output.outputs[0].text for output in self.llm.generate([*map(self.tok_encode, prompts)], params)]


if __name__ == "__main__":
    cli_evaluate()
