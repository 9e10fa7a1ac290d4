import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import recipe_of, select_of, stage_in

from strop.kernels import Group
from strop.trainer.stages.reference import first_looks
from strop.trainer.stages.sft import load_examples
from strop.trainer.training.batch import (
    Example,
    Packing,
    collate,
    microbatches,
    pack,
    pack_evenly,
    plan_steps,
    share_out,
)
from strop.trainer.training.flops import Sizes, training_flops
from strop.trainer.training.pairs import load_pairs

BUDGET = 8192
LLAMA_1B = Sizes(body=973_000_000, head=2048 * 128_256, width=16 * 32 * 64)


def ultrafeedback_like(n, seed=0):
    """Pairs with the lengths of UltraFeedback's: log-normal, prompts of 130 tokens in the median (spread e^0.95, up to
    3,000), completions of 280 (spread e^0.8, up to 2,048)."""
    draw = random.Random(seed)

    def length(median, spread, most):
        return max(5, min(most, round(median * math.exp(spread * draw.gauss(0, 1)))))

    return [Example(str(i), Group([1] * length(130, 0.95, 3000), [[2] * length(280, 0.8, 2048) for _ in range(2)]))
            for i in range(n)]


def examples(n, weight=1.0):
    return [Example(str(i), Group([1] * (i % 7 + 1), [[2] * (i % 5 + 1)]), weight) for i in range(n)]


def test_every_row_is_seen_once_an_epoch_in_a_new_order():
    plan = plan_steps(examples(23), epochs=2, batch_size=5, seed=3)
    order = [i for step in plan for i in step]
    assert sorted(order[:23]) == sorted(order[23:]) == list(range(23))
    assert order[:23] != order[23:]
    assert plan == plan_steps(examples(23), 2, 5, seed=3)
    assert plan != plan_steps(examples(23), 2, 5, seed=4)


def test_half_an_epoch_and_half_a_weight():
    assert sum(map(len, plan_steps(examples(20), 0.5, 4, 0))) == 10
    drawn = sum(map(len, plan_steps(examples(400, weight=0.5), 1, 4, 0)))
    assert 160 < drawn < 240
    assert sum(map(len, plan_steps(examples(20, weight=3.0), 1, 4, 0))) == 60


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 200))
def test_packs_hold_everything_once_within_the_budget(lengths, budget):
    bins = pack(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    # best-fit decreasing never leaves two bins that would fit into one
    loads = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 5))
def test_shares_are_disjoint_and_whole(costs, ranks):
    shares = share_out(costs, ranks)
    assert len(shares) == ranks and sorted(i for s in shares for i in s) == list(range(len(costs)))


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 200))
def test_even_packs_are_no_more_and_none_is_larger(lengths, budget):
    even, greedy = pack_evenly(lengths, budget), pack(lengths, budget)
    assert sorted(i for b in even for i in b) == list(range(len(lengths))) and len(even) <= len(greedy)
    assert max((sum(lengths[i] for i in b) for b in even), default=0) <= \
        max((sum(lengths[i] for i in b) for b in greedy), default=0)


def test_even_packs_leave_no_small_one_over():
    assert sorted(sum([10] * len(b)) for b in pack([10] * 9, 80)) == [10, 80]
    assert sorted(sum([10] * len(b)) for b in pack_evenly([10] * 9, 80)) == [40, 50]


def test_ranks_together_do_what_one_rank_does():
    rows, indices = examples(17), [3, 1, 4, 1, 5, 9, 2, 6, 11, 16, 0]
    costs = [training_flops(LLAMA_1B, row) for row in rows]
    for ranks in (1, 2, 3, 20):
        shares = microbatches(rows, indices, costs, 16, ranks)
        assert len(shares) == ranks and shares == microbatches(rows, indices, costs, 16, ranks)
        assert sorted(i for share in shares for m in share for i in m) == sorted(indices)
        assert all(sum(rows[i].tokens for i in m) <= 16 for share in shares for m in share)


@pytest.mark.parametrize("batch_size", [32, 64, 256])
def test_packing_efficiency_on_lengths_like_ultrafeedbacks(batch_size):
    """At an 8k budget: at least 97 % of the room of every step's microbatches, which are as few as they can be; the
    whole set packed at once fills 97 % of the budget itself."""
    rows = ultrafeedback_like(2000)
    costs = [training_flops(LLAMA_1B, row) for row in rows]
    whole = pack([row.tokens for row in rows], BUDGET)
    assert sum(row.tokens for row in rows) / len(whole) / BUDGET >= 0.97
    packing, more, steps = Packing(rows, costs, BUDGET), 0, plan_steps(rows, 1, batch_size, 0)
    for step in steps:
        shares = microbatches(rows, step, costs, BUDGET, 1)
        packing.add(shares)
        more += len(shares[0]) - math.ceil(sum(rows[i].tokens for i in step) / BUDGET)
    values = packing.values()
    assert values["packing_efficiency"] >= 0.97 and more <= 0.02 * packing.microbatches
    assert values["packing_fill"] > 1 - len(steps) / packing.microbatches, "less than a microbatch is lost a step"
    assert values["rank_balance"] == 1.0


def test_ranks_are_balanced_by_flops_not_by_tokens():
    rows = ultrafeedback_like(1024)
    short = Example("short", Group([1], [[2] * 3, [2] * 3]))
    rows += [short] * 400 + [Example("long", Group([1] * 7000, [[2], [3]]))] * 8
    costs = [training_flops(LLAMA_1B, row) for row in rows]
    packing = Packing(rows, costs, BUDGET)
    for step in plan_steps(rows, 1, 128, 0):
        packing.add(microbatches(rows, step, costs, BUDGET, 4))
    assert packing.values()["rank_balance"] > 0.98 and packing.values()["packing_efficiency"] >= 0.97
    # attention grows with the square of the length, so that equal tokens are not equal work
    long, many = Example("l", Group([1] * 4000, [[2] * 4000])), [Example("m", Group([1] * 100, [[2] * 100]))] * 40
    assert long.tokens == sum(e.tokens for e in many)
    assert training_flops(LLAMA_1B, long) > 1.2 * sum(training_flops(LLAMA_1B, e) for e in many)


def test_flops_count_a_shared_prompt_once_and_the_head_on_targets_only():
    example = Example("e", Group([1] * 5, [[2] * 3, [2] * 2], [[True] * 3, [False, True]]))
    pairs = 15 + (6 + 15) + (3 + 10)
    assert training_flops(Sizes(7, 11, 13), example) == 3 * (2 * 7 * 10 + 2 * 11 * 4 + 4 * 13 * pairs)


def test_first_looks_are_the_plans_own_microbatches():
    """Every pair is scored once, in the microbatch in which training sees it first; what it never sees comes last."""
    rows = [Example(str(i), Group([1] * (i % 7 + 1), [[2] * (i % 5 + 1), [3]]), weight)
            for i, weight in enumerate([1.0] * 20 + [0.25] * 20 + [2.0] * 5)]
    costs = [training_flops(LLAMA_1B, row) for row in rows]
    for ranks in (1, 3):
        for epochs in (0.5, 1.0, 2.0):
            plan = plan_steps(rows, epochs, 8, 0)
            looks = first_looks(rows, plan, costs, 30, ranks)
            kept = [indices[j] for share in looks for indices, places in share for j in places]
            assert sorted(kept) == list(range(len(rows)))
            trained = {(rank, tuple(m)) for step in plan
                       for rank, share in enumerate(microbatches(rows, step, costs, 30, ranks)) for m in share}
            seen = {i for step in plan for i in step}
            for rank, share in enumerate(looks):
                for indices, _ in share:
                    assert (rank, tuple(indices)) in trained or not seen & set(indices)


def test_a_group_over_the_budget_is_dropped_with_a_reason_never_cut(tmp_path):
    select = select_of(tmp_path / "select", 12)
    stage = stage_in(tmp_path / "dpo", "dpo")
    pairs = load_pairs(stage, select / "pairs.parquet", recipe_of(dpo={"max_tokens": 16}).dpo, 512, record=True)
    whole = load_pairs(stage_in(tmp_path / "all", "dpo"), select / "pairs.parquet", recipe_of().dpo, 512, record=False)
    assert pairs == [p for p in whole if p.tokens <= 16] and 0 < len(pairs) < len(whole)
    assert stage.counts == {"dropped/overlong": len(whole) - len(pairs)}
    stage = stage_in(tmp_path / "sft", "sft")
    rows = load_examples(stage, select / "sft.parquet", 12)
    assert all(row.tokens <= 12 for row in rows) and stage.counts == {"dropped/overlong": 12 - len(rows)} != {}
    with pytest.raises(AssertionError):
        pack([21], 20)


def test_a_packed_row_holds_the_tokens_of_its_examples_and_nothing_else():
    rows = examples(9)
    groups = collate(rows, [4, 2, 7], torch.device("cpu"))
    assert groups.num_tokens == sum(rows[i].tokens for i in (4, 2, 7))
    assert groups.num_targets == sum(sum(rows[i].targets()) for i in (4, 2, 7))


def test_fingerprint_tells_tokens_and_masks_apart():
    a = Example("a", Group([1], [[2, 3], [4]], [[True, True], [True]]))
    same = Example("b", Group([1], [[2, 3], [4]], [[True, True], [True]]))
    mask = Example("a", Group([1], [[2, 3], [4]], [[True, False], [True]]))
    moved = Example("a", Group([1, 2], [[3], [4]], [[True], [True]]))
    assert a.fingerprint() == same.fingerprint()
    assert len({a.fingerprint(), mask.fingerprint(), moved.fingerprint()}) == 3
    assert a.targets() == [2, 1] and mask.targets() == [1, 1]
    assert Example("e", Group([], [[2, 3]])).targets() == [1]
