"""Unpadded batches: index sets against a plain loop over the batch, and the way there and back."""

import pytest
import torch
from helpers import encoders
from hypothesis import given
from hypothesis import strategies as st

import fastgate
from fastgate.runtime.unpadding import unpad, unpad_full

CPU = torch.device("cpu")
flags = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b)] * 2
        )
    )
)


@given(flags, st.booleans(), st.booleans())
def test_index_sets(both, masked, has_outputs):
    attended, outputs = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    given_mask = attended if masked else None
    attended = attended if masked else torch.ones_like(attended)
    read_rows = outputs if has_outputs else attended
    unpadded = unpad(batch, length, given_mask, outputs if has_outputs else None, CPU)

    rows = [(b, t) for b in range(batch) for t in range(length) if attended[b, t] or read_rows[b, t]]
    keys = [r for r in rows if attended[r]]
    read = [r for r in rows if read_rows[r]]
    index = unpadded.row_index()
    assert index.tolist() == [b * length + t for b, t in rows]
    key_index = index if unpadded.key_rows is None else index[unpadded.key_rows]
    assert key_index.tolist() == [b * length + t for b, t in keys]
    assert unpadded.output_index().tolist() == [b * length + t for b, t in read]
    for ragged, members in ((unpadded.queries, rows), (unpadded.keys, keys), (unpadded.outputs, read)):
        lengths = [sum(b == row for row, _ in members) for b in range(batch)]
        assert list(ragged.lengths) == lengths and ragged.rows == len(members)
        assert ragged.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(batch + 1)]
    neighbours = [(b, t - 1) in keys and (b, t) in keys for b, t in rows]
    assert unpadded.has_left_neighbour.tolist() == unpadded.host_has_left_neighbour.tolist() == neighbours
    assert unpadded.has_other_rows == (len(read) < len(rows))
    assert unpadded.one_query_per_sequence == (
        unpadded.has_other_rows and all(n == 1 for n in unpadded.outputs.lengths)
    )


@given(flags, st.booleans(), st.integers(1, 3))
def test_rows_that_output_rows_are_computed_from(both, masked, halo):
    """Those up to `halo` tokens away over attended ones, neighbours as in the unpadded batch, and a token
    fewer to either side after each token shift, down to those that are read."""
    attended, outputs = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    unpadded = unpad(batch, length, attended if masked else None, outputs, CPU, halo)
    attended = attended if masked else torch.ones_like(attended)

    def beside(row, other, halo=halo):
        (b, t), (c, u) = row, other
        between = attended[b, min(t, u) : max(t, u) + 1]
        return b == c and (t == u or (abs(t - u) <= halo and bool(between.all())))

    read = [(b, t) for b in range(batch) for t in range(length) if outputs[b, t]]
    rows = [(b, t) for b in range(batch) for t in range(length) if attended[b, t] or outputs[b, t]]
    shrink_steps = [row for row in rows if any(beside(row, one) for one in read)]
    assert unpadded.output_index().tolist() == [b * length + t for b, t in shrink_steps]
    assert unpadded.has_halo == unpadded.has_other_rows == (len(shrink_steps) < len(rows))
    padded = torch.randn(batch, length, 3)
    left = unpadded.unpad(padded, output_rows_only=True)
    for k in range(halo - 1, -1, -1) if unpadded.has_halo else ():
        has_left_neighbour, nearer = unpadded.shrink_steps[k]
        hops = [
            (b, t - 1) in shrink_steps and bool(attended[b, t] & attended[b, t - 1]) for b, t in shrink_steps
        ]
        assert has_left_neighbour.tolist() == hops and unpadded.rows_within_halo[k + 1] == len(shrink_steps)
        kept = [row for row in shrink_steps if any(beside(row, one, k) for one in read)]
        assert [shrink_steps[i] for i in nearer] == kept and unpadded.rows_within_halo[k] == len(kept)
        shrink_steps, left = kept, left[nearer]
    back = unpadded.pad(left, output_rows_only=True)
    assert torch.equal(back[outputs], padded[outputs])
    if unpadded.has_other_rows:
        assert not back[~outputs].any()


@given(flags)
def test_there_and_back(both):
    attended, outputs = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    unpadded = unpad(batch, length, attended, outputs, CPU)
    padded = torch.randn(batch, length, 3)
    kept = (attended | outputs)[..., None]
    assert torch.equal(unpadded.pad(unpadded.unpad(padded), output_rows_only=False), padded * kept)
    assert torch.equal(
        unpadded.pad(unpadded.unpad(padded, output_rows_only=True), output_rows_only=True),
        padded * outputs[..., None],
    )


def test_a_batch_without_padding_is_not_indexed():
    unpadded = unpad(2, 5, torch.ones(2, 5, dtype=torch.bool), None, CPU)
    assert unpadded.index is None and unpadded.key_rows is None and unpadded.output_rows is None
    padded = torch.randn(2, 5, 3)
    assert unpadded.unpad(padded).data_ptr() == padded.data_ptr()


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_padding_is_packed_once(first):
    outputs = torch.arange(5).expand(2, 5) == 0 if first else None
    made, expected = unpad_full(2, 5, first, False), unpad(2, 5, None, outputs, CPU)
    assert unpad_full(2, 5, first, False) is made
    assert unpad_full(2, 5, first, True) is not made
    assert (made.queries, made.keys, made.outputs) == (expected.queries, expected.keys, expected.outputs)
    assert made.has_other_rows is first and made.index is None and made.key_rows is None
    if first:
        assert torch.equal(made.output_rows, expected.output_rows)


def test_training_may_follow_inference_on_a_batch_of_the_same_shape():
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    batch = encoders.batch(model, "ForSequenceClassification", lengths=(14, 14))
    with torch.inference_mode():
        model(**batch)
    model.train()(**batch).logits.sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad is not None
