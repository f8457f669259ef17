"""Private names of other libraries: they are in one place, and `patch` says which of them are missing."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from helpers.encoders import FAMILIES, batch, make
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

import fastgate
from fastgate.models import compat
from fastgate.nn import transformers_names
from fastgate.ops import torch_compat

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastgate"
COMPAT = {
    "models/compat.py",
    "nn/transformers_names.py",
    "ops/torch_compat.py",
    "pruning/trainer_compat.py",
    "training/trainer_compat.py",
}
# Private names of transformers and torch, which the files of COMPAT alone may have.
PRIVATE = (
    "output_capturing",
    "GELUActivation",
    "_gradient_checkpointing_func",
    "make_inputs_require_grads",
    "enable_input_require_grads",
    "can_return_tuple",
    "BertForPreTrainingOutput",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "MaskedLMOutput",
    "ALL_ATTENTION_FUNCTIONS",
    "eager_attention_forward",
    "_attn_implementation_internal",
    "_create_attention_masks",
    "create_position_ids_from_input_ids",
    "create_position_ids_from_inputs_embeds",
    "all_tied_weights_keys",
    "_hf_peft_config_loaded",
    "_model_mapping",
    "modeling_auto",
    "TOKENIZER_MAPPING",
    "transformers_weights",
    "modeling_bert",
    "_len_torch_dispatch_stack",
    "peek_interpreter_stack",
    "is_legacy_batchedtensor",
    "_current_level",
    "_DropoutNd",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# What else may name one, and why.
ALLOWED = {
    ("models/checkpoint_structure.py", "_forward_pre_hooks"): "an attribute that every module has",
}


@pytest.fixture
def unchecked():
    """The next `patch` looks every name up."""
    compat.check.cache_clear()
    yield
    compat.check.cache_clear()


def sources():
    paths = (path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}


def test_private_names_are_in_the_compat_files_alone():
    word = re.compile(r"(?<!compat\.)\b(" + "|".join(PRIVATE) + r")\b")
    uses = {
        (name, match[1])
        for name, text in sources().items()
        if name not in COMPAT
        for match in word.finditer(text)
    }
    assert uses <= set(ALLOWED), "use it by way of a compat file, which checks that it is there"


def test_transformers_is_imported_by_its_public_names():
    """Nothing is imported from the modules of transformers but in the compat files."""
    allowed = {
        ("training/model.py", "transformers.utils"),
        ("training/phases.py", "transformers.trainer_callback"),
    }
    imports = set()
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imports |= {(name, m) for m in modules if m.startswith(("transformers.", "accelerate."))}
    assert {pair for pair in imports if pair[0] not in COMPAT} <= allowed


def test_nothing_is_missing_here(unchecked):
    before = torch.get_rng_state()
    compat.check()
    assert torch.equal(torch.get_rng_state(), before)


def test_names_are_looked_up_once(unchecked, monkeypatch):
    fastgate.patch(make("Bert", "Model"))
    monkeypatch.setattr(compat, "_missing_in_transformers", lambda: pytest.fail("looked up again"))
    fastgate.patch(make("Bert", "Model"))


def _without_scaling(monkeypatch):
    initialise = modeling_bert.BertSelfAttention.__init__

    def init(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        del self.scaling

    monkeypatch.setattr(modeling_bert.BertSelfAttention, "__init__", init)


def _other_gradient_hook(monkeypatch):
    def enable_input_require_grads(self):
        def require_grads(module, inputs, output):
            output.requires_grad_(True)

        self.get_input_embeddings().register_forward_hook(require_grads)

    monkeypatch.setattr(
        transformers.PreTrainedModel, "enable_input_require_grads", enable_input_require_grads
    )


MISSING = {
    "modeling_bert.BertSelfOutput": lambda patch: patch.delattr(modeling_bert, "BertSelfOutput"),
    "modeling_roberta.eager_attention_forward": lambda patch: patch.delattr(
        modeling_roberta, "eager_attention_forward"
    ),
    "BertLayer().attention.self.scaling": _without_scaling,
    "enable_input_require_grads with make_inputs_require_grads": _other_gradient_hook,
    "PreTrainedModel._hf_peft_config_loaded": lambda patch: patch.delattr(
        transformers.integrations.PeftAdapterMixin, "_hf_peft_config_loaded"
    ),
    "RobertaEmbeddings().create_position_ids_from_input_ids": lambda patch: patch.delattr(
        modeling_roberta.RobertaEmbeddings, "create_position_ids_from_input_ids"
    ),
    "torch.nn.modules.dropout._DropoutNd": lambda patch: patch.delattr(nn.modules.dropout, "_DropoutNd"),
    "torch.Tensor._version": lambda patch: patch.setitem(
        torch_compat.ATTRIBUTES, torch.Tensor, ("_version", "_version_of_old")
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_name_is_one_clear_error_at_patch(name, unchecked, monkeypatch):
    model = make("Bert", "ForSequenceClassification")
    cls = type(model)
    MISSING[name](monkeypatch)
    library = name.partition(".")[0] if name.startswith("torch") else "transformers"
    with pytest.raises(fastgate.Unsupported) as error:
        fastgate.patch(model)
    message = str(error.value)
    assert name in message or name == "torch.Tensor._version"
    assert f"{library} {version(library)}" in message
    assert f'"{library}{compat.TESTED[library]}"' in message
    assert type(model) is cls and not hasattr(model.bert, "fastgate_runtime")
    monkeypatch.undo()
    fastgate.patch(model)


def test_a_name_that_is_missing_at_import_raises_when_it_is_called():
    missing = torch_compat.look_up("torch.nn.functional.no_such_function")
    assert isinstance(missing, torch_compat.MissingName)
    assert isinstance(torch_compat.look_up("no_such_library.name"), torch_compat.MissingName)
    with pytest.raises(fastgate.Unsupported, match=r"torch\.nn\.functional\.no_such_function"):
        missing(1)


def test_names_in_code_are_found_and_others_are_not():
    method = transformers.PreTrainedModel.enable_input_require_grads
    assert compat._mentions(method, "make_inputs_require_grads")
    assert not compat._mentions(method, "make_inputs_require_gradients")
    assert not compat._mentions(torch_compat.MissingName("torch.x"), "x")


def test_tested_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for library, versions in compat.TESTED.items():
        assert f'"{library}{versions}"' in text


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_transformers(family):
    model = make(family, "Model")
    inputs = batch(model, "Model")
    ids, seen = inputs["input_ids"], []
    hook = model.embeddings.position_embeddings.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    embeds = model.get_input_embeddings()(ids)
    model(input_ids=ids)
    model(inputs_embeds=embeds)
    hook.remove()
    for want, call in zip(seen, ((ids, None), (None, embeds)), strict=True):
        assert torch.equal(
            compat.position_ids_of(model.embeddings, *call).expand_as(ids), want.expand_as(ids)
        )


def test_hooks_and_activations_of_transformers_are_known():
    model = make("Bert", "Model")
    model.enable_input_require_grads()
    (hook,) = model.embeddings.word_embeddings._forward_hooks.values()
    assert compat.requires_gradients(hook) and not compat.requires_gradients(print)
    gelu = transformers.activations.GELUActivation()
    assert transformers_names.wrapped_gelu(gelu) is nn.functional.gelu
    assert transformers_names.wrapped_gelu(nn.GELU()) is None
    model.train().gradient_checkpointing_enable()
    layer = model.encoder.layer[0]
    assert transformers_names.is_checkpointed(layer)
    assert transformers_names.checkpoint_function(layer) is layer._gradient_checkpointing_func
    assert compat.attention_of(model.config, "bert")[0] == "sdpa"
    model.set_attn_implementation("eager")
    assert compat.attention_of(model.config, "bert") == ("eager", modeling_bert.eager_attention_forward)
