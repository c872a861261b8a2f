"""What reaches a request and the engine from options, files and stdin, and what bad values are told."""

import ast
import json
import re
from pathlib import Path

import click.testing
import pytest
from helpers.stub_llm import Run, StubLLM, assert_one_line, invoke

from mlx_paged import LLM
from mlx_paged.cli import options
from mlx_paged.cli.main import cli
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

ROOT = Path(__file__).parents[2]


def test_prompts_come_from_arguments_options_files_and_stdin(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from a\nfile\n")
    result = run("generate", "--raw", "one", "-p", "two", "-p", "-", "-f", str(tmp_path / "a.txt"), stdin="piped\n")
    assert result.exit_code == 0
    assert run.prompts == ["one", "two", "piped", "from a\nfile"]


@pytest.mark.parametrize(
    "args",
    [
        "-f {} one --prompt two three -ptwo -f {}",
        "-f {} one -m 9 --prompt=two --stop x three -qvp two --file={}",
        "-vf{} --temp=0 one -p two -m9 --raw -- three -p two -f {}",
    ],
)
def test_prompts_are_answered_in_the_order_typed(args: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    file = str(tmp_path / "a.txt")
    assert run("generate", "--raw", *args.format(file, file).split()).exit_code == 0
    assert run.prompts[:4] == ["a", "one", "two", "three"]
    assert run.prompts[4:] == (["-p", "two", "-f", file] if " -- " in args else ["two", "a"])


def test_without_a_prompt_stdin_is_one_prompt(run: Run) -> None:
    assert run("generate", "--raw", stdin="two\r\nlines\r\n").exit_code == 0
    assert run.prompts == ["two\r\nlines"]


def test_without_any_prompt_the_ways_to_give_one_are_named(run: Run) -> None:
    assert_one_line(run("generate", stdin=""), 2, "argument", "-p", "-f", "pipe")
    assert run.made == []


def test_a_byte_order_mark_is_no_part_of_a_prompt_or_a_schema(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHi\n")
    (tmp_path / "any.json").write_bytes(b"\xef\xbb\xbftrue")
    run("generate", "--raw", "-f", str(tmp_path / "a.txt"), "--json-schema", str(tmp_path / "any.json"))
    assert (run.prompts, run.params.json_schema) == (["Hi"], True)
    run("generate", "--raw", stdin=b"\xef\xbb\xbfHi")
    assert run.prompts == ["Hi"]


def test_stdin_and_files_that_are_not_utf8_are_bad_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8")
    assert_one_line(run("generate", "-f", str(tmp_path / "image")), 2, "image is not UTF-8")
    assert_one_line(run("generate", stdin=b"\xff\xd8"), 2, "standard input is not UTF-8")
    assert_one_line(run("generate", "-f", str(tmp_path / "missing")), 2, "missing", "does not exist")


def test_sampling_options_reach_the_request_by_their_usual_names(run: Run) -> None:
    options = {
        "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7, "logprobs": 2,
        "min_tokens": 3, "max_thinking_tokens": 5,
    }  # fmt: skip
    args = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    run("generate", *args, "-n", "3", "--stop", "END", "--stop", "\n\n", "--ignore-eos", "--bad-words", "cat",
        "--json", "Hi")  # fmt: skip
    assert run.params == SamplingParams(**options, n=3, stop=("END", "\n\n"), ignore_eos=True, bad_words=("cat",))


def test_stop_strings_and_special_tokens_are_options_of_samples_and_beams(run: Run) -> None:
    for command, kind in (("generate", SamplingParams), ("beam-search", BeamSearchParams)):
        run(command, "--stop", "END", "--show-special-tokens", "Hi")
        assert isinstance(run.params, kind)
        assert (run.params.stop, run.params.skip_special_tokens) == (("END",), False)
        run(command, "Hi")
        assert (run.params.stop, run.params.skip_special_tokens) == ((), True)


def test_the_form_of_the_output_is_a_schema_from_a_file_or_an_expression(run: Run, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    (tmp_path / "person.json").write_text(json.dumps(schema))
    assert run("generate", "--json-schema", str(tmp_path / "person.json"), "Hi").exit_code == 0
    assert run.params.json_schema == schema
    run("generate", "--regex", "[a-z]+", "Hi")
    assert (run.params.regex, run.params.json_schema) == ("[a-z]+", None)
    (tmp_path / "list.lark").write_text('start: "a" ("," "a")*\n')
    run("generate", "--grammar-file", str(tmp_path / "list.lark"), "Hi")
    assert (run.params.grammar, run.params.regex) == ('start: "a" ("," "a")*', None)


@pytest.mark.parametrize(
    "content, words", [("{type: object}", "not JSON"), ("", "not JSON"), ("[" * 100_000, "not JSON"),
                       ("null", "object"), ("[1]", "object"), ('"text"', "object"), (b"\xff", "UTF-8")]
)  # fmt: skip
def test_a_file_without_a_schema_is_bad_usage(content: str | bytes, words: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(run("generate", "--json-schema", str(path), "Hi"), 2, str(path), words)
    assert_one_line(run("generate", "--json-schema", str(tmp_path / "none.json"), "Hi"), 2, "none.json")
    assert run.made == []


def test_a_schema_and_an_expression_at_once_are_bad_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text("true")
    assert_one_line(run("generate", "--json-schema", str(tmp_path / "any.json"), "--regex", "a", "Hi"), 2, "not both")
    assert_one_line(run("generate", "--regex", "", "Hi"), 2, "--regex")


@pytest.mark.parametrize(
    ("option", "content"),
    [("--regex", "[a"), ("--json-schema", '{"type": "objekt"}'), ("--grammar-file", "begin: A")],
)
def test_a_form_that_no_output_can_have_is_bad_usage_before_a_model_is_loaded(
    option: str, content: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "form").write_text(content)
    value = content if option == "--regex" else str(tmp_path / "form")
    assert_one_line(run("generate", option, value, "Hi"), 2, f"{option} can't be used: ", "--help")
    assert run.made == []


@pytest.mark.parametrize("command", ["generate", "beam-search", "chat"])
def test_what_else_the_chat_template_takes_is_json(command: str, run: Run) -> None:
    prompt, stdin = ((), "Hi\n") if command == "chat" else (("Hi",), None)
    option = "--chat-template-kwargs"
    run(command, option, '{"enable_thinking": false}', *prompt, stdin=stdin)
    assert run.made[-1].template == {"chat_template_kwargs": {"enable_thinking": False}}
    run(command, *prompt, stdin=stdin)
    assert run.made[-1].template == {}
    for wrong in ("enable_thinking=false", "[1]"):
        assert_one_line(run(command, option, wrong, *prompt), 2, option, "JSON")
    if command != "chat":
        assert_one_line(run(command, option, "{}", "--raw", *prompt), 2, option, "--raw")
        run.stub.has_chat_template = False
        assert_one_line(run(command, option, "{}", *prompt), 1, option, "has none")


def test_short_names_mean_the_same(run: Run) -> None:
    run("generate", "--temp", "0.5", "-m", "9", "Hi")
    assert (run.params.temperature, run.params.max_tokens) == (0.5, 9)


def test_the_default_is_greedy_and_256_tokens_or_what_fits(run: Run) -> None:
    run("generate", "--raw", "Hi")
    assert run.params == SamplingParams(temperature=0.0, max_tokens=256, stop=())
    run("generate", "--raw", "x" * (StubLLM.context - 100))
    assert run.params.max_tokens is None


def test_a_max_tokens_that_was_asked_for_is_not_reduced(run: Run) -> None:
    assert_one_line(run("generate", "--raw", "--max-tokens", "399", "Hello"), 1, "context 400")


def test_engine_options_reach_the_model_and_those_not_given_stay_its_own(run: Run) -> None:
    run("generate", "Hi")
    assert (run.made[-1].model, run.made[-1].settings) == (None, {})
    options = (
        "--model qwen2 --block-size 8 --num-kv-blocks 99 --max-num-seqs 4 --max-num-batched-tokens 64 "
        "--max-model-len 512 --dtype float16 --no-prefix-caching"
    )
    run("generate", *options.split(), "Hi")
    assert run.made[-1].model == "qwen2"
    assert run.made[-1].settings == {
        "block_size": 8, "num_kv_blocks": 99, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512,
        "dtype": "float16", "prefix_caching": False,
    }  # fmt: skip
    run("generate", "--speculative", "ngram", "--num-speculative-tokens", "3", "Hi")
    assert run.made[-1].settings == {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    run("generate", "--draft-model", "small", "Hi")
    assert run.made[-1].settings == {"speculative_config": {"model": "small"}}
    assert_one_line(run("beam-search", "--speculative", "ngram", "Hi"), 2, "beams have no guesses", "--speculative")
    both = run("generate", "--speculative", "ngram", "--draft-model", "small", "Hi")
    assert_one_line(both, 2, "give --speculative ngram or --draft-model MODEL, not both")
    stores = "--swap-space 8GB --prefix-cache-dir saved --prefix-cache-size 20GB --kv-cache-memory 30%"
    run("generate", *stores.split(), "Hi")
    assert run.made[-1].settings == {
        "kv_cache_memory": "30%", "swap_space": "8GB", "prefix_cache_dir": "saved", "prefix_cache_size": "20GB",
    }  # fmt: skip


def test_every_command_that_has_or_shows_a_cache_takes_its_kind(run: Run) -> None:
    takes = {
        name for name, command in cli.commands.items() for each in command.params if "--kv-cache-dtype" in each.opts
    }
    assert takes == {"generate", "beam-search", "chat", "serve", "bench", "inspect"}
    for command in ("generate", "beam-search"):
        run(command, "--kv-cache-dtype", "k8v4", "Hi")
        assert run.made[-1].settings == {"kv_cache_dtype": "k8v4"}


def test_every_command_that_runs_a_model_takes_an_adapter(run: Run, tmp_path: Path) -> None:
    takes = {name for name, command in cli.commands.items() for each in command.params if "--adapter-path" in each.opts}
    assert takes == {"generate", "beam-search", "chat", "serve", "bench"}
    for command in ("generate", "beam-search"):
        run(command, "--adapter-path", str(tmp_path), "Hi")
        assert run.made[-1].settings == {"adapter_path": str(tmp_path)}


@pytest.mark.parametrize(
    "args",
    [
        "--top-p 7", "--top-p 0", "--top-k -1", "--min-p 2", "--temperature -1", "--temp cold", "--max-tokens 0",
        "-n 0", "--repetition-penalty 0", "--presence-penalty 9", "--logprobs -1 --json", "--logprobs 3",
        "--min-tokens -1", "--min-tokens 5 -m 3", "--bad-words=", "--max-thinking-tokens -1",
        "--block-size 0", "--num-kv-blocks 0", "--kv-cache-memory 4XB", "--kv-cache-memory 200%", "--max-num-seqs 0",
        "--dtype int3", "--kv-cache-dtype int4", "--max-num-batched-tokens 0", "--max-model-len 0", "--no-such-option",
        "--num-kv-blocks 9 --kv-cache-memory 1GB", "--swap-space=-5GB", "--swap-space=", "--swap-space=50%",
        "--speculative eagle", "--draft-model=", "--num-speculative-tokens 3",
        "--num-speculative-tokens 0 --speculative ngram",
        "--draft-model x --num-speculative-tokens 0", "--swap-space=~no-user/x", "--prefix-cache-dir=~no-user/x",
        "--prefix-cache-dir=", "--prefix-cache-size 1GB", "--prefix-cache-size lots --prefix-cache-dir x",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_bad_usage_told_in_one_line_before_a_model_is_loaded(args: str, run: Run) -> None:
    option = "--temp" if args == "--temp cold" else re.split("[ =]", args)[0]
    assert_one_line(run("generate", *args.split(), "Hi"), 2, option, "--help")
    assert run.made == []


@pytest.mark.parametrize(
    ("in_python", "in_options"),
    [
        ("lower max_tokens or raise num_kv_blocks", "lower --max-tokens or raise --num-kv-blocks"),
        ("max_model_len=9 is more than the 8 tokens", "--max-model-len 9 is more than the 8 tokens"),
        ("n=65 samples can't run at once: max_num_seqs is 64", "-n 65 samples can't run at once: --max-num-seqs is 64"),
        ("dtype must be one of a, b", "--dtype must be one of a, b"),
        ("swap_space needs blocks, not prefix_caching=False", "--swap-space needs blocks, not --no-prefix-caching"),
        ("max_staging is a size; a seed must sprout", "max_staging is a size; a seed must sprout"),
    ],
)
def test_settings_that_a_message_names_are_written_as_options_if_the_command_has_them(
    in_python: str, in_options: str
) -> None:
    command = cli.commands["generate"]
    assert options.in_options(in_python, options.option_names(command, {})) == in_options


def test_what_is_said_of_drafts_names_the_option_that_asked_for_them() -> None:
    said = "mamba2 models run without drafts (speculative_config)"
    for params, option in (({"draft_model": "x"}, "--draft-model"), ({"draft_model": None}, "--speculative")):
        names = options.option_names(cli.commands["generate"], params)
        assert options.in_options(said, names) == f"mamba2 models run without drafts ({option})"


def test_what_does_not_fit_names_options_on_the_command_line_and_arguments_in_python() -> None:
    result = invoke("generate", "--raw", "--num-kv-blocks", "2", "a b c d " * 50)
    assert_one_line(result, 1, "lower --max-tokens", "--num-kv-blocks or --kv-cache-memory")
    with pytest.raises(ValueError, match="lower max_tokens, or raise num_kv_blocks or kv_cache_memory"):
        LLM(num_kv_blocks=2).generate("a b c d " * 50)


def test_an_option_that_a_message_names_exists() -> None:
    known = {name for command in cli.commands.values() for each in command.params for name in each.opts}
    named = set()
    for file in [*(ROOT / "mlx_paged").rglob("*.py"), *(ROOT / "models").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)) - {"--help", "--version"}
                docstring, is_command = "\n" in node.value, {"cli", "server"} & set(file.parts)
                assert is_command or docstring or not found, f"{file.name} speaks of {found} in Python"
                named |= found
    assert named > {"--max-tokens", "--system"} and named <= known


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("generate --model qw", "plain,qwen3"),
        ("inspect gem", "plain,gemma3"),
        ("chat --model ./", "dir,./"),
        ("pull qwen3.5", "plain,qwen3.5-4b"),
        ("generate --adapter-path ./", "dir,./"),
        ("generate --dtype f", "plain,float16"),
        ("inspect --kv-cache-dtype k", "plain,k8v4"),
        ("generate --allocator ", "plain,buddy"),
        ("generate --swap-space ", "dir,"),
        ("generate --gram", "plain,--grammar-file"),
    ],
)
def test_a_shell_completes_aliases_folders_values_and_options(
    typed: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_WORDS", f"mlx-paged {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) + typed.endswith(" ")))
    monkeypatch.setenv("_MLX_PAGED_COMPLETE", "bash_complete")
    result = click.testing.CliRunner().invoke(cli, [])
    assert expected in result.stdout.splitlines(), result.stdout
