"""What the server's processes write to standard error: lines for people, or one JSON object a line."""

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime

STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


class Json(logging.Formatter):
    """A record as one JSON object; what a caller gave as `extra` stands beside the rest."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        told |= {name: value for name, value in record.__dict__.items() if name not in STANDARD}
        return json.dumps(told, default=str, ensure_ascii=False)


def configure(level: str, style: str) -> None:
    """Sets up the log of this process.  level: debug, info, warning or error.  style: text or json."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(Json())
    else:
        where = " %(process)d %(name)s:" if level == "debug" else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s{where} %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("jaxserve").setLevel(level.upper())


class Ticker:
    """Writes one line every `every` seconds in which the engine had something to do, and notices an engine that hangs.

    `stats` is the door's (see `Door.stats`).
    """

    def __init__(self, stats, log: logging.Logger, *, every: float = 10.0, patience: float = 60.0, now=time.monotonic):
        """patience: seconds without a step, while requests run, after which the engine hangs."""
        self._stats, self._log, self._every, self._patience, self._now = stats, log, every, patience, now
        self._then, self._old = now(), stats()
        self._stepped = self._then
        self._steps = self._old["steps"]
        self._lock = threading.Lock()

    def look(self) -> bool:
        """To be called about every second.  Whether the engine hangs."""
        now, new = self._now(), self._stats()
        if new["steps"] != self._steps or not new["running"]:
            self._steps, self._stepped = new["steps"], now
        if now - self._then >= self._every:
            self._tell(new, now - self._then)
            self._then, self._old = now, new
        return now - self._stepped > self._patience

    def _tell(self, new, seconds):
        old = self._old
        if new["steps"] == old["steps"] and not new["running"] and not new["waiting"]:
            return
        prompt, made = (new[name] - old[name] for name in ("prompt_tokens", "generated_tokens"))
        hits, asked = new["cached_tokens"] - old["cached_tokens"], prompt
        if not asked:
            hits, asked = new["cached_tokens"], new["prompt_tokens"]
        pages = new["pages_used"] + new["pages_cached"] + new["pages_free"]
        told = {
            "running": new["running"],
            "waiting": new["waiting"],
            "prompt_tokens_per_second": round(prompt / seconds, 1),
            "generated_tokens_per_second": round(made / seconds, 1),
            "kv_cache_percent": round(100 * new["pages_used"] / pages, 1) if pages else 0.0,
            "prefix_hit_percent": round(100 * hits / asked, 1) if asked else 0.0,
        }
        self._log.info(
            "requests: %d running, %d waiting; tokens/s: %.1f of prompts, %.1f generated; KV cache %.0f %%, "
            "prefix hits %.0f %%",
            *told.values(),
            extra=told,
        )
