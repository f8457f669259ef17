"""`shift`, the replacement that reads neighbours: its definition, the rows it keeps alive, that neither
padding nor the choice of output rows changes a value, and what else runs a pruned model."""

import copy

import pytest
import torch
from helpers.encoders import LENGTH, LENGTHS, VECTORS, batch, draw_replacements, make, padded
from helpers.executed_steps import KEPT_STEPS, SKIPPED_STEPS, steps_as_they_run

import fastgate
from fastgate.benchmark.equivalence import check_outputs
from fastgate.benchmark.model_variants import unpruned
from fastgate.errors import FastgateError
from fastgate.models.handle import get_encoder
from fastgate.nn.replacement import make_replacement
from fastgate.runtime.unpadding import UnpaddedBatch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
SHIFTED = ("shift_norm", *SKIPPED_STEPS)


def pruned(head, keep, kind="shift", family="Bert", layers=5):
    model = fastgate.patch(make(family, head, layers=layers))
    return draw_replacements(fastgate.prune(model, keep=keep, replacement=kind))


def test_r_by_hand():
    """Two sequences of 3 and 2 tokens and a row of neither: x[i] + 10 x[i - 1] + 100 x[i + 1] + 1000."""
    r = make_replacement("shift", 1)
    assert [name for name, _ in r.named_parameters()] == list(VECTORS["shift"]) and not any(
        p.any() for p in r.parameters()
    )
    with torch.no_grad():
        for vector, value in zip(r.parameters(), (1000.0, 1.0, 10.0, 100.0), strict=True):
            vector.fill_(value)
        rows = torch.tensor([1.0, 2, 3, 4, 5, float("nan")])[:, None]
        has_left_neighbour = torch.tensor([False, True, True, False, True, False])
        assert r(rows, has_left_neighbour)[:5, 0].tolist() == [1201.0, 1312.0, 1023.0, 1504.0, 1045.0]
        assert r(rows[:0], has_left_neighbour[:0]).shape == (0, 1)
        rows[2] = float("inf")  # of another sequence
        assert r(rows, has_left_neighbour)[3:5, 0].tolist() == [1504.0, 1045.0]


@pytest.mark.parametrize("keep", [[0], [1, 3], [4], [], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_steps_and_rows_as_they_run(keep, head):
    """A tagger reads all rows. A classifier reads one a sequence: above its last attention that row and those
    that the shifts still above look at; with none there the attention is absorbed."""
    model = pruned(head, keep)
    seen = steps_as_they_run(model, batch(model, head))
    packed, one = sum(LENGTHS), head == "ForSequenceClassification"
    top = max(keep, default=-1) if one else 5
    live = [packed if i < top else sum(min(n, 5 - i) for n in LENGTHS) for i in range(-1, 5)]
    assert seen[0] == (-1, "embed", live[0])
    steps = []
    for i in range(5):
        ops = tuple(op for layer, op, _ in seen if layer == i)
        rows = {n for layer, _, n in seen if layer == i}
        kept = ("project_query", "absorbed_attention", *KEPT_STEPS[2:]) if i == top == 4 else KEPT_STEPS
        steps.append(kept if i in keep else SHIFTED)
        assert ops == steps[i] and rows == {live[i + 1]}
    told = fastgate.explain(model, LENGTHS)
    assert [row.live_rows for row in told.layers] == live[1:]
    assert [row.steps for row in told.layers] == steps
    assert told.output_rows == (len(LENGTHS) if one else packed)
    assert str(told).count("replaced by shift") == 5 - len(keep)


@torch.no_grad()
def test_shifts_in_some_layers():
    """Layers 3 and 4 have nothing in place of their attention: three tokens are enough in layer 0, two above
    the first shift, one above the second."""
    head = "ForSequenceClassification"
    model = fastgate.patch(make("Bert", head, layers=5))
    state = get_encoder(model)
    state.add_replacements("shift", layers=[1, 2])
    draw_replacements(model)
    state.set_gates([1.0, 0.0, 0.0, 0.0, 0.0])
    inputs = batch(model, head)
    seen = steps_as_they_run(model, inputs)
    rows = [{n for layer, _, n in seen if layer == i} for i in range(5)]
    assert rows == [{3 + 3 + 3 + 1}, {2 + 2 + 2 + 1}, *[{4}] * 3]
    assert [op for layer, op, _ in seen if layer == 3] == list(SKIPPED_STEPS)
    whole = model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=1e-5)


def masks(inputs):
    """Padded on the right, on the left, with holes, nothing attended in one sequence, in all, no padding."""
    right = inputs["attention_mask"]
    holes, one, none = right.clone(), right.clone(), torch.zeros_like(right)
    holes[0, 3:5] = holes[1, 0] = holes[1, 4] = 0
    one[1] = 0
    return right, right.flip(1), holes, one, none, torch.ones_like(right)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [[0], [2], []], ids=str)
@pytest.mark.parametrize("pooled", [True, False])
@torch.no_grad()
def test_what_is_read_equals_the_padded_computation(keep, pooled):
    """For every choice of output rows, token 0 that is read though it is masked among them."""
    model = make("Bert", "Model", attention="eager")
    if not pooled:
        model.pooler = None
    ours = fastgate.patch(copy.deepcopy(model))
    state = get_encoder(ours)
    state.add_replacements("shift")
    draw_replacements(ours)
    gates = [float(i in keep) for i in range(3)]
    state.set_gates(gates)
    inputs = batch(model, "Model")
    vectors = [dict(state.replacement(i).named_parameters()) for i in range(3)]
    some = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(3)) < 0.2
    for mask in masks(inputs):
        given = inputs | {"attention_mask": mask}
        want = padded(model, given, gates, vectors)
        whole = torch.ones_like(some)
        first = torch.arange(LENGTH).expand_as(some) == 0
        for demand, options, read in (
            ("all", {}, mask.bool()),
            ("first", {}, first),
            ("first", {"rows": some}, some),
            ("all", {"rows": some}, some),
            ("all", {"output_hidden_states": True}, whole),
        ):
            got = fastgate.patch(ours, demand=demand)(**given, **options).last_hidden_state
            read = read | first if pooled else read
            torch.testing.assert_close(got[read], want[read], rtol=0, atol=1e-5)
            assert not got[~read].any()


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForMaskedLM", "ForTokenClassification"])
@torch.no_grad()
def test_padding_changes_nothing(head):
    """Also under a head that reads the padding."""
    model = pruned(head, [1], family="Roberta", layers=3)
    inputs = batch(model, head)
    outputs = model(**inputs)
    for i, n in enumerate(LENGTHS):
        alone = model(**{name: t[i : i + 1, :n] for name, t in inputs.items()})
        for name, value in alone.items():
            torch.testing.assert_close(outputs[name][i, :n], value[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_training_are_those_of_every_row(checkpointing, soft):
    """Rows nobody reads have none: the same gradients as with all of them computed; recomputed ones too."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    head = "ForSequenceClassification"
    model = fastgate.patch(make("Bert", head, **options)).train()
    state = get_encoder(model)
    state.add_replacements("shift")
    draw_replacements(model)
    inputs, found = batch(model, head, "left", labels=True), []
    for whole in (False, True):
        gate = torch.tensor(0.4, requires_grad=True)
        state.set_gates([1.0, 0.0, gate if soft else 0.0])
        if checkpointing and not whole:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, output_hidden_states=whole).loss.backward()
        found.append({"gate": gate.grad} | {n: p.grad for n, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
    for name, grad in found[1].items():
        assert (grad is None) == (found[0][name] is None), name
        if grad is not None:
            torch.testing.assert_close(found[0][name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("soft", [False, True])
def test_autocast(soft):
    model = fastgate.patch(make("Bert", "ForSequenceClassification"))
    state = get_encoder(model)
    state.add_replacements("shift")
    draw_replacements(model)
    state.set_gates([1.0, 0.0, torch.tensor(0.5) if soft else 0.0])
    inputs = batch(model, "ForSequenceClassification")
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs).logits
    rounded.square().sum().backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    assert all(state.replacement(1).get_parameter(name).grad.isfinite().all() for name in VECTORS["shift"])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_bench_holds_every_kind_to_hugging_faces_modules(head, kind, side):
    model = pruned(head, [0], kind)
    inputs = batch(model, head, side)
    reference = unpruned(model)
    assert check_outputs(model, reference, [inputs, inputs | {"attention_mask": masks(inputs)[2]}]) < 1e-5


def test_bench_sees_wrong_neighbours(monkeypatch):
    model = pruned("ForTokenClassification", [0])
    inputs, reference = batch(model, "ForTokenClassification"), unpruned(model)
    monkeypatch.setattr(
        UnpaddedBatch,
        "has_left_neighbour",
        property(lambda unpadded: unpadded.host_has_left_neighbour.roll(1)),
    )
    with pytest.raises(FastgateError, match="logits"):
        check_outputs(model, reference, [inputs])


@torch.no_grad()
def test_frozen_below_a_shift_every_product_is_packed():
    """No attention is absorbed there, so none is left plain for that."""
    model = pruned("ForSequenceClassification", [1], layers=3)
    inputs = batch(model, "ForSequenceClassification", "left")
    want = model(**inputs).logits
    frozen = fastgate.freeze(model)
    plain = [n for n, module in frozen.named_modules() if type(module) is torch.nn.Linear]
    assert not plain
    torch.testing.assert_close(frozen(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    last = fastgate.freeze(pruned("ForSequenceClassification", [2], layers=3))
    assert type(last.bert.encoder.layer[2].attention.self.key) is torch.nn.Linear
    assert "absorbed_attention" in fastgate.explain(last).layers[2].steps


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("keep", [[], [0], [1, 2], [3]], ids=str)
@torch.no_grad()
def test_rows_beside_those_read_are_enough(keep, freezes):
    """Logits are those of every row computed, which a recording one does, for every mask; rows that are not
    read come back as zeros."""
    head = "ForSequenceClassification"
    model = pruned(head, keep)
    inputs = batch(model, head)
    wants = []
    with get_encoder(model).record() as record:
        for mask in masks(inputs):
            wants.append(model(**inputs | {"attention_mask": mask}).logits)
            assert record.hidden[-2][1].shape[0] >= int(mask.sum())
    model = fastgate.freeze(model) if freezes else model
    for mask, want in zip(masks(inputs), wants, strict=True):
        given = inputs | {"attention_mask": mask}
        torch.testing.assert_close(model(**given).logits, want, rtol=1e-5, atol=1e-5)
        assert not model.bert(**given).last_hidden_state[:, 1:].any()
