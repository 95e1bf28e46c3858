import io
import re
import time

from rich.console import Console

from prefloop.progress import Progress, in_words


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_without_a_terminal_a_line_comes_as_often_as_asked():
    out = console(terminal=False)
    with Progress("step", 10, done=2, every=0.05, console=out) as progress:
        progress.advance(4, "loss 1.5")
        time.sleep(0.3)
    lines = out.file.getvalue().splitlines()
    assert 2 <= len(lines) <= 6
    for line in lines:
        assert re.fullmatch(r"step 6/10 · 0 s gone · about 0 s left · loss 1\.5", line)


def test_without_a_terminal_short_work_says_nothing():
    out = console(terminal=False)
    with Progress("step", 1, console=out) as progress:
        progress.advance()
    assert out.file.getvalue() == ""


def test_lines_come_while_no_piece_is_done():
    """A judge that takes long over all answers at once, a step of minutes."""
    out = console(terminal=False)
    with Progress("judging", 3, every=0.05, console=out):
        time.sleep(0.15)
    assert out.file.getvalue().splitlines()[0] == "judging 0/3 · 0 s gone"


def test_time_left_is_that_of_the_pieces_done_since_the_beginning():
    """8 of 20 were done before; 2 pieces in a second leave 10 pieces, so 5 seconds."""
    now = iter([100.0, 101.0, 101.0])
    out = console(terminal=False)
    progress = Progress("step", 20, done=8, console=out, clock=lambda: next(now))
    progress.advance(2)
    assert progress.times() == "1 s gone · about 5 s left"


def test_a_terminal_gets_a_bar():
    out = console(terminal=True)
    with Progress("answers", 2, console=out) as progress:
        progress.advance(2, "note")
    shown = out.file.getvalue()
    assert "answers" in shown and "2/2" in shown and "0 s gone · note" in shown


def test_other_ranks_are_silent():
    for terminal in (True, False):
        out = console(terminal)
        with Progress("step", 2, shown=False, every=0.01, console=out) as progress:
            progress.advance()
            time.sleep(0.05)
        assert out.file.getvalue() == ""


def test_an_error_ends_the_lines():
    out = console(terminal=False)
    progress = Progress("step", 2, every=0.02, console=out)
    try:
        with progress:
            raise ValueError
    except ValueError:
        said = out.file.getvalue()
    time.sleep(0.1)
    assert out.file.getvalue() == said


def test_lengths_of_time():
    told = {0.4: "0 s", 59.6: "1 min 00 s", 3599: "59 min 59 s", 7320: "2 h 02 min"}
    assert {seconds: in_words(seconds) for seconds in told} == told
