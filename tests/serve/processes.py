"""A server in processes of its own, as `jaxserve serve` runs it, and what they hold at a moment."""

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START, STOP = 120, 60  # seconds; deadlines


class Running:
    """A running server."""

    def __init__(self, launcher: psutil.Popen, log: Path):
        self.url, self.launcher, self.log = "", launcher, log

    def find(self) -> None:
        """Sets `url` once it listens.  It has chosen the port itself: one that is free now is not so for long."""
        for master in self.processes().get("jaxserve-http", ()):
            for connection in master.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    self.url = f"http://127.0.0.1:{connection.laddr.port}"

    def processes(self) -> dict[str, list[psutil.Process]]:
        """By what they are: "jaxserve", "jaxserve-engine", "jaxserve-http", "jaxserve-web"."""
        found: dict[str, list[psutil.Process]] = {}
        for process in [self.launcher, *self.launcher.children(recursive=True)]:
            name = Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8").strip()
            found.setdefault(name, []).append(process)
        return found

    def memory(self) -> int:
        """Bytes that they hold, all together."""
        return sum(process.memory_info().rss for group in self.processes().values() for process in group)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by what the processes are."""
        return {
            name: sum(sum(process.cpu_times()[:2]) for process in processes)
            for name, processes in self.processes().items()
        }

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Those of ours, and of the process, that have no label but the model's name."""
        from prometheus_client.parser import text_string_to_metric_families

        status, text = self.get("/metrics")
        assert status == 200, text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.keys() <= {"model_name"} and not sample.name.startswith("vllm:")
        }


@contextmanager
def served(command: Sequence[str], start: float = START) -> Iterator[Running]:
    """`python` with these arguments; they tell it to take port 0.  start: seconds until it must be ready."""
    with tempfile.TemporaryDirectory(prefix="jaxserve-served-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            launcher = psutil.Popen(
                [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, stdin=subprocess.DEVNULL
            )
        running = Running(launcher, log)
        try:
            wait_ready(running, start)
            yield running
        except BaseException:
            print(log.read_text(encoding="utf-8", errors="replace")[-8000:], file=sys.stderr)
            raise
        finally:
            for stop in (launcher.terminate, launcher.terminate, launcher.kill):  # the second one stops at once
                try:
                    stop()
                    launcher.wait(STOP / 2)
                    break
                except psutil.NoSuchProcess:  # it has ended by itself
                    break
                except psutil.TimeoutExpired:
                    pass


def wait_ready(running: Running, seconds: float = START) -> None:
    """AssertionError if /health does not come to say 200."""
    deadline = time.monotonic() + seconds
    while True:
        assert running.launcher.poll() is None, f"the server ended with status {running.launcher.returncode}"
        assert time.monotonic() < deadline, "the server does not answer"
        try:
            running.find()
            if running.url and running.get("/health")[0] == 200:
                return
        except (OSError, psutil.NoSuchProcess):
            pass
        time.sleep(0.1)


def stub(rate: float = 50.0, lanes: int = 512, *, session_len: int = 4096, **options) -> list[str]:
    """The command of a whole server on a stub engine.  options: fields of ServerOptions."""
    settings = {"log_level": "warning", **options, "server_port": 0}
    given = [part for name, value in settings.items() for part in ("--option", f"{name}={value}")]
    return [
        "-m",
        "tests.serve.stub",
        "--rate",
        str(rate),
        "--lanes",
        str(lanes),
        "--session-len",
        str(session_len),
        *given,
    ]
