"""Which of mlx-lm's model families run on a paged cache: which are tested, which can't and why. Knows no mlx.

A family is named as mlx-lm names its module, and found by the `model_type` of a model's config.json. A family that is
not listed may still run: `patch.patch_model` looks at what it does when it is loaded.
`python docs/models_table.py` prints the table of docs/models.md.
"""

from typing import NamedTuple

from mlx_paged.errors import ModelError


class Family(NamedTuple):
    """One of mlx-lm's model families."""

    name: str
    """That of mlx-lm's module."""
    status: str
    """How it runs: "verified" (results compared with unpaged ones over block sizes, chunks, batches and preemption),
    "tested" (compared once) or "refused"."""
    note: str = ""
    """Why it is refused; otherwise what is excepted."""


VERIFIED = ("llama", "qwen2", "qwen3")

TESTED = (
    *("Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe", "bailing_moe_linear"),
    *("bailing_moe_v3", "bitnet", "cohere", "cohere2", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "dots1"),
    *("ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon_h1", "gear", "gemma", "gemma2"),
    *("gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite"),
    *("gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium"),
    *("hunyuan", "hunyuan_v1_dense", "internlm2", "internlm3", "iquestloopcoder", "jamba", "kimi_k25", "kimi_k3"),
    *("kimi_linear", "kimi_vl", "laguna", "lfm2", "lfm2-vl", "lfm2_moe", "lille-130m", "llama4", "llama4_text"),
    *("longcat_flash", "longcat_flash_ngram", "mamba", "mamba2", "mellum", "mimo", "mimo_v2_flash", "minicpm"),
    *("minicpm3", "minimax", "minimax_m3_vl", "ministral3", "mistral3", "mistral4", "mixtral", "muse_glimmer"),
    *("muse_spark", "nanbeige", "nanochat", "nemotron", "nemotron-nas", "nemotron_h", "olmo2", "olmo3"),
    *("olmo_hybrid", "olmoe", "openelm", "phi", "phi3", "phimoe", "phixtral", "pixtral", "plamo", "plamo2", "plamo3"),
    *("prism_hadamard_qwen35", "qwen", "qwen2_moe", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
    *("qwen3_vl", "qwen3_vl_moe", "recurrent_gemma", "rwkv7", "seed_oss", "smollm3", "solar_open", "spark2_5"),
    *("stablelm", "starcoder2", "step3p5", "talkie", "telechat3", "youtu_llm"),
)

_EXCEPTIONS = {
    "bitnet": "on Macs only: its layers are Metal kernels",
    "minimax_m3_vl": "models without sparse layers only",
    "muse_spark": "on Macs only: its layers are Metal kernels",
    "plamo3": "compared with mlx-lm without a cache, since mlx-lm's windows lose a key",
}

_REFUSED = {
    "an index beside the cache chooses which keys a query sees": ("deepseek_v32", "deepseek_v41", "glm_moe_dsa"),
    "it computes attention itself, and mlx-lm needs the package ai2-olmo for it": ("olmo",),
    "a mask of blocks hides parts of the context, which the cache's attention has no form of": ("phi3small",),
}

FAMILIES: dict[str, Family] = {
    **{name: Family(name, "verified") for name in VERIFIED},
    **{name: Family(name, "tested", _EXCEPTIONS.get(name, "")) for name in TESTED},
    **{name: Family(name, "refused", why) for why, names in _REFUSED.items() for name in names},
}

# mlx-lm's names for families that share the code of another one.
SAME_CODE = {
    "deepseek_v41_text": "deepseek_v41",
    "falcon_mamba": "mamba",
    "gemma4_unified": "gemma4",
    "iquestcoder": "llama",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "llava": "mistral3",
    "minimax_m2": "minimax",
    "mistral": "llama",
    "phi-msft": "phixtral",
    "qwen2_5_vl": "qwen2_vl",
    "xverse": "llama",
}


def family_of(model_type: str) -> Family | None:
    """Look up the family of a config.json's `model_type`. Returns None if nothing is known of it."""
    return FAMILIES.get(SAME_CODE.get(model_type, model_type))


def require_paged(model_type: str) -> None:
    """Raise ModelError, with the reason, for a family that is known to fail."""
    family = family_of(model_type)
    if family is not None and family.status == "refused":
        raise ModelError(f"model family {model_type!r} can't be paged: {family.note}")


def is_untested(model_type: str) -> bool:
    """Tell whether no test has compared this family with its unpaged results."""
    family = family_of(model_type)
    return family is None or family.status == "refused"
