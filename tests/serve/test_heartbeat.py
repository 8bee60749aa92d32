import time
from queue import SimpleQueue

from jaxserve.serve import heartbeat
from jaxserve.serve.heartbeat import beating


def test_a_silent_queue_is_told_again_and_again():
    queue = SimpleQueue()
    with beating(queue, 0.02) as waiter:
        began = time.monotonic()
        for _ in range(3):
            assert queue.get(timeout=20) is waiter
        assert time.monotonic() - began >= 0.06


def test_while_something_comes_it_is_not():
    queue = SimpleQueue()
    with beating(queue, 5), beating(SimpleQueue(), 0.001) as other:
        assert other.queue.get(timeout=20) is other  # the thread looks
        time.sleep(0.05)
        assert queue.empty()


def test_nobody_is_kept():
    for _ in range(3):
        with beating(SimpleQueue(), 5):
            pass
    assert not heartbeat._heart()._waiters
