import pytest
import torch

from strop.kernels import Group, PackedGroups

GROUPS = [
    Group([1, 2, 3], [[4, 5], [6], [7, 8, 9]]),
    Group([], [[1, 2], [3, 4, 5]]),
    Group([9, 9], [[2, 3, 4]], [[True, False, True]]),
]


def test_rows_and_predictors():
    g = PackedGroups.pack(GROUPS)
    assert g.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 9, 9, 2, 3, 4]
    assert g.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    # The prompt's last row predicts the first token of all three completions.
    assert g.pred_index.tolist() == [2, 3, 2, 2, 6, 7, 9, 11, 12, 15, 17]
    assert g.target.tolist() == [4, 5, 6, 7, 8, 9, 2, 4, 5, 2, 4]
    assert g.target_segment.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5]
    assert g.target_bounds == ((0, 2), (2, 3), (3, 6), (6, 7), (7, 9), (9, 11))
    assert g.prompt_bounds == ((0, 3), (9, 9), (14, 16))
    assert g.completion_bounds == ((3, 5), (5, 6), (6, 9), (9, 11), (11, 14), (16, 19))
    assert g.completion_group == (0, 0, 0, 1, 1, 2)
    assert (g.num_tokens, g.num_completions, g.num_targets) == (19, 6, 11)
    dtypes = (g.input_ids.dtype, g.position_ids.dtype, g.pred_index.dtype, g.target.dtype, g.target_segment.dtype)
    assert dtypes == (torch.int64,) * 4 + (torch.int32,)


def test_to_moves_every_tensor():
    g = PackedGroups.pack(GROUPS).to("meta")
    assert {t.device.type for t in (g.input_ids, g.position_ids, g.pred_index, g.target, g.target_segment)} == {"meta"}
    assert PackedGroups.pack(GROUPS, device="meta").target.device.type == "meta"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([Group([1], [])], "group 0 has no completions"),
        ([Group([1], [[2]]), Group([1], [[2], []])], "group 1, completion 1 is empty"),
        ([Group([1], [[2]], [])], "1 completions but 0 loss masks"),
        ([Group([1], [[2, 3]], [[True]])], "2 tokens but 1 mask entries"),
        ([Group([1, -100], [[2]])], "negative token id -100 at row offset 1"),
    ],
)
def test_malformed_groups_raise(groups: list[Group], message: str):
    with pytest.raises(ValueError, match=message):
        PackedGroups.pack(groups)


def test_a_fully_masked_completion_has_an_empty_slice():
    g = PackedGroups.pack([Group([1], [[2, 3], [4]], [[False, False], [True]])])
    assert g.target_bounds == ((0, 0), (0, 1))
    assert g.pred_index.tolist() == [0]


def test_two_masks_select_the_union_of_their_tokens():
    one = Group([5], [[6, 7, 8], [9, 10]], [[True, False, False], [True, True]], [[False, True, False], [True, False]])
    two = Group([], [[3, 4]], [[True, True]])
    g = PackedGroups.pack([one, two])
    assert g.target.tolist() == [6, 7, 9, 10, 4]  # nothing predicts the first token after an empty prompt
    assert g.loss_mask.tolist() == [True, False, True, True, True]
    assert g.nll_mask.tolist() == [False, True, True, False, True]
    assert g.to("meta").nll_mask.is_meta and PackedGroups.pack([two]).nll_mask is None
    with pytest.raises(ValueError, match="group 0 has 1 completions but 2 NLL masks"):
        PackedGroups.pack([Group([5], [[6]], None, [[True], [True]])])
