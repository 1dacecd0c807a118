"""The order of Megatron's fused attention, against the loop that defines it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.row_orders import GroupHeads


@given(kv_heads=st.integers(1, 4), per=st.integers(1, 4), head_dim=st.integers(1, 3), columns=st.integers(1, 3))
def test_groups_hold_their_heads(kv_heads: int, per: int, head_dim: int, columns: int) -> None:
    heads = per * kv_heads
    rows = (heads + 2 * kv_heads) * head_dim
    array = np.arange(rows * columns).reshape(rows, columns)
    q, k, v = np.split(array, [heads * head_dim, (heads + kv_heads) * head_dim])
    expected = []
    for group in range(kv_heads):
        expected += [q[group * per * head_dim : (group + 1) * per * head_dim]]
        expected += [part[group * head_dim : (group + 1) * head_dim] for part in (k, v)]
    operation = GroupHeads(heads, kv_heads, head_dim)
    grouped = operation.apply([array])
    assert np.array_equal(grouped, np.concatenate(expected))
    assert operation.shape([array.shape]) == array.shape
    assert np.array_equal(operation.undo().apply([grouped]), array)
    assert operation.undo().undo() == operation


def test_rows_of_another_number_and_heads_that_do_not_divide() -> None:
    for operation, rows in ((GroupHeads(4, 2, 6), 47), (GroupHeads(3, 2, 2), 14)):
        with pytest.raises(ValueError, match="of a tensor of shape"):
            operation.shape([(rows, 3)])
    assert str(GroupHeads(4, 2, 6)) == "rows of q, k, v to 4 heads in 2 groups"
    assert str(GroupHeads(4, 2, 6).undo()) == "rows from 4 heads in 2 groups to q, k, v"
