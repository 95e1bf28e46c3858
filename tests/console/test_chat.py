"""A conversation, typed: its commands from a file, its editing and Ctrl-C on a pseudo-terminal."""

import io
import signal
import sys
from pathlib import Path

import pytest
import torch

from prefloop.config import ChatConfig
from prefloop.console.chat import chat
from prefloop.console.reading import Reader
from prefloop.data.formats import load
from prefloop.labelling.export import read_records
from prefloop.records import Message, RowCounts
from tests.console.terminal import Typed
from tests.tiny import SPECIALS, tiny_model, tiny_tokenizer

SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of random weights that know a chat template; the first writes long answers."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def endless(folder):
    """A model that never ends an answer: its first channel is large in every state, and says no."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 50.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[: len(SPECIALS), 0] = -50.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def talk(models, typed, **settings):
    out = io.StringIO()
    given = {"model": str(models / "one"), "max_new_tokens": 8, "temperature": 0.0} | settings
    config = ChatConfig(dtype="float32", device="cpu", **given)
    chat(config, io.StringIO(typed), out)
    return out.getvalue().splitlines()


def read_back(path):
    """The conversations of a file that was saved, as `sft` reads them."""
    return [record.messages for record in load(str(path), "demonstration", RowCounts())]


def test_saved_conversations_are_rows_to_train_on(models, tmp_path):
    path = tmp_path / "talk.jsonl"
    said = talk(models, f"Hi\n/save {path}\n/system Be kind.\nthe boat\n/save {path}\n")
    first, second = read_back(path)
    assert [m.role for m in first] == ["user", "assistant"]
    assert [m.role for m in second] == ["system", "user", "assistant", "user", "assistant"]
    assert second[0] == Message("system", "Be kind.") and second[1:3] == first
    assert said[1] == f"(added to {path})"


def test_regenerate_answers_the_same_message_anew(models, tmp_path):
    path = tmp_path / "talk.jsonl"
    typed = f"/regenerate\nHi\n/save {path}\n/regenerate\n/save {path}\n"
    said = talk(models, typed, temperature=1.0)
    first, second = read_back(path)
    assert said[0] == "(there is no answer yet)"
    assert first[0] == second[0] and len(first) == len(second) == 2
    assert first[1] != second[1]  # drawn by the next number


def test_the_temperature_can_be_changed(models):
    """At 0 regenerating changes nothing."""
    said = talk(models, "/temperature 0\nHi\n/regenerate\n/temperature hot\n", temperature=1.0)
    assert said[0] == "(temperature: 0)"
    assert said[1] == said[2]
    assert said[3] == "(give a temperature of 0 or more, such as 0.7)"


def test_commands_that_are_none_and_messages_that_begin_so(models, tmp_path):
    path = tmp_path / "t.jsonl"
    said = talk(models, f"/sing\n /sing\n/save {path}\n/save rows.csv\n/help\n/quit\nHi\n")
    assert said[0] == "(no command /sing; /help lists them)"
    assert read_back(path)[0][0] == Message("user", "/sing")
    assert said[3] == "(give the name of a .jsonl file, once there is an answer)"
    assert said[4].startswith("/help ") and said[-1].startswith("two lines of three")  # /quit left


def test_messages_of_several_lines():
    typed = 'one\\\ntwo\n\n"""\nthree\n\n  four\n"""\nfive\n"""\nsix'
    with Reader(io.StringIO(typed), io.StringIO()) as reader:
        assert list(reader.messages()) == ["one\ntwo", "three\n\n  four", "five", "six"]


@pytest.mark.parametrize(("verdict", "tiers"), [("a", [[0], [1]]), ("B", [[1], [0]]), ("=", None)])
def test_a_verdict_is_a_preference_in_the_store(models, tmp_path, verdict, tiers):
    """And the better answer goes on; both were answers to the same conversation."""
    store, path = tmp_path / "labels.db", tmp_path / "t.jsonl"
    said = talk(
        models,
        f"/system Be kind.\nHi\nwhat\n{verdict}\n/save {path}\n",
        against=str(models / "two"),
        to_labels=f"{store}#talks",
        labeller="ann",
    )
    (_, _, user, answer) = (None, *read_back(path)[0])
    [ranking] = read_records(f"{store}#talks", "preference", RowCounts())
    assert [m.content for m in ranking.prompt] == ["Be kind.", "Hi"]
    texts = [c if isinstance(c, str) else c[0].content for c in ranking.completions]
    assert user.content == "Hi"
    if tiers is None:
        assert [sorted(tier) for tier in ranking.tiers] == [[0, 1]]
    else:
        assert [list(tier) for tier in ranking.tiers] in ([[0], [1]], [[1], [0]])
        assert texts[ranking.tiers[0][0]] == answer.content
    assert f"(stored in {store}#talks)" in said
    named = next(line for line in said if line.startswith("(A: "))
    assert named.endswith("; B goes on)" if verdict == "B" else "; A goes on)")


def test_who_is_a_and_who_is_b_changes(models):
    said = talk(models, "Hi\n\n" * 8, against=str(models / "two"))
    firsts = {line.split(",")[0] for line in said if line.startswith("(A: ")}
    assert firsts == {f"(A: {models / name}" for name in ("one", "two")}


def test_on_a_terminal(tmp_path):
    """Greeted; lines are edited, and known from last time; Ctrl-C stops the answer alone."""
    path, history = tmp_path / "t.jsonl", tmp_path / "prefloop" / "chat_history"
    history.parent.mkdir()
    history.write_text("from last time\n")
    model = str(endless(tmp_path / "model"))
    words = [sys.executable, "-m", "prefloop", "chat", "--model", model]
    words += ["--max-new-tokens", "3000", "--max-length", "4000", "--device", "cpu"]
    environment = {"PYTHONPATH": SOURCE, "XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with Typed(words, environment) as terminal:

        def stopped():
            """Once some of the answer stands there."""
            terminal.wait_for("\r\n")
            while len(terminal.shown) < terminal.read_to + 40:
                terminal.read(0.2)
            terminal.type("\x03")
            terminal.wait_for("(stopped)")
            terminal.wait_for("> ")

        assert f"{model}. (/quit or Ctrl-D leaves" in terminal.wait_for("> ")
        terminal.type("the cap\x7fb\n")  # backspace
        stopped()
        terminal.type("\x1b[A\x1b[A\n")  # up twice: the line of last time
        stopped()
        terminal.type("dropped")
        terminal.wait_for("dropped")  # read: Ctrl-C throws away what was not
        terminal.interrupt("(/quit or Ctrl-D leaves")
        terminal.type(f"/save {path}\n")
        terminal.wait_for("(added to ")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    messages = read_back(path)[0]
    assert [message.content for message in messages[::2]] == ["the cab", "from last time"]
    assert all(0 < len(message.content) < 3000 for message in messages[1::2])
    assert history.read_text().splitlines()[:2] == ["from last time", "the cab"]
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_while_the_input_is_no_terminal_ends_it(models):
    class Ends(io.StringIO):
        def readline(self, *size):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        chat(ChatConfig(model=str(models / "one"), device="cpu"), Ends(), io.StringIO())
