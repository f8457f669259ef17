"""Packed rows: index sets against a plain loop over the batch, and the way there and back."""

import pytest
import torch
from helpers import encoders
from hypothesis import given
from hypothesis import strategies as st

import fastgate
from fastgate.runtime.unpadding import pack_rows, unpadded

CPU = torch.device("cpu")
flags = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b)] * 2
        )
    )
)


@given(flags, st.booleans(), st.booleans())
def test_index_sets(both, masked, demands):
    attended, demanded = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    given_mask = attended if masked else None
    attended = attended if masked else torch.ones_like(attended)
    wanted = demanded if demands else attended
    packing = pack_rows(batch, length, given_mask, demanded if demands else None, CPU)

    rows = [(b, t) for b in range(batch) for t in range(length) if attended[b, t] or wanted[b, t]]
    keys = [r for r in rows if attended[r]]
    read = [r for r in rows if wanted[r]]
    index = packing.packed_index()
    assert index.tolist() == [b * length + t for b, t in rows]
    key_index = index if packing.key_rows is None else index[packing.key_rows]
    assert key_index.tolist() == [b * length + t for b, t in keys]
    assert packing.wanted_index().tolist() == [b * length + t for b, t in read]
    for ragged, members in ((packing.queries, rows), (packing.keys, keys), (packing.wanted, read)):
        lengths = [sum(b == row for row, _ in members) for b in range(batch)]
        assert list(ragged.lengths) == lengths and ragged.rows == len(members)
        assert ragged.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(batch + 1)]
    neighbours = [(b, t - 1) in keys and (b, t) in keys for b, t in rows]
    assert packing.linked.tolist() == packing.host_linked.tolist() == neighbours
    assert packing.narrow == (len(read) < len(rows))
    assert packing.single == (packing.narrow and all(n == 1 for n in packing.wanted.lengths))


@given(flags, st.booleans(), st.integers(1, 3))
def test_rows_that_demanded_ones_are_computed_from(both, masked, reach):
    """Those up to `reach` tokens away over attended ones, linked among themselves as the packed rows are, and
    a token fewer to either side after each shift, down to those that are read."""
    attended, demanded = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    packing = pack_rows(batch, length, attended if masked else None, demanded, CPU, reach)
    attended = attended if masked else torch.ones_like(attended)

    def beside(row, other, reach=reach):
        (b, t), (c, u) = row, other
        between = attended[b, min(t, u) : max(t, u) + 1]
        return b == c and (t == u or (abs(t - u) <= reach and bool(between.all())))

    read = [(b, t) for b in range(batch) for t in range(length) if demanded[b, t]]
    rows = [(b, t) for b in range(batch) for t in range(length) if attended[b, t] or demanded[b, t]]
    near = [row for row in rows if any(beside(row, one) for one in read)]
    assert packing.wanted_index().tolist() == [b * length + t for b, t in near]
    assert packing.widened == packing.narrow == (len(near) < len(rows))
    padded = torch.randn(batch, length, 3)
    left = packing.pack(padded, narrow=True)
    for k in range(reach - 1, -1, -1) if packing.widened else ():
        linked, nearer = packing.near[k]
        links = [(b, t - 1) in near and bool(attended[b, t] & attended[b, t - 1]) for b, t in near]
        assert linked.tolist() == links and packing.within[k + 1] == len(near)
        kept = [row for row in near if any(beside(row, one, k) for one in read)]
        assert [near[i] for i in nearer] == kept and packing.within[k] == len(kept)
        near, left = kept, left[nearer]
    back = packing.pad(left, narrow=True)
    assert torch.equal(back[demanded], padded[demanded])
    if packing.narrow:
        assert not back[~demanded].any()


@given(flags)
def test_there_and_back(both):
    attended, demanded = (torch.tensor(f) for f in both)
    batch, length = attended.shape
    packing = pack_rows(batch, length, attended, demanded, CPU)
    padded = torch.randn(batch, length, 3)
    kept = (attended | demanded)[..., None]
    assert torch.equal(packing.pad(packing.pack(padded), narrow=False), padded * kept)
    assert torch.equal(
        packing.pad(packing.pack(padded, narrow=True), narrow=True), padded * demanded[..., None]
    )


def test_a_batch_without_padding_is_not_indexed():
    packing = pack_rows(2, 5, torch.ones(2, 5, dtype=torch.bool), None, CPU)
    assert packing.index is None and packing.key_rows is None and packing.wanted_rows is None
    padded = torch.randn(2, 5, 3)
    assert packing.pack(padded).data_ptr() == padded.data_ptr()


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_padding_is_packed_once(first):
    demanded = torch.arange(5).expand(2, 5) == 0 if first else None
    made, expected = unpadded(2, 5, first, False), pack_rows(2, 5, None, demanded, CPU)
    assert unpadded(2, 5, first, False) is made
    assert unpadded(2, 5, first, True) is not made
    assert (made.queries, made.keys, made.wanted) == (expected.queries, expected.keys, expected.wanted)
    assert made.narrow is first and made.index is None and made.key_rows is None
    if first:
        assert torch.equal(made.wanted_rows, expected.wanted_rows)


def test_training_may_follow_inference_on_a_batch_of_the_same_shape():
    model = fastgate.patch(encoders.make("Bert", "ForSequenceClassification"))
    batch = encoders.batch(model, "ForSequenceClassification", lengths=(14, 14))
    with torch.inference_mode():
        model(**batch)
    model.train()(**batch).logits.sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad is not None
