"""One digest for the same weights, however their files are laid out."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from prefloop.errors import UserError
from prefloop.provenance import files_digest, written_files

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(5, dtype=torch.bfloat16),
}


def folder_of(path, tensors=TENSORS, **options):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", **options)
    return path


def sharded(path, tensors=TENSORS):
    path.mkdir()
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def test_the_digest_by_hand(tmp_path):
    """0..5 as float32 and ones (0x3f80) as bfloat16, in the order of their names."""
    six = b"".join(
        bytes.fromhex(x) for x in "00000000 0000803f 00000040 00004040 00008040 0000a040".split()
    )
    lines = [
        f"a BF16 [5] {hashlib.sha256(bytes.fromhex('803f') * 5).hexdigest()}\n",
        f"b.weight F32 [2, 3] {hashlib.sha256(six).hexdigest()}\n",
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert files_digest(folder_of(tmp_path / "model")) == expected


def test_place_shards_and_metadata_change_nothing(tmp_path):
    whole = files_digest(folder_of(tmp_path / "whole"))
    assert files_digest(str(sharded(tmp_path / "sharded"))) == whole
    assert files_digest(folder_of(tmp_path / "other", metadata={"format": "pt"})) == whole
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    assert files_digest(tmp_path / "link") == whole
    # What Transformers does not read is not part of the weights.
    save_file({"c": torch.ones(1)}, tmp_path / "sharded" / "consolidated.safetensors")
    assert files_digest(tmp_path / "sharded") == whole


@pytest.mark.parametrize(
    "other",
    [
        TENSORS | {"a": torch.tensor([1.0, 1, 1, 1, 2]).bfloat16()},
        TENSORS | {"a": torch.ones(5, dtype=torch.bfloat16).view(torch.float16)},
        TENSORS | {"b.weight": TENSORS["b.weight"].reshape(3, 2)},
        {"a": TENSORS["a"], "b": TENSORS["b.weight"]},
        {"a": TENSORS["a"]},
    ],
    ids=["an element", "type", "shape", "name", "one less"],
)
def test_other_weights_have_another(other, tmp_path):
    assert files_digest(folder_of(tmp_path / "a")) != files_digest(folder_of(tmp_path / "b", other))


def test_a_file_is_read_once_until_it_changes(tmp_path):
    """Bytes that change behind an unchanged size and time are not seen: nothing is read again."""
    file = folder_of(tmp_path / "model") / "model.safetensors"
    before, time = files_digest(tmp_path / "model"), file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    os.utime(file, ns=(time, time))
    assert files_digest(tmp_path / "model") == before
    os.utime(file, ns=(time, time + 1))
    assert files_digest(tmp_path / "model") != before


def test_a_file_that_is_not_as_its_run_wrote_it_is_told(tmp_path):
    """The digest by hand of `a` alone, in the record of the run that holds the folder."""
    shards = sharded(tmp_path / "model")
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    line = f"a BF16 [5] {hashlib.sha256(bytes.fromhex('803f') * 5).hexdigest()}\n"
    written = written_files([shards, tmp_path / "value_model"])
    assert sorted(written["model"]) == names
    assert written["model"][names[1]] == hashlib.sha256(line.encode()).hexdigest()
    record = {"status": "finished", "weights": written}
    (tmp_path / "run.json").write_text(json.dumps(record))
    before = files_digest(shards)
    file = shards / names[1]
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match=f"{names[1]}: not as .*run.json says that it was written"):
        files_digest(shards)
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert files_digest(shards) != before  # it may be writing the next ones
    (tmp_path / "run.json").write_text("[]")
    assert files_digest(shards) != before


def test_folders_without_weights_and_broken_files(tmp_path):
    assert files_digest(tmp_path) == files_digest(tmp_path / "absent") == ""
    file = folder_of(tmp_path / "model") / "model.safetensors"
    for number, data in enumerate(
        (b"", b"\xff" * 9, b"\x02" + bytes(7) + b"[]", file.read_bytes()[:-1])
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / f"{number}.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="not a safetensors file"):
            files_digest(tmp_path / "broken")
