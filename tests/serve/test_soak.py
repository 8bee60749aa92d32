"""A minute of everything that clients do, good and bad; scripts/soak.py does the same for as long as one likes."""

import pytest

from tests.serve import processes
from tests.serve.test_load import script


def test_the_server_is_afterwards_what_it_was():
    soak = script("soak")
    with processes.served(processes.stub(rate=50, lanes=16)) as server:
        report = soak.soak(server, 50, warm_up=10, clients=16, seed=0, pause=0.1)
    assert not report["faults"], soak.table(report)
    assert min(report["counts"][kind] for kind in ("good", "abort", "bad")) > 10


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"files": 11}, "11 open files, 10 before"),
        ({"threads": 99}, "99 threads, 3 before"),
        ({"bytes": 200 << 20}, "200 MiB, 100 before"),
        ({"pid": 2}, "started again"),
    ],
)
def test_a_leak_is_seen(change, fault):
    soak = script("soak")
    before = {"jaxserve-engine 0": {"bytes": 100 << 20, "files": 10, "threads": 3, "pid": 1}}
    (found,) = soak.differences(before, {"jaxserve-engine 0": before["jaxserve-engine 0"] | change})
    assert fault in found
    assert not soak.differences(before, before)


def test_threads_of_a_pool_are_no_leak():
    soak = script("soak")
    then = {"bytes": 100 << 20, "files": 10, "threads": 3, "pid": 1}
    more = then | {"files": 14, "threads": 5}
    assert soak.differences({"jaxserve-web 0": then}, {"jaxserve-web 0": more}) == []
    assert len(soak.differences({"jaxserve-web 0": then}, {"jaxserve-web 0": more | {"files": 15}})) == 1
    assert len(soak.differences({"jaxserve-engine 0": then}, {"jaxserve-engine 0": more})) == 2
    assert len(soak.differences({"jaxserve-web 0": then}, {"jaxserve-web 0": more | {"threads": 14}})) == 1
