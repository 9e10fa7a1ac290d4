"""The table that compares forms of the optimizer's state."""

from benchmarks import optimizer_state


def stage(*correct: bool, loss: float = 1.0) -> dict:
    return {"correct": {f"p{i}": value for i, value in enumerate(correct)}, "loss": loss, "steps": 4, "seconds": 2.0}


def test_gains_are_over_float32_by_prompt_and_seed():
    seeds = {seed: {"float32": {"sft": stage(True, False), "dpo": stage(True, False, True, False)},
                    "int8": {"sft": stage(True, True, loss=3.0), "dpo": stage(True, True, seed == 0, False)}}
             for seed in (0, 1)}
    rows = optimizer_state.report(seeds)
    assert rows["float32"]["gain"] == rows["float32"]["low"] == rows["float32"]["high"] == 0
    assert rows["int8"]["gain"] == 1 / 8 and rows["int8"]["low"] < 0 < rows["int8"]["high"]
    assert rows["int8"]["sft"] == {"pass_rate": 1.0, "loss": 3.0, "steps": 4, "seconds": 2.0}


def test_forms_are_keys_of_both_sections():
    from strop.trainer.config import Dpo, Sft

    for keys in optimizer_state.FORMS.values():
        Sft(**keys), Dpo(**keys)
