"""The command line: help, spellings, mistakes."""

import os
import resource
import subprocess
import sys
from dataclasses import fields

import pytest
from click.testing import CliRunner

from jaxserve import EngineConfig, __version__
from jaxserve.cli import main


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, list(arguments), prog_name="jaxserve")


@pytest.fixture
def seen(monkeypatch):
    """What the chat command hands on."""
    calls = []
    run = lambda model, config, **given: calls.append((model, config, given))  # noqa: E731
    monkeypatch.setattr("jaxserve.commands.chat.run", run)
    return calls


def test_help_is_quick_and_imports_nothing_slow():
    code = (
        "import sys\nfrom jaxserve.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    slow = {'jax', 'numpy', 'transformers', 'tokenizers', 'tqdm', 'prompt_toolkit'} & set(sys.modules)\n"
        "    assert not slow, slow\n"
    )
    times = []
    for arguments in (["--help"], ["chat", "--help"], ["--version"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.5  # seconds of a core, however busy the machine is


def test_help_names_all_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    for command in ("chat", "batch", "convert", "check-env"):
        assert command in result.output
        shown = run(command, "-h")
        assert shown.exit_code == 0 and "Usage: jaxserve " + command in shown.output
    assert run().exit_code == 2 and "Usage:" in run().output
    for group in ((), ("lite",), ("bench",)):
        _, *lines = run(*group, "--help").output.splitlines()
        assert not [line for line in lines if line.endswith("...")]  # what a command does fits into its line


def test_version(run):
    assert run("--version").output == f"jaxserve {__version__}\n"


@pytest.mark.parametrize("command", ["chat", "batch", "convert"])
def test_every_engine_option_is_there_with_help(run, command):
    text = " ".join(run(command, "--help").output.split())
    for knob in fields(EngineConfig):
        assert f"--{knob.name.replace('_', '-')}" in text
        assert " ".join(knob.metadata["help"].split()[:3]) in text
    for heading in ("Engine:", "Other options:"):
        assert heading in text
    assert "--dp" not in text.split()


@pytest.mark.parametrize("command", ["chat", "batch", "convert", "serve", "ui"])
def test_other_options_are_the_last(run, command):
    text = run(command, "--help").output
    assert text.index("Engine:") < text.index("Other options:")


def test_a_model_may_be_called_turbomind(run, seen):
    for more in ([], ["--tp", "1"]):
        run("chat", "turbomind", *more)
        assert seen.pop()[0] == "turbomind"


def test_options_reach_the_config(run, seen):
    result = run(
        *("chat", "MODEL", "--tp", "2", "--cache-max-entry-count", "0.4", "--session_len", "100"),
        *("--no-enable-prefix-caching", "--temperature", "0.5", "--max-new-tokens", "7", "--seed", "3"),
        *("--system", "Be kind.", "--dtype", "bfloat16", "--log-level", "ERROR"),
    )
    assert result.exit_code == 0, result.output
    ((model, config, given),) = seen
    expected = EngineConfig(
        tp=2, cache_max_entry_count=0.4, session_len=100, enable_prefix_caching=False, dtype="bfloat16", seed=3
    )
    assert (model, config) == ("MODEL", expected)
    wanted = {"temperature": 0.5, "max_new_tokens": 7, "meta_instruction": "Be kind.", "capability": "chat"}
    assert given == {**wanted, "log_level": "ERROR"}


def test_without_options_nothing_is_asked_for(run, seen):
    run("chat")
    assert seen == [(None, EngineConfig(), {"capability": "chat", "max_new_tokens": 1024, "log_level": "WARNING"})]


def test_pages_and_shares(run, seen):
    for text, value in (("0.5", 0.5), ("200", 200)):
        run("chat", "--cache_max_entry_count", text)
        assert seen[-1][1].cache_max_entry_count == value


@pytest.mark.parametrize("spelling", ["--cache-block-seq-len", "--cache_block_seq_len", "--cache-block_seq-len"])
def test_both_spellings(run, seen, spelling):
    assert run("chat", spelling, "32").exit_code == 0
    assert seen[0][1].cache_block_seq_len == 32


def test_options_of_lmdeploy_without_use_here(run, seen):
    result = run(
        *("chat", "M", "--backend", "pytorch", "--trust-remote-code", "--max-prefill-iters", "4", "--eager-mode"),
        *("--model-format", "hf", "--quant-policy", "0", "--async", "1", "--dp", "1"),
    )
    assert result.exit_code == 0, result.output
    assert seen[0][1] == EngineConfig(model_format="hf")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" is ignored: ")[0] for line in warnings] == [
        f"warning: --{given}" for given in ("backend pytorch", "trust-remote-code", "max-prefill-iters 4", "eager-mode")
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["chat", "--tp", "0"], "'--tp': it is a whole number, 1 or more, not '0'"),
        (["chat", "--tp", "two"], "not 'two'"),
        (["chat", "--dtype", "int3"], "'float16'"),
        (["chat", "--quant-policy", "5"], "4 (int4), 8 (int8) or 16 (fp8), not '5'"),
        (["chat", "--model-format", "awq"], "unquantized weights"),
        (["chat", "--cache-max-entry-count", "1.5"], "share"),
        (["chat", "--top-p", "2"], "'--top-p'"),
        (["chat", "--temperature", "hot"], "'--temperature'"),
        (["chat", "--cap", "dance"], "'--cap'"),
        (["chat", "--adapters", "a=b"], "LoRA"),
        (["chat", "--speculative-algorithm", "eagle"], "speculative decoding is not there yet"),
        (["chat", "--no-such-option"], "No such option"),
        (["chat", "/no/such/model"], "/no/such/model"),
        (["chat", "--chat-template", "nowhere.json"], "nowhere.json"),
        (["chat", "--cap", "python"], "python"),
        (["frobnicate"], "No such command"),
        (["batch"], "Missing argument 'IN.jsonl'"),
        (["batch", "/no/such/file", "out"], "/no/such/file"),
        (["convert", "model"], "Missing argument 'DIR'"),
        (["convert", "/no/such/model", "out"], "/no/such/model"),
        (["convert", "internlm2", "/m", "--dst-path", "ws"], "`jaxserve convert PATH ws`"),
        (["chat", "turbomind", "./workspace", "--tp", "1"], "`jaxserve chat ./workspace`"),
        (["chat", "torch", "/m"], "`jaxserve chat /m`"),
        (["list"], "a checkpoint brings its own"),
        (["lite", "kv_qparams", "a", "b", "--kv-bits", "8"], "--quant-policy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_status_2(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.stderr
    last = [line for line in result.stderr.splitlines() if line.startswith("jaxserve")]
    assert len(last) == 1 and said in last[0]


def test_a_folder_that_is_no_model(run, tmp_path):
    result = run("chat", str(tmp_path))
    assert result.exit_code == 2 and str(tmp_path) in result.stderr


def test_python_m_jaxserve():
    done = subprocess.run([sys.executable, "-m", "jaxserve", "--version"], capture_output=True, text=True)
    assert done.stdout == f"jaxserve {__version__}\n"


def test_a_reader_that_leaves_gets_no_traceback():
    command = f"{sys.executable} -m jaxserve chat --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert done.stderr == "" and done.stdout.startswith("Usage:")
