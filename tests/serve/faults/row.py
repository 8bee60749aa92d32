"""A row of the table: what is done to a server, what it must answer, and how that is judged."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tests.serve.faults.target import CHAT, COMPLETION, Reply, Streams, Target

Check = Callable[[Target], Iterable[str | None]]


@dataclass(frozen=True)
class Row:
    """check: does it to a server, and gives what was wrong, None where nothing was; None: no client can do it.

    needs: what it takes beside a URL: "key" (the server asks for one), "limit" (the requests that it takes at once),
    "room" (a context for a text of a megabyte).  tests: which tests show it, as file::name under tests/.
    """

    number: int
    fault: str
    expected: str
    check: Check | None = None
    needs: str = ""
    tests: tuple[str, ...] = ()


@dataclass
class Result:
    """How a row went; seconds: what was measured, or those of the slowest answer."""

    row: Row
    wrong: list[str]
    got: str
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.wrong


def judge(row: Row, target: Target, streams: Streams | None) -> Result:
    """Does a row to a server while streams run beside it, and asks for one answer more."""
    assert row.check is not None
    target.begin()
    wrong = []
    differing: list[str] = []
    if streams is None:
        wrong += filter(None, row.check(target))
    else:
        with streams.beside(patient=row.needs == "limit") as differing:
            wrong += filter(None, row.check(target))
    got, seconds = outcome(target.seen), max(target.took or [reply.seconds for reply in target.seen], default=0.0)
    if fault := target.alive():
        wrong.append(fault)
    return Result(row, wrong + differing, got, seconds)


def outcome(replies: Iterable[Reply]) -> str:
    """Statuses and how often: "400 x4, closed"."""
    counts = Counter(str(reply.status or "closed") for reply in replies)
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in sorted(counts.items()))


# What checks are made of --------------------------------------------------------------------------------------------


def fault(
    target: Target, what: str, reply: Reply, *statuses: int, param: str | None = None, within: float | None = None
) -> str | None:
    """What is wrong with an answer; an error must have OpenAI's envelope.

    param: the parameter that an error names.  within: seconds, beside those of any good answer where it is one.
    """
    if reply.status not in statuses:
        return f"{what}: {reply}, not {' or '.join(map(str, statuses))}"
    if reply.status >= 400 and reply.error is None:
        return f"{what}: no error in an envelope: {reply}"
    if reply.status >= 400 and param and param not in str(reply.error["param"]).split("."):
        return f"{what}: the error names {reply.error.get('param')}, not {param}: {reply.error['message']}"
    if within is not None and reply.seconds > within * target.slack + (target.usual if reply.status < 400 else 0):
        return f"{what}: {reply.seconds:.3f} s, not {within} s"
    return None


@dataclass
class Case:
    """One body, made only when it is sent."""

    name: str
    body: dict | Callable[[], dict | bytes]
    statuses: tuple[int, ...] = (400,)
    param: str | None = None
    within: float | None = None
    path: str = CHAT
    more: dict = field(default_factory=dict)


def cases(*some: Case) -> Check:
    """A check that sends one body after the other."""

    def check(target: Target) -> Iterator[str | None]:
        for case in some:
            body = case.body() if callable(case.body) else case.body
            if isinstance(body, bytes):
                reply = target.post(case.path, body)
            else:
                reply = (target.chat if case.path == CHAT else target.complete)(**body)
            yield fault(target, case.name, reply, *case.statuses, param=case.param, within=case.within)

    return check


def values(name: str, *given, statuses=(400,), path: str = CHAT, named: bool = True, **beside) -> list[Case]:
    """Cases for one parameter; named: the error says which it is."""
    param = name if named else None
    return [Case(f"{name} {value!r:.40}", {name: value} | beside, statuses, param, path=path) for value in given]


def both(name: str, *given, **options) -> list[Case]:
    """The same for chats and for completions."""
    return values(name, *given, **options) + values(name, *given, path=COMPLETION, **options)
