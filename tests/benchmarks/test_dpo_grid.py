"""What benchmarks.dpo_grid makes of arms and results, and the prompts of recipe instructions."""

import json

import numpy as np
import pytest

from benchmarks import dpo_grid, instruction_prompts
from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.reports.statistics import paired_bootstrap
from strop.trainer.scoring.instructions import followed, given


def seed_of(**arms):
    """A seed's results: arm -> the correct prompts among a, b, c, ..., of as many as the string has characters."""
    return {arm: {"correct": {"test": {chr(97 + i): c == "1" for i, c in enumerate(right)}}}
            for arm, right in arms.items()}


def test_distinct_prompts_give_the_paired_bootstrap():
    new, old = "1101110111", "0101010101"
    found = dpo_grid.pooled({0: seed_of(dpo=new, sft=old)}, "dpo", "sft", "test")
    value, low, high = paired_bootstrap(*(np.array([c == "1" for c in side], float) for side in (new, old)),
                                        dpo_grid.RESAMPLES, 0)
    assert (found["gain"], found["low"], found["high"]) == pytest.approx((value, low, high), abs=1e-12)
    assert found["n"] == found["prompts"] == 10


def test_a_prompt_of_several_seeds_is_drawn_with_all_of_its_results():
    once = dpo_grid.pooled({0: seed_of(dpo="110", sft="000")}, "dpo", "sft", "test")
    again = dpo_grid.pooled(dict.fromkeys(range(5), seed_of(dpo="110", sft="000")), "dpo", "sft", "test")
    assert (again["n"], again["prompts"]) == (15, 3)  # the same results five times say no more than once
    assert [again[k] for k in ("gain", "low", "high")] == [once[k] for k in ("gain", "low", "high")]


def test_seeds_without_an_arm_do_not_count():
    seeds = {0: seed_of(dpo="11", sft="00"), 1: seed_of(sft="11")}
    assert dpo_grid.pooled(seeds, "dpo", "sft", "test")["n"] == 2


def test_arms_by_their_keys():
    arm = dpo_grid.arm_of("mine", ["dpo.lr=2.0e-5", "dpo.loss=ipo", "select.pairs_per_prompt=4"])
    assert arm == {"dpo": {"lr": 2e-5, "loss": "ipo"}, "select": {"pairs_per_prompt": 4}}
    for pairs in (["sample.k=3"], ["dpo=3"], ["sft.epochs=2", "dpo.lr=1.0e-5"]):
        with pytest.raises(UserError, match="--arm mine"):
            dpo_grid.arm_of("mine", pairs)
    with pytest.raises(ValueError, match="beta"):
        dpo_grid.changed(load_recipe("instructions").dpo, {"beta": -1})


def test_passes_count_training_three_times():
    stages = [{"kind": "samples", "counts": {"tokens": 1000}}, {"kind": "log-probs", "counts": {"tokens": 10}},
              {"kind": "training", "counts": {"tokens": 20}}]
    assert dpo_grid.passes(stages) == 70


def test_the_shipped_prompts_are_the_generated_ones():
    rows = [json.loads(line) for line in instruction_prompts.FILE.read_text().splitlines()]
    assert rows == instruction_prompts.rows()


def test_no_two_prompts_share_a_topic_and_the_rule_checks_each():
    rows, recipe = instruction_prompts.rows(), load_recipe("instructions")
    topics = [" ".join(topic.split()) for topic in instruction_prompts.TOPICS.split(",")]
    assert len(set(topics)) == len(topics) == len(rows) == len({row["prompt"] for row in rows})
    assert len(rows) >= recipe.data.validation + recipe.data.test + recipe.sample.prompts
    assert all(given(row) for row in rows)


@pytest.mark.parametrize(("instruction", "right", "wrong"), [
    ("Answer in one sentence. Do not use commas.", "Owls hunt at night.", "Owls, it seems, hunt at night."),
    ("Use between 8 and 20 words.", "Many people like them since they are quiet at night.", "They are quiet."),
    ("Answer in one sentence of at least 10 words.", "Many people like them since they are very quiet at night.",
     "Many people like them. They are very quiet when it is night."),
    ('Do not use the word "the".', "Owls hunt at night, and many of them sleep all day.",
     "Owls hunt in the night and many of them sleep all day."),
    ("Highlight one part with *asterisks*.", "Owls *hunt* at night, and many of them sleep all day.",
     "Owls hunt at night, and many of them sleep all day."),
])
def test_an_instruction_means_what_it_says(instruction, right, wrong):
    row = next(row for row in instruction_prompts.rows() if instruction in row["prompt"])
    assert all(followed(right, given(row), False)) and not all(followed(wrong, given(row), False))


def test_a_word_to_use_is_the_one_that_is_checked():
    for row in instruction_prompts.rows():
        words = [word for kwargs in row["kwargs"] for word in kwargs.get("keywords", ())]
        assert all(f'Use the word "{word}".' in row["prompt"] for word in words)
        assert bool(words) == ("Use the word" in row["prompt"])
