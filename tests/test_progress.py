import sys

from jaxserve import progress as module
from jaxserve.progress import Clock, Lines, bar, stages


def test_a_line_after_a_bar_begins_where_the_bar_was(capsys):
    with stages(True) as progress:
        for what in ("compiling", "loading"):
            progress(what, 1, 3)
            progress(what, 3, 3)
            print(f"{what} is done", file=sys.stderr)
    said = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n") if line]
    assert said == ["compiling is done", "loading is done"]


def test_lines_in_the_place_of_bars(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with stages(Lines(lines.append)) as progress:
        progress("loading", 1 << 30, 2 << 30)
        now[0] = 12.0
        progress("loading", 3 << 29, 2 << 30)
        progress("loading", 2 << 30, 2 << 30)
        with bar(4, Lines(lines.append), desc="layers", unit=" layers") as shown:
            shown.update()
            now[0] = 15.0
    with bar(4, Lines(lines.append), desc="nothing"):
        pass
    assert lines == [
        "loading: 1.50 of 2.00 GiB after 12.0 s",
        "loading: 2.00 of 2.00 GiB after 12.0 s",
        "layers: 1 of 4 layers after 3.0 s",
    ]


def test_stages_that_come_again_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for seconds in (1.0, 2.5):
        with clock.stage("layers"):
            now[0] += seconds
    now[0] += 1
    assert str(clock) == "seconds: layers 3.5; 4.5 in all"
