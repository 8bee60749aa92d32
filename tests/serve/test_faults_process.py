"""Rows 60 and 71 of tests/serve/faults/table.py: an engine of several devices that is killed, a log that is full."""

import json

from tests.serve import processes, tiny
from tests.serve.faults.target import Target, events
from tests.waiting import soon


def test_60_an_engine_of_two_devices_is_one_process(tmp_path, monkeypatch):
    """No rank can be lost while the others wait for it: all devices end together, and come back together."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    folder = tiny.write(tmp_path / "tiny")
    options = ["--tp", "2", "--max-batch-size", "2", "--session-len", "2048", "--num-tokens-per-iter", "32"]
    options += ["--cache-max-entry-count", "80", "--log-level", "error", "--server-port", "0"]
    with processes.served(["-m", "jaxserve", "serve", str(folder), *options], start=300) as running:
        target = Target(running.url)
        before = target.complete(max_tokens=20)
        assert before.status == 200
        (engine,) = running.processes()["jaxserve-engine"]
        with target.open(max_tokens=2000, ignore_eos=True) as client:
            told = events(client)
            next(told)
            engine.kill()
            *_, last = told
        assert "the engine" in json.loads(last)["error"]["message"]
        replies = []

        def answered():
            replies.append(target.complete(max_tokens=20))
            assert replies[-1].status in (200, 503), replies[-1]
            return replies[-1].status == 200

        soon(answered, 300)  # each web process loses the old engine, and finds the new one, by itself
        assert replies[-1].text == before.text


def test_71_a_full_disk_for_the_log(monkeypatch):
    """What is said is lost; who asks is answered."""
    real = processes.psutil.Popen

    def to_a_full_disk(arguments, *, stdout, **settings):
        settings["stderr"] = full
        return real(arguments, stdout=full, **settings)

    with open("/dev/full", "wb") as full, monkeypatch.context() as patched:
        patched.setattr(processes.psutil, "Popen", to_a_full_disk)
        with processes.served(processes.stub(log_level="debug", http_workers=1)) as running:
            target = Target(running.url)
            assert [target.complete().status for _ in range(5)] == [200] * 5
            assert target.get("/nope").status == 404
            with target.open(max_tokens=3) as client:
                assert list(events(client))[-1] == "[DONE]"
            assert target.alive() is None
