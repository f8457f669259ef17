"""`from_pretrained` and `save_pretrained` of patched models, and the Auto classes of transformers.

A patched model is of a class of swapped_classes.py. Its `save_pretrained` writes fastgate's format where
a model of transformers would compute something else from the weights. Its `from_pretrained` builds the pruned
model, so that transformers' own code fills in the weights, and raises where that code would only warn.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fastgate.errors import ArgumentError, CheckpointError, Unsupported, format_error
from fastgate.models import atomic_files, compat
from fastgate.models.architectures import base_class, find_encoders
from fastgate.models.checkpoint import layout_of, unused_names, write_pruned
from fastgate.models.checkpoint_config import KEY, MODEL_TYPES, PRUNED, is_pruned, read_layout
from fastgate.models.checkpoint_files import META, verify
from fastgate.models.handle import EncoderHandle, get_encoder
from fastgate.models.patching import SaveWrapper
from fastgate.models.swapped_classes import SWAPPED, is_swapped

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_ENCODER_NAME = re.compile(r"(^|\.)(embeddings|encoder)\.")  # weights that no loader may draw anew


@classmethod  # type: ignore[misc]
def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """As in transformers. A pruned model comes back pruned, and what does not fit it is an error.

    Raises CheckpointError for a folder whose files were not saved together, an unfinished model, and weights
    of the encoder that are missing, unknown or of another shape.
    """
    inherited = super(cls, cls).from_pretrained
    name = pretrained_model_name_or_path
    hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    folder = _local(name, hub)
    if folder is not None:
        _finish(folder)
    config: Any = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        source = name if config is None else config
        config = None if source is None else AutoConfig.from_pretrained(source, **hub)
        if is_pruned(config):
            kwargs.pop("config", None)
            config, kwargs = _overridden(config, kwargs)
    if not is_pruned(config):
        return inherited(name, *args, **kwargs)
    read_layout(getattr(config, KEY, None), f"{name}/config.json", config.num_hidden_layers)
    if folder is not None:
        verify(folder)
    config = copy.deepcopy(config)
    setattr(config, compat.WEIGHTS_ENTRY, None)  # the notice that stops the classes of transformers
    with_info = kwargs.pop("output_loading_info", False)
    model, info = inherited(name, *args, **{**kwargs, "config": config, "output_loading_info": True})
    _check_info(model, info, config, str(name), bool(kwargs.get("ignore_mismatched_sizes")))
    return (model, info) if with_info else model


def _overridden(config: PreTrainedConfig, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Arguments that are entries of the config override them; the others are left, as in transformers."""
    names = [name for name in kwargs if hasattr(config, name) and name not in ("dtype", "torch_dtype")]
    for name in names:
        setattr(config, name, kwargs[name])
    return config, {name: value for name, value in kwargs.items() if name not in names}


def _local(name: Any, hub: dict[str, Any]) -> Path | None:
    if not isinstance(name, str | os.PathLike) or not os.path.isdir(name):
        return None
    return Path(os.fsdecode(name), hub.get("subfolder") or "")


def _finish(folder: Path) -> None:
    """Complete a save that was interrupted: what transformers reads next must be all old or all new."""
    if not atomic_files.is_interrupted(folder):
        return
    try:
        atomic_files.finish(folder)
    except OSError as error:
        remedy = "read it with fastgate.load, or make the folder writable"
        got = f"the files of a save that was interrupted ({error})"
        wanted = "a whole checkpoint"
        raise CheckpointError(format_error("from_pretrained", str(folder), got, wanted, remedy)) from error
    got = "a save that was interrupted and is complete now"
    raise CheckpointError(
        format_error("from_pretrained", str(folder), got, "a whole checkpoint", "load it again")
    )


def _check_info(model: Any, info: dict[str, Any], config: Any, name: str, resized: bool) -> None:
    """Raise where transformers warns: always for the encoder, for a head if it is the one that was saved."""
    same_head = (config.architectures or [None])[0] == type(model).__name__
    wrong: list[str] = [str(message) for message in info.get("error_msgs") or []]
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for entry in info.get(what) or []:
            key = entry if isinstance(entry, str) else entry[0]
            strict = same_head and not (what == "mismatched_keys" and resized)
            if strict or _ENCODER_NAME.search(key):
                wrong.append(f"{what.removesuffix('_keys')} {key}")
    if wrong:
        wanted, remedy = "the weights of the pruned model", "save the model anew"
        raise CheckpointError(
            format_error("from_pretrained", name, ", ".join(sorted(wrong)[:3]), wanted, remedy)
        )


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """As in transformers for a model that is patched only. A pruned model is written in fastgate's format.

    So is one with soft gates, whose folder then says that it is unfinished: only the training that wrote it
    reads it. Raises Unsupported for arguments that the format has no place for.
    """
    if compat.has_adapters(self) or _is_plain(self):
        swapped = is_swapped(self)
        folder = Path(os.fsdecode(save_directory)).expanduser()
        if not (swapped and (folder / META).exists()):
            tensors = _without_replacements(self, state_dict) if swapped else state_dict
            base_class(self).save_pretrained(  # type: ignore[attr-defined]
                self, save_directory, is_main_process, tensors, push_to_hub, **kwargs
            )
            return
    _refuse_options(push_to_hub, kwargs, self)
    if is_main_process:
        write_pruned(self, save_directory, state_dict)


def _is_plain(model: Any) -> bool:
    """Whether a model of transformers computes the same from the same weights."""
    encoders = [located.encoder for located in find_encoders(model)]
    handles = [EncoderHandle(encoder) for encoder in encoders if hasattr(encoder, "fastgate_runtime")]
    return all(layout_of(handle).is_plain(handle.num_layers) for handle in handles)


def _without_replacements(model: Any, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """The state dict without replacements that no gate lets in; None where there are none of them."""
    handle = get_encoder(model)
    if all(handle.replacement(i) is None for i in range(handle.num_layers)):
        return state_dict
    unused = unused_names(model, layout_of(handle))
    source = model.state_dict() if state_dict is None else state_dict
    return {name: tensor for name, tensor in source.items() if not name.startswith(unused)}


def _refuse_options(push_to_hub: bool, options: dict[str, Any], model: Any) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    refused = {
        "push_to_hub": (push_to_hub, "save, then huggingface_hub.upload_folder"),
        "variant": (options.get("variant") is not None, "leave it out and save to a folder of its own"),
        "distributed_checkpoint": (options.get("distributed_checkpoint"), "leave it out"),
        "safe_serialization": (options.get("safe_serialization") is False, "leave it out"),
        "max_shard_size": (_bytes(options.get("max_shard_size")) < size, "leave it out: one file"),
    }
    for name, (is_refused, remedy) in refused.items():
        if is_refused:
            got = f"{options.get(name, True)!r} for a pruned model"
            raise Unsupported(format_error("save_pretrained", name, got, "the default", remedy))


def _bytes(size: int | str | None) -> float:
    """A size such as "5GB" in bytes; infinity for None."""
    if size is None or isinstance(size, int):
        return float("inf") if size is None else float(size)
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)I?B\s*", str(size).upper())
    if match is None:
        remedy = 'pass a size such as "5GB"'
        raise ArgumentError(format_error("save_pretrained", "max_shard_size", repr(size), "bytes", remedy))
    return float(match[1]) * 1000.0 ** " KMGT".index(match[2] or " ")


def _register() -> None:
    """Have AutoConfig, AutoTokenizer and the AutoModel classes know the configs of pruned models."""
    for model_type in MODEL_TYPES:
        plain = MODEL_TYPES[model_type]
        AutoConfig.register(model_type, PRUNED[plain], exist_ok=True)
        tokenizers = compat.TOKENIZER_MAPPING
        tokenizers.register(PRUNED[plain], tokenizers[plain], exist_ok=True)
    for mapping in compat.auto_model_mappings():
        for plain, pruned in PRUNED.items():
            hf = mapping.get(plain, None)
            if hf in SWAPPED:
                mapping.register(pruned, SWAPPED[hf], exist_ok=True)


for _class in SWAPPED.values():
    _class.from_pretrained = from_pretrained  # type: ignore[attr-defined]
    _class.save_pretrained = save_pretrained  # type: ignore[attr-defined]
SaveWrapper.function = staticmethod(save_pretrained)
_register()
