"""The command line of the server: spellings, LMDeploy's options, what reaches the launcher."""

import json
from dataclasses import fields

import pytest
from click.testing import CliRunner

from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.serve.command import gather
from jaxserve.serve.options import KEYS_VARIABLE, ServerOptions
from jaxserve.text import reasoning, tools


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, list(arguments), prog_name="jaxserve")


@pytest.fixture
def seen(monkeypatch):
    """What the launcher gets."""
    calls = []
    monkeypatch.setattr("jaxserve.serve.run.run", lambda *given: calls.append(given) or 0)
    return calls


@pytest.mark.parametrize("command", [["serve"], ["serve", "api_server"], ["serve", "api-server"]])
def test_every_option_is_there_with_help(run, command):
    result = run(*command, "--help")
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and f"Usage: jaxserve {' '.join(command).replace('_', '-')} [OPTIONS] [MODEL]" in text
    for heading in ("Address:", "Access:", "Limits:", "Answers:", "Logs:", "Engine:"):
        assert heading in text
    for knob in (*fields(ServerOptions), *fields(EngineConfig)):
        name = "cap" if knob.name == "capability" else knob.name.replace("_", "-")
        assert f"--{name}" in text, name
        assert " ".join(knob.metadata["help"].split()[:3]) in text
    assert "--qos-config-path" not in text
    assert all(name in text for name in (*tools.FORMATS, *reasoning.FORMATS))


@pytest.mark.parametrize("command", [["serve"], ["serve", "api_server"]])
def test_options_reach_the_launcher(run, seen, command):
    result = run(
        *(*command, "MODEL", "--tp", "2", "--server-port", "8000", "--server_name", "0.0.0.0", "--system", "Be kind."),
        *("--api-keys", "one", "two", "--allow-origins", "https://a.b", "--cap", "completion", "--model-name", "m"),
        *("--graceful-timeout", "5", "--log-level", "debug", "--ssl", "--max-body-size", "0.5"),
    )
    assert result.exit_code == 0, result.output
    ((model, config, options),) = seen
    assert (model, config) == ("MODEL", EngineConfig(tp=2, model_name="m"))
    assert options == ServerOptions(
        server_port=8000,
        server_name="0.0.0.0",
        meta_instruction="Be kind.",
        api_keys=["one", "two"],
        allow_origins=["https://a.b"],
        capability="completion",
        graceful_timeout=5.0,
        log_level="debug",
        ssl=True,
        max_body_size=0.5,
    )


def test_without_options(run, seen):
    for command in (["serve"], ["serve", "api_server"]):
        assert run(*command).exit_code == 0
        assert seen.pop() == (None, EngineConfig(), ServerOptions())


# As the course and LMDeploy's documentation write them.
COMMANDS = {
    "camp 2": "serve api_server /m --model-format hf --quant-policy 0 --server-name 0.0.0.0 --server-port 23333 --tp 1",
    "camp 1": "serve api_server ./workspace --server_name 0.0.0.0 --server_port 23333 --instance_num 64 --tp 1",
    "0.5.3": "serve api_server /m --qos-config-path '' --backend turbomind --api-keys internlm2 --allow-origins * "
    "--allow-methods * --allow-headers * --trust-remote-code --cap chat --max-batch-size 128 --cache-block-seq-len 64 "
    "--cache-max-entry-count 0.4 --rope-scaling-factor 0 --num-tokens-per-iter 0 --max-prefill-iters 1 "
    "--vision-max-batch-size 1 --enable-prefix-caching --session-len 4096 --revision main --log-level ERROR",
    "0.18": "serve api_server /m --proxy-url http://p --max-concurrent-requests 100 --max-log-len 10 "
    "--allow-terminate-by-client --enable-abort-handling --disable-fastapi-docs --generation-config lmdeploy "
    "--max-prefill-token-num 8192 --kernel-block-size -1 --num-gpu-blocks 0 --logprobs-mode raw_logprobs "
    "--eager-mode --distributed-executor-backend mp --disable-metrics --dp 1 --ep 1 --cp 1 --nnodes 1 --node-rank 0 "
    "--role Hybrid --migration-backend DLSlime --communicator nccl --async 1 --dtype bfloat16 --device cuda "
    "--speculative-num-draft-tokens 1 --tool-call-parser internlm --reasoning-parser default --enable-microbatch",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_lmdeploy(run, seen, name):
    result = run(*(word.strip("'") for word in COMMANDS[name].split()))
    assert result.exit_code == 0, result.output
    ((model, _, options),) = seen
    assert model in ("/m", "./workspace") and isinstance(options, ServerOptions)
    ignored = {
        "camp 1": ["instance-num 64"],
        "0.5.3": ["trust-remote-code"],
        "0.18": ["proxy-url", "max-log-len", "allow-terminate-by-client", "enable-abort-handling", "eager-mode"],
    }
    warned = "".join(line for line in result.stderr.splitlines() if line.startswith("warning: "))
    for option in ignored.get(name, []):
        assert option in warned
    assert "qos" not in warned and result.stderr.count("\n") == result.stderr.count("warning: ")


@pytest.mark.parametrize(
    "given, gathered",
    [
        ("M --api-keys a b --tp 2", "--api-keys a,b M --tp 2"),
        ("--api-keys a M", "--api-keys a M"),
        ("--tp 2 --api-keys a M", "--api-keys a --tp 2 M"),
        ("--ssl --api-keys a M", "--api-keys a --ssl M"),
        ("M --api_keys=a --allow-origins x y --api-keys b c", "--api-keys a,b,c --allow-origins x,y M"),
        ("M --api-keys", "M --api-keys"),
        ("--api-keys --tp 2", "--api-keys --tp 2"),
        ("--api-keys a -- --tp b", "--api-keys a -- --tp b"),
    ],
)
def test_lists_with_blanks_between(given, gathered):
    assert gather(given.split(), {"--api-keys", "--allow-origins"}, {"--tp"}) == gathered.split()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--server-port 70000", "'--server-port': it is a whole number from 0 to 65535, not '70000'"),
        ("--max-body-size 0", "'--max-body-size'"),
        ("--root-path llm/", "'--root-path'"),
        ("--log-format xml", "'--log-format'"),
        ("--cap infilling", "infilling is not there yet; it is 'completion' or 'chat'"),
        ("--allow-origins * --allow-credentials", "allow_credentials needs the origins by name"),
        ("M N", "unexpected extra argument"),
        ("M --api-keys", "requires an argument"),
        ("proxy --server-port 8000", "load balancer"),
        ("triton_client", "api_client"),
    ],
)
def test_mistakes(run, seen, arguments, said):
    result = run("serve", *arguments.split())
    assert result.exit_code == 2 and said in result.stderr and not seen
    assert len(result.stderr.splitlines()) == 1


def test_clients_and_pages(run, monkeypatch):
    calls = []
    monkeypatch.setattr("jaxserve.serve.client.run", lambda *given, **named: calls.append((given, named)))
    for command in (["client"], ["serve", "api_client"]):
        assert run(*command, "http://h:1", "--session-id", "3").exit_code == 0
        assert calls.pop() == (("http://h:1",), {"api_key": None, "session_id": 3})
    assert run("client").exit_code == 0 and calls[0][0] == ("http://127.0.0.1:23333",)
    for command in (["ui"], ["serve", "gradio"]):
        text = run(*command, "--help").output
        assert "--server-port" in text and "6006" in text and "--tp" in text


def test_keys(tmp_path, monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert ServerOptions().keys() == []
    file = tmp_path / "keys"
    file.write_text("# ours\n k1 \n\nk2\n")
    monkeypatch.setenv(KEYS_VARIABLE, "k3, k4")
    assert ServerOptions(api_keys=["k0", "k2"], api_key_file=str(file)).keys() == ["k0", "k2", "k3", "k4", "k1"]
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        ServerOptions(api_key_file=str(file)).keys()
    with pytest.raises(ValueError, match="api_key_file"):
        ServerOptions(api_key_file=str(tmp_path)).keys()


def test_sampling_defaults(tmp_path):
    assert ServerOptions().sampling_defaults() is None
    assert ServerOptions(generation_config="lmdeploy").sampling_defaults() == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.3}))
    for path in (file, tmp_path):
        assert ServerOptions(generation_config=str(path)).sampling_defaults() == {"temperature": 0.3}
    for bad in ("[]", "{"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="generation_config"):
            ServerOptions(generation_config=str(file)).sampling_defaults()


@pytest.mark.parametrize(
    "name, alone", [("127.0.0.1", True), ("127.8.0.1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(name, alone):
    assert ServerOptions(server_name=name).loopback is alone
