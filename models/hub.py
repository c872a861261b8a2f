"""From a model's name to a folder on disk: aliases, folders, Hugging Face repositories and their cache.

Knows nothing of mlx or of model families. Every failure is a `ModelError` of one line.
"""

import difflib
import errno
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlx_paged.config import excerpt, expand_user
from mlx_paged.errors import ModelError, one_line
from mlx_paged.models.aliases import ALIASES

DEMO_FOLDER = Path(__file__).parent / "demo"

# What mlx-lm reads of a repository; Python files are left out because nothing here runs a repository's code.
DOWNLOAD_PATTERNS = ["*.json", "*.jsonl", "*.jinja", "*.txt", "*.tiktoken"]
DOWNLOAD_PATTERNS += ["model*.safetensors", "tokenizer.model", "tiktoken.model"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(model.*)-(\d+)-of-(\d+)\.safetensors")
_VOCABULARIES = [["tokenizer.json"], ["*.model"], ["*.tiktoken"], ["vocab.json", "merges.txt"], ["vocab.txt"]]
_BY_TRANSFORMERS = (
    "what was saved by PyTorch can't be read. Take a repository that has safetensors, or convert it where transformers "
    "and torch are installed: AutoModelForCausalLM.from_pretrained({folder!r}).save_pretrained({folder!r})"
)
_OTHER_WEIGHTS = {
    "adapter_model.safetensors": "an adapter, of no use without its base model: merge them into a model of its own",
    ".safetensors": "under that name it isn't looked for. Take the repository's files for transformers",
    ".bin": _BY_TRANSFORMERS,
    ".pth": _BY_TRANSFORMERS,
    ".pt": _BY_TRANSFORMERS,
    ".gguf": "that is for llama.cpp. Take the repository that it was made from, or a conversion for mlx-lm",
    ".npz": "a format that mlx-lm has given up. Take a newer conversion of the model",
}
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_ANY_MODEL = "an alias (mlx-paged models lists them), a Hugging Face repository (org/name) or a folder"


def resolve(model: str | os.PathLike[str] | None, *, revision: str | None = None, config_only: bool = False) -> Path:
    """Find the folder that holds `model`, and download it first if need be.

    model: None (the bundled demo model), an alias, a folder, or a repository "org/name". A plain string that is an
    alias always means the alias (write "./qwen2" for a folder of that name); "org/name" means a folder if there is
    one. revision: branch, tag or commit of a repository. config_only: of a repository, download config.json and
    nothing else. Raises ModelError if there is no such model, or it can't be downloaded now.
    """
    if model is None:
        return _folder_with_config(DEMO_FOLDER)
    if not isinstance(model, str | os.PathLike):
        hint = "; LLM.from_model takes one that is already loaded" if hasattr(model, "parameters") else ""
        raise ModelError(f"a model is {_ANY_MODEL}, got {excerpt(model)}{hint}")
    name = os.fspath(model)
    if isinstance(model, str) and model in ALIASES:
        return _download(ALIASES[model], revision, config_only)
    try:
        folder = expand_user(name, "model")
        is_folder, is_there = name and folder.is_dir(), name and folder.exists()
    except (OSError, ValueError) as error:
        reason = f"{excerpt(name, 60)}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise ModelError(f"{reason}; a model is {_ANY_MODEL}") from None
    if is_folder:
        return _folder_with_config(folder)
    if is_there:
        raise ModelError(f"{name!r} is a file; a model is the folder that holds config.json and *.safetensors")
    if _looks_like_path(model):
        raise ModelError(f"there is no folder {name!r}; a model is {_ANY_MODEL}")
    if _REPO_ID.fullmatch(name):
        return _download(name, revision, config_only)
    close = difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? Otherwise give" if close else "give"
    raise ModelError(f"there is no model {name!r}: {hint} {_ANY_MODEL}")


def check_files(folder: Path) -> None:
    """Check that `folder` holds a config, whole safetensors files and a tokenizer. Raises ModelError, naming the file.

    Only headers are read, so it is cheap for a model of any size.
    """
    _folder_with_config(folder)
    read_json(folder / "config.json")
    check_weights(folder)
    if not any(all(any(folder.glob(name)) for name in names) for names in _VOCABULARIES):
        raise ModelError(f"{folder} has no tokenizer.json, nor another file with a vocabulary; fetch the model again")


def check_weights(folder: Path) -> list[Path]:
    """Check that `folder` holds a model's whole safetensors files. Returns them. Raises ModelError, naming the file."""
    shards = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    names: set[str] = set()
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map; fetch the file again")
        names = {str(name) for name in weight_map.values()}
    for shard in shards:  # where there is no index, their names tell how many there are
        if part := _SHARD.fullmatch(shard.name):
            numbers = range(1, int(part[3]) + 1)
            names |= {f"{part[1]}-{number:0{len(part[2])}}-of-{part[3]}.safetensors" for number in numbers}
    missing = sorted(names - {shard.name for shard in shards})
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing[:3])}{' ...' if missing[3:] else ''} ({len(missing)} of {len(names)} "
            "files of its weights); fetch the model again"
        )
    if not shards:
        raise ModelError(
            f"{folder} should hold the weights as model*.safetensors, and there is {_found_instead(folder)}"
        )
    from safetensors import SafetensorError, safe_open

    for shard in shards:
        try:
            with safe_open(shard, framework="numpy"):
                pass
        except OSError as error:
            raise ModelError(f"{shard} can't be read: {error}") from error
        except SafetensorError as error:
            raise ModelError(f"{shard} is not a whole safetensors file ({error}); fetch it again") from error
    return shards


def _found_instead(folder: Path) -> str:
    """Say what a folder has in the place of weights, and what helps."""
    for suffix, help in _OTHER_WEIGHTS.items():
        if others := sorted(path.name for path in folder.glob(f"*{suffix}")):
            return f"only {others[0]}: {help.format(folder=str(folder))}"
    return "none; fetch the model again"


def _looks_like_path(model: str | os.PathLike[str]) -> bool:
    if not isinstance(model, str):
        return True
    return model.startswith((".", "~", os.sep)) or os.sep in model[model.find(os.sep) + 1 :] or model.endswith(os.sep)


def _folder_with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is not a model folder: it has no config.json")
    return folder


def read_json(path: Path) -> dict[str, object]:
    """Read the object in a JSON file of a model. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} should hold a JSON object and holds {type(content).__name__}")
    return content


def context_of(config: dict[str, Any]) -> int | None:
    """Find the longest context, in tokens, that a model's configuration names. Returns None if it names none."""
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else getattr(text_config, "__dict__", {})):
        for name in _CONTEXT_NAMES:
            if type(length := section.get(name)) is int and length > 0:
                return length
    return None


def _download(repo: str, revision: str | None, config_only: bool) -> Path:
    """Download what is missing of a repository; huggingface-hub draws its progress on stderr.

    Returns its folder in the local cache. Raises ModelError for what a person can put right.
    """
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json"] if config_only else DOWNLOAD_PATTERNS
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = _explain(error, repo, revision)
        if reason is None:
            raise
        raise ModelError(reason) from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{repo} has no config.json: it is not a model that mlx-lm can read")
    return folder


class CachedModel(NamedTuple):
    """A repository in huggingface-hub's cache that has the configuration of a model."""

    folder: Path
    """That of its newest snapshot."""
    num_bytes: int
    """What it takes on the disk."""
    is_whole: bool
    """Whether all is there that a model needs."""
    config: dict[str, object]


def cached_models() -> dict[str, CachedModel]:
    """Look up which models are in huggingface-hub's cache, by repository. Nothing is downloaded."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found = {}
    with suppress(CacheNotFound):
        for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos:
            # The one that a name means, or else the last one that came.
            newest = max(repo.revisions, key=lambda each: ("main" in each.refs, each.last_modified), default=None)
            if repo.repo_type != "model" or newest is None or not (newest.snapshot_path / "config.json").is_file():
                continue
            folder, config, is_whole = newest.snapshot_path, dict[str, object](), True
            try:
                config = read_json(folder / "config.json")
                check_files(folder)
            except ModelError:
                is_whole = False
            if isinstance(config.get("model_type"), str):
                found[repo.repo_id] = CachedModel(folder, repo.size_on_disk, is_whole, config)
    return found


class DownloadSize(NamedTuple):
    """What a repository's files take, those that a model needs."""

    total: int
    """Bytes."""
    missing: int
    """Bytes of the files that are not in the cache yet; what has arrived of one that broke off counts as missing."""
    free: int
    """Bytes that are free on the cache's disk."""


def download_size(model: str) -> DownloadSize | None:
    """Ask the hub what downloading `model` will take. Returns None for a folder, and if the hub can't be asked now."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    repo = ALIASES.get(model, model)
    if model not in ALIASES and Path(model).expanduser().is_dir():
        return None
    try:
        files = snapshot_download(repo, allow_patterns=DOWNLOAD_PATTERNS, dry_run=True)
    except DryRunError:
        return None
    except Exception as error:
        reason = _explain(error, repo, None)
        if reason is None:
            raise
        raise ModelError(reason) from error
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    missing = sum(size for size, will_download in sizes if will_download)
    return DownloadSize(sum(size for size, _ in sizes), missing, shutil.disk_usage(cache).free)


def _explain(error: Exception, repo: str, revision: str | None) -> str | None:
    """Explain in one line what huggingface-hub raised. Returns None if network, disk and name are not at fault."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    is_incomplete = type(error).__name__ == "IncompleteSnapshotError"
    number = _errno(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {repo} doesn't fit into {cache}; free some space, or point HF_HOME at another disk"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{repo} can't be stored: {cache} is not writable; point HF_HOME at a folder that is"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence at {endpoint}/{repo}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        here = f"at {endpoint} and no folder of that name"
        return f"there is no model {repo!r} {here} (a private one needs `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} can't be a repository's name; a model is {_ANY_MODEL}"
    if isinstance(error, errors.LocalEntryNotFoundError) or is_incomplete:
        state = "is only partly downloaded" if is_incomplete else "is not downloaded yet"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} can't be reached"
        return f"{repo} {state} and {offline}; try again when online, or give a folder instead"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{endpoint} answered {error.response.status_code} for {repo}; try again later"
    if isinstance(error, (OSError, getattr(errors, "HTTPError", OSError))):
        return f"the download of {repo} broke off ({one_line(error)}); run it again, what has arrived is kept"
    return None


def _errno(error: BaseException | None) -> int | None:
    """Find the system's error number in the chain of causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None
