"""A large set with a few rows that say nothing."""

import json

ROWS = ["--kind", "preference", "--data", "rows.jsonl"]


def test_check_tells_all_bad_rows_at_once(models, case, prefloop):
    told = prefloop("check", "--model", models / "chatml", *ROWS)
    assert told.code == 2
    assert "read 9 rows, used 6" in told.out
    for line, what in (("3", "are equal"), ("5", "empty answer"), ("8", "`rejected` (null)")):
        assert [x for x in told.out.splitlines() if f"rows.jsonl:{line}: " in x and what in x]
    assert told.err.count("\n") == 1
    assert "2 more bad rows" in told.err


def test_check_counts_what_drop_would_leave_out(models, case, prefloop):
    told = prefloop("check", "--model", models / "chatml", *ROWS, "--bad-rows", "drop")
    assert told.code == 0
    assert "1 (bad row: `chosen` is an empty answer)" in told.out


def test_check_tells_the_first_ten_of_many(models, case, prefloop):
    good = (case / "rows.jsonl").read_text().splitlines()[0]
    (case / "many.jsonl").write_text("\n".join([good, "{", *["{}"] * 20]) + "\n")
    told = prefloop("check", "--model", models / "chatml", "--data", "many.jsonl")
    assert told.code == 2
    assert told.out.count("bad row: ") == 10 + told.out.count("(bad row: ")
    assert "21 in all" in told.out


def test_check_tells_rows_too_long_with_the_others(models, case, prefloop):
    both = (case / "rows.jsonl").read_text() + (case / "long.jsonl").read_text()
    (case / "both.jsonl").write_text(both)
    told = prefloop(
        "check", "--model", models / "chatml", "--data", "both.jsonl", "--max-length", 40
    )
    assert told.code == 2
    assert "both.jsonl:3" in told.out
    assert "over the limit of 40" in told.out


def test_a_pair_equal_once_cut_is_dropped_and_counted(models, case, prefloop):
    words = ["--data", "long.jsonl", "--max-length", 40, "--truncation", "right"]
    told = prefloop("check", "--model", models / "chatml", *words)
    assert told.code == 0
    assert "nothing left to learn once cut" in told.out


def train(prefloop, models, *words):
    common = ["--model", models / "chatml", "--output", "run", "--device", "cpu", "--batch-size", 3]
    return prefloop("dpo", *common, "--data", "rows.jsonl", "--max-steps", 1, *words)


def test_training_stops_at_a_bad_row_by_default(models, case, prefloop):
    told = train(prefloop, models)
    assert told.code == 2
    assert "rows.jsonl:3: " in told.err
    assert not (case / "run").exists()


def test_training_drops_counts_and_lists_bad_rows(models, case, prefloop):
    with (case / "rows.jsonl").open("ab") as file:
        file.write(b'{"prompt": \n[1]\n\xff\xfe\n')
    told = train(prefloop, models, "--bad-rows", "drop")
    assert told.code == 0, told.err
    assert "read 12 rows, used 6" in told.err
    counts = json.loads((case / "run/run.json").read_text())["rows"]["data"]
    assert counts["read"] == 12
    assert sum(counts["dropped"].values()) == 6
    listed = [json.loads(x) for x in (case / "run/bad_rows.jsonl").read_text().splitlines()]
    assert [x["line"] for x in listed] == [f"rows.jsonl:{n}" for n in (3, 5, 8, 10, 11, 12)]
    assert "not UTF-8" in listed[-1]["reason"]
    assert {x["of"] for x in listed} == {"data"}


def test_rows_that_are_only_too_long_are_not_bad(models, case, prefloop):
    told = train(prefloop, models, "--bad-rows", "drop", "--max-length", 20)
    assert told.code == 2
    assert "--truncation" in told.err
    assert not (case / "run").exists()
