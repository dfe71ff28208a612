"""What long work says where there is no terminal."""

import pytest
from _progress import Lines, Pieces, counter


@pytest.fixture
def clock():
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


def test_a_line_a_minute(clock, capsys):
    bar = Lines("MMLU", "question", 1200, 60.0, clock)
    for _ in range(11):
        clock.now += 12
        bar.update(50)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "MMLU: 250 of 1,200 questions, about 4 minutes left",
        "MMLU: 500 of 1,200 questions, about 3 minutes left",
    ]


def test_short_work_and_the_end_of_long_work_say_nothing(clock, capsys):
    with Lines("x", "trial", 2, 60.0, clock) as bar:
        clock.now += 59
        bar.update(1)
        clock.now += 1000
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_bytes_and_what_is_said_behind(clock, capsys):
    bar = Lines("merging", "byte", 0, 60.0, clock)
    bar.reset(16_000_000_000)
    bar.set_postfix_str("shard 2")
    clock.now += 90
    bar.update(15_900_000_000)
    assert capsys.readouterr().err == "merging: 15.9 of 16.0 GB, shard 2, less than a minute left\n"


def test_operations(clock, capsys):
    bar = Lines("training", "FLOP", 3e15, 60.0, clock)
    clock.now += 120
    bar.update(1e15)
    assert capsys.readouterr().err == "training: 1,000.0 of 3,000.0 TFLOP, about 4 minutes left\n"


def test_pieces_have_their_own_speed_and_rest(clock):
    pieces = Pieces(clock)
    assert str(pieces) == ""
    pieces.advance("a", 4000, 7500)  # of a checkpoint: as if it had taken no time
    pieces.advance("b", 10, 7500)
    assert str(pieces) == "a 4,000/7,500, b 10/7,500"
    clock.now += 30  # of compiling
    pieces.advance("a", 10, 7500)
    pieces.advance("b", 10, 7500)
    clock.now += 60
    pieces.advance("a", 600, 7500)
    pieces.advance("b", 1200, 7500)
    assert str(pieces) == "a 4,610/7,500 (10.0/s, 5 min), b 1,220/7,500 (20.0/s, 5 min)"
    clock.now += 60
    pieces.advance("a", 2800, 7500)
    assert str(pieces).startswith("a 7,410/7,500 (28.3/s), b")  # three seconds are not worth telling
    pieces.finish("a")
    pieces.advance("a", 100, 7500)  # late
    assert str(pieces).startswith("b ")
    for name in "cdefg":
        pieces.advance(name, 1, 2)
    assert str(pieces).endswith("e 1/2 and 2 more")
    clock.now += 600
    pieces.advance("g", 0, 2)
    assert str(pieces) == "g 1/2"  # the others failed, or their processes are gone


def test_silent_where_it_is_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert counter("x", "trial", 2, quiet=False).every_s == 60
    assert counter("x", "trial", 2, quiet=True).every_s == float("inf")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert counter("x", "trial", 2, quiet=False).every_s == float("inf")
