"""The run directory: what is written, how a run goes on, what it refuses."""

import json
import time

import pytest
import yaml

from prefloop.config import SFTConfig
from prefloop.errors import UserError
from prefloop.resume import flaw, seal
from prefloop.runs import Run, model_path, newest_checkpoint


def config(folder, **settings):
    return SFTConfig(model="m", data="d", output=folder / "run", **settings)


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run.directory / name).read_text().splitlines()]


def record(run):
    return json.loads((run.directory / "run.json").read_text())


def interrupted_after(folder, steps, saved=()):
    """A run that logged `steps` steps, left checkpoints, and was killed."""
    run = Run.open(config(folder), "sft")
    for step in range(1, steps + 1):
        run.log_metrics(step, {"loss": 1 / step})
        run.log_samples(step, [{"completion": "a"}, {"completion": "b"}])
    for step in saved:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.pt").write_bytes(b"abc")
        seal(run.checkpoint(step))
    return run


def test_a_new_run_writes_its_settings_and_provenance(tmp_path):
    run = Run.open(config(tmp_path, seed=7, lr=1e-4), "sft")
    stored = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert stored["lr"] == 1e-4
    assert stored["output"] == str(tmp_path / "run")
    found = record(run)
    assert (found["command"], found["status"], found["seed"]) == ("sft", "running", 7)
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    assert {"device", "platform", "revision", "started", "rows"} <= found.keys()
    assert run.resume_from is None
    assert not run.finished


def test_metrics_are_one_object_a_line_and_null_where_not_finite(tmp_path):
    run = Run.open(config(tmp_path), "sft")
    run.log_metrics(1, {"loss": 0.5})
    run.log_metrics(2, {"loss": float("nan"), "lr": float("inf")})
    run.log_samples(2, [{"prompt": "안녕", "score": 1.0}])
    assert lines(run) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "lr": None}]
    assert lines(run, "samples.jsonl") == [{"step": 2, "prompt": "안녕", "score": 1.0}]
    assert "안녕" in (run.directory / "samples.jsonl").read_text()


def test_the_end_is_recorded_with_cost_rows_and_tokens(tmp_path):
    run = Run.open(config(tmp_path), "sft")
    ballast = bytearray(200 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    run.set_rows({"read": 3, "used": 2, "dropped": {"too long": 1}})
    run.set_rows({"read": 1, "used": 1, "dropped": {}}, of="eval_data")
    run.finish("finished", tokens=99)
    found = record(run)
    assert (found["status"], found["tokens"]) == ("finished", 99)
    assert found["rows"]["data"]["dropped"] == {"too long": 1}
    assert found["rows"]["eval_data"]["read"] == 1
    assert 0.19 < found["peak_memory_gib"] < 8
    assert found["cpu_seconds"] > 0
    assert 0 < found["wall_seconds"] < 60


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (RuntimeError, "failed")],
)
def test_an_exception_decides_the_status(tmp_path, error, status):
    run = Run.open(config(tmp_path), "sft")
    with pytest.raises(error), run:
        raise error
    assert record(run)["status"] == status


def test_the_users_mistake_leaves_no_half_written_run(tmp_path):
    with pytest.raises(UserError), Run.open(config(tmp_path), "sft"):
        raise UserError("d:1: no rows")
    assert not (tmp_path / "run").exists()


def test_what_was_computed_before_a_mistake_stays(tmp_path):
    run = interrupted_after(tmp_path, 1)
    with pytest.raises(UserError), run:
        raise UserError("step 2: the loss is nan")
    assert record(run)["status"] == "failed"
    assert len(lines(run)) == 1


def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path):
    interrupted_after(tmp_path, 12, saved=(2, 9, 10))
    (tmp_path / "run" / "checkpoints" / ".step-11.tmp").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut short by kill -9
    run = Run.open(config(tmp_path), "sft")
    assert run.resume_from == run.checkpoint(10)
    run.go_on(10, logged=10)
    assert [line["step"] for line in lines(run)] == list(range(1, 11))
    assert len(lines(run, "samples.jsonl")) == 20
    assert record(run)["resumed"] == 1
    assert newest_checkpoint(run.directory) == run.checkpoint(10)


def test_a_checkpoint_knows_size_and_sha256_of_each_of_its_files(tmp_path):
    interrupted_after(tmp_path, 1, saved=(1,))
    folder = tmp_path / "run/checkpoints/step-1"
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"files": {"state.pt": {"bytes": 3, "sha256": of_abc}}}
    (folder / "rank").mkdir()
    (folder / "rank" / "1.bin").write_bytes(b"")
    assert flaw(folder) == ""  # a file that it does not name means nothing
    seal(folder)
    assert flaw(folder) == ""
    (folder / "rank" / "1.bin").unlink()
    assert flaw(folder) == "no rank/1.bin"


DAMAGED = {  # what happens to the newest checkpoint; what is said of it
    "flipped": (lambda at: (at / "state.pt").write_bytes(b"abb"), "state.pt has another sha256"),
    "torn": (lambda at: (at / "state.pt").write_bytes(b"ab"), "state.pt has 2 bytes, not 3"),
    "file lost": (lambda at: (at / "state.pt").unlink(), "no state.pt"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "no manifest.json"),
    "torn manifest": (lambda at: (at / "manifest.json").write_text('{"fi'), "cannot be read"),
    "other manifest": (lambda at: (at / "manifest.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_told_and_passed_over(name, tmp_path, capsys):
    damage, told = DAMAGED[name]
    interrupted_after(tmp_path, 3, saved=(1, 2, 3))
    damage(tmp_path / "run/checkpoints/step-3")
    damage(tmp_path / "run/checkpoints/step-2")
    run = Run.open(config(tmp_path), "sft")
    assert run.resume_from == run.checkpoint(1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert told in said[0]
    assert "step-3: " in said[0] and said[0].endswith(
        "; kept as damaged-step-3-1, the run goes on from step-1"
    )
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["damaged-step-2-1", "damaged-step-3-1", "step-1"]


def test_where_none_is_sound_the_run_begins_anew(tmp_path, capsys):
    """But not over one without a manifest, which may be an earlier version's."""
    interrupted_after(tmp_path, 3, saved=(2,))
    (tmp_path / "run/checkpoints/step-2/state.pt").write_bytes(b"")
    assert Run.open(config(tmp_path), "sft").resume_from is None
    assert "goes on from the start" in capsys.readouterr().err
    (tmp_path / "run/checkpoints/step-3").mkdir()
    with pytest.raises(UserError, match=r"step-3: no manifest.json, so it is torn, or made by an"):
        Run.open(config(tmp_path), "sft")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    interrupted_after(tmp_path, 3)
    run = Run.open(config(tmp_path), "sft")
    assert run.resume_from is None
    run.go_on(0, logged=0)
    assert lines(run) == []


def test_a_checkpoint_named_outright(tmp_path):
    interrupted_after(tmp_path, 12, saved=(5, 10))
    run = Run.open(config(tmp_path, resume=str(tmp_path / "run/checkpoints/step-5")), "sft")
    assert run.resume_from == run.checkpoint(5)
    assert lines(run)[-1]["step"] == 12  # nothing is lost before the checkpoint is found sound
    run.go_on(5, logged=5)
    assert lines(run)[-1]["step"] == 5
    assert newest_checkpoint(run.directory) == run.checkpoint(5)  # of the branch that goes on
    (run.checkpoint(5) / "state.pt").write_bytes(b"acc")
    with pytest.raises(UserError, match=r"step-5: state\.pt has another sha256 .* name another"):
        Run.open(config(tmp_path, resume=str(run.checkpoint(5))), "sft")
    with pytest.raises(UserError, match="no such checkpoint folder"):
        Run.open(config(tmp_path, resume="absent/step-1"), "sft")


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, capsys):
    run = interrupted_after(tmp_path, 3, saved=(2,))
    run.finish("finished")
    before = {p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()}
    again = Run.open(config(tmp_path), "sft")
    assert again.finished
    with again:
        pass
    assert "finished already" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_by_name(tmp_path):
    interrupted_after(tmp_path, 1)
    with pytest.raises(UserError, match=r"--batch-size was 64, now 8, --lr was 1e-05, now 0\.1"):
        Run.open(config(tmp_path, lr=0.1, batch_size=8), "sft")
    with pytest.raises(UserError, match="a run of `sft`, not of `dpo`"):
        Run.open(config(tmp_path), "dpo")
    Run.open(config(tmp_path, save_every=5, keep_checkpoints=9, track="none"), "sft")


def test_resume_never_refuses_a_directory_that_holds_a_run(tmp_path):
    Run.open(config(tmp_path, resume="never"), "sft")
    with pytest.raises(UserError, match="holds a run already"):
        Run.open(config(tmp_path, resume="never"), "sft")


def test_output_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run is no folder one can write to"):
        Run.open(config(tmp_path), "sft")


def test_a_broken_record_is_the_users_to_mend(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not a run's record"):
        Run.open(config(tmp_path), "sft")


def test_cost_adds_up_over_resumptions(tmp_path):
    first = Run.open(config(tmp_path), "sft")
    time.sleep(0.05)
    first.finish("interrupted")
    second = Run.open(config(tmp_path), "sft")
    time.sleep(0.05)
    second.finish("finished")
    assert record(second)["wall_seconds"] >= 0.1
    assert record(second)["cpu_seconds"] >= record(first)["cpu_seconds"]


def test_other_ranks_write_nothing(tmp_path):
    run = Run.open(config(tmp_path), "sft", writes=False)
    run.log_metrics(1, {"loss": 1.0})
    run.log_samples(1, [{"a": 1}])
    run.finish("finished")
    assert not run.directory.exists()


def test_model_path_takes_run_directories_folders_and_hub_ids(tmp_path):
    run = Run.open(config(tmp_path), "sft")
    assert model_path(str(run.directory)) == str(run.directory)
    run.model.mkdir()
    assert model_path(str(run.directory)) == str(run.model)
    assert model_path("owner/name") == "owner/name"


# --- what must not come to harm -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "config.yaml", "checkpoints"])
def test_a_new_run_writes_over_nothing_that_is_not_a_runs(name, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"holds {name}, and no run that it belongs to"):
        Run.open(config(tmp_path), "sft")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_run_killed_before_its_record_was_there_can_begin_again(tmp_path, monkeypatch):
    """It had written its settings, and other ones may be given then; a model there is kept."""

    class Killed(BaseException):
        pass

    def kill(run):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", kill)
        with pytest.raises(Killed):
            Run.open(config(tmp_path), "sft")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "config.yaml"}
    run = Run.open(config(tmp_path, seed=7), "sft")
    assert record(run)["seed"] == 7 and record(run)["resumed"] == 0
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["seed"] == 7
    del run
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(UserError, match="holds model, and no run that it belongs to"):
        Run.open(config(tmp_path), "sft")


def test_a_mistake_takes_back_only_what_the_run_wrote(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError), Run.open(config(tmp_path), "sft"):
        raise UserError("a bad row")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    Run.open(config(tmp_path, lr=0.1), "sft")  # other settings: there is no run to differ from


def test_a_mistake_through_a_symbolic_link_leaves_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(UserError), Run.open(config(tmp_path), "sft"):
        raise UserError("a bad row")
    assert list((tmp_path / "real").iterdir()) == []


def test_two_processes_do_not_write_one_run(tmp_path):
    with Run.open(config(tmp_path), "sft") as run:
        with pytest.raises(UserError, match="another process is writing this run"):
            Run.open(config(tmp_path), "sft")
        run.finish("interrupted")
    with Run.open(config(tmp_path), "sft") as again:
        assert again.record["resumed"] == 1


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    metrics = interrupted_after(tmp_path, 3, saved=(2,)).directory / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b'{"step": 2', b"\xff\xfe"))
    with pytest.raises(UserError, match=r"metrics\.jsonl: not a line of a run"):
        Run.open(config(tmp_path), "sft")
