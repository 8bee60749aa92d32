import sys

from jaxserve.progress import stages


def test_a_line_after_a_bar_begins_where_the_bar_was(capsys):
    with stages(True) as progress:
        for what in ("compiling", "loading"):
            progress(what, 1, 3)
            progress(what, 3, 3)
            print(f"{what} is done", file=sys.stderr)
    said = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n") if line]
    assert said == ["compiling is done", "loading is done"]
