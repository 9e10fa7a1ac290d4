"""An error that is no user's mistake keeps its traceback; a user's mistake is one line; what is done is kept."""

import errno

import pytest
import torch

from strop.trainer.errors import UserError
from strop.trainer.main import main


def lengths_differ(*_):
    return list(zip([1], [1, 2], strict=True))


def fails_with(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


FAILURES = [
    (lengths_differ, "ValueError: zip() argument 2 is longer than argument 1", "a bug in Strop or in a library"),
    (fails_with(ValueError("no such thing")), "ValueError: no such thing", "a bug in Strop or in a library"),
    (fails_with(KeyError("row_id")), "KeyError: 'row_id'", "a bug in Strop or in a library"),
    (fails_with(AssertionError()), "AssertionError", "a bug in Strop or in a library"),
    (fails_with(torch.OutOfMemoryError("Tried to allocate")), "OutOfMemoryError: Tried to allocate", "out of memory"),
    (lambda *_: torch.empty(1 << 60), "can't allocate memory", "out of memory"),
    (fails_with(UserError("data.jsonl:3: answer: mend it")), None, "data.jsonl:3: answer: mend it"),
    (fails_with(FileNotFoundError(errno.ENOENT, "No such file or directory", "data.jsonl")), None,
     "data.jsonl: No such file or directory"),
]


def test_a_bug_keeps_its_traceback_and_says_what_is_safe(tiny_recipe, tmp_path, capfd):
    """One after the other in the same run, which goes on from what the one before has left."""
    run_dir, command, kept = tmp_path / "runs/tiny", [str(tiny_recipe), "rounds=1"], {}
    for fails, shown, said in FAILURES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("strop.trainer.stages.score.score_rows", fails)
            code = main(command)
        text = capfd.readouterr().err
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1, text
        if shown is None:
            assert "Traceback" not in text and errors == [f"error: {said}"]
        else:
            assert "Traceback (most recent call last)" in text and shown in text and "stages/score.py" in text
            assert errors == [
                f"error: {said} (traceback above); completed stages are kept, and the same command resumes"]
        assert text.endswith(errors[0] + "\n")
        found = {p: p.read_bytes() for p in run_dir.rglob("manifest.json")}
        assert {p.parent.name for p in found} == {"prompts", "baseline-held-out", "baseline", "sample"}
        kept = kept or found
        assert found == kept, said
    assert main(command) == 0
    assert all(p.read_bytes() == before for p, before in kept.items()) and (run_dir / "final").exists()


@pytest.mark.parametrize("error", [ValueError("no such thing"), UserError("mend it")], ids=repr)
def test_debug_raises_both(tiny_recipe, monkeypatch, error):
    monkeypatch.setattr("strop.trainer.methods.running.train", fails_with(error))
    with pytest.raises(type(error), match=str(error)):
        main([str(tiny_recipe), "--debug"])
