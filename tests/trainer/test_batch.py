from hypothesis import given
from hypothesis import strategies as st

from strop.kernels import Group
from strop.trainer.batch import Example, microbatches, pack, plan_steps, share_out


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


def test_ranks_together_do_what_one_rank_does():
    rows = examples(17)
    indices = list(range(17))
    one = {tuple(m) for m in microbatches(rows, indices, 16, 0, 1)}
    three = [tuple(m) for r in range(3) for m in microbatches(rows, indices, 16, r, 3)]
    assert set(three) == one and len(three) == len(one)


def test_fingerprint_tells_tokens_and_masks_apart():
    a = Example("a", Group([1], [[2, 3], [4]], [[True, True], [True]]))
    same = Example("b", Group([1], [[2, 3], [4]], [[True, True], [True]]))
    mask = Example("a", Group([1], [[2, 3], [4]], [[True, False], [True]]))
    moved = Example("a", Group([1, 2], [[3], [4]], [[True], [True]]))
    assert a.fingerprint() == same.fingerprint()
    assert len({a.fingerprint(), mask.fingerprint(), moved.fingerprint()}) == 3
    assert a.targets() == [2, 1] and mask.targets() == [1, 1]
    assert Example("e", Group([], [[2, 3]])).targets() == [1]
