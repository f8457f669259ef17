"""The files of a checkpoint as they are read: nothing in them is trusted, and nothing large is made of them.

Every function raises CheckpointError for a file that is missing, damaged, hostile or of a newer format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastgate.errors import ArgumentError, CheckpointError, format_error
from fastgate.models import architectures, atomic_files
from fastgate.models.checkpoint_config import KEY, MODEL_TYPES, PRUNED, Layout, read_layout
from fastgate.models.checkpoint_structure import DTYPES, shared
from fastgate.models.compat import WEIGHTS_ENTRY
from fastgate.models.handle import POOLING_KEY

FORMAT = 2
META, WEIGHTS, CONFIG = "fastgate.json", "model.safetensors", "config.json"
ANEW = "save the model anew"  # what helps with most of what is wrong
_MAX_JSON_BYTES = 2**26
# Sizes in a config, which must be positive and small enough to look at.
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_FOREIGN = ("quantization_config", "per_layer_config", "fusion_config", "distributed_config")


def verify(folder: Path) -> None:
    """Raises CheckpointError if the files of a checkpoint are not those that were saved together."""
    _check_digests(folder, _checked_meta(folder))


def snapshot(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """`fastgate.json`, `config.json` and the open weights, which were saved together.

    A save at the same time may replace files between two reads: then they are read again.
    """
    for _ in range(20):
        before = _file_states(folder)
        try:
            meta = _checked_meta(folder)
            data = read_json(atomic_files.find(folder, CONFIG))
            _check_digests(folder, meta)
            file = _opened(atomic_files.find(folder, WEIGHTS))
        except CheckpointError:
            if _file_states(folder) == before:
                raise
            continue
        if _file_states(folder) == before:
            return meta, data, file
    remedy = "load again when saving has ended"
    raise CheckpointError(
        format_error("load", "path", folder, "a folder that is not saved to all the time", remedy)
    )


def _opened(weights: Path) -> Any:
    try:
        return safe_open(weights, "pt")
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(format_error("load", str(weights), one_line(error), wanted, ANEW)) from error


def _file_states(folder: Path) -> list[tuple[Path, int, int, int] | None]:
    """What changes when a save puts its files in place. A file that is moved changes its place only."""
    states: list[tuple[Path, int, int, int] | None] = []
    for name in (META, CONFIG, WEIGHTS):
        try:
            place = atomic_files.find(folder, name)
            stat = place.stat()
            states.append((place, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            states.append(None)
    return states


def folder_to_read(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, `~` expanded. Raises ArgumentError for what is no path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        remedy = 'pass a path, such as "pruned"'
        raise ArgumentError(format_error("load", "path", repr(path)[:80], "the path of a folder", remedy))
    folder = Path(os.fsdecode(path)).expanduser()
    wanted = "the folder of a checkpoint written by fastgate.save"
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise CheckpointError(
            format_error("load", str(folder)[:80], one_line(error)[:80], wanted, "check the path")
        ) from error
    if is_folder:
        if not atomic_files.find(folder, META).is_file():
            got = "an empty folder" if not any(folder.iterdir()) else "a folder without fastgate.json"
            remedy = "check the path"
            if (folder / CONFIG).is_file():
                remedy = "load a model of transformers with AutoModel.from_pretrained and call fastgate.patch"
            elif (folder / "pruned" / META).is_file():
                remedy = f"load {folder / 'pruned'}"
            raise CheckpointError(format_error("load", str(folder), f"{got} (no such file)", wanted, remedy))
        return folder
    got = "a file" if folder.exists() else "no such file or folder"
    remedy = f"pass the folder {folder.parent}" if folder.exists() else "check the path"
    raise CheckpointError(format_error("load", str(folder), got, wanted, remedy))


def _checked_meta(folder: Path) -> dict[str, Any]:
    path = atomic_files.find(folder, META)
    meta = read_json(path)
    if meta.get("format") not in (1, FORMAT) or type(meta["format"]) is not int:
        got, wanted = f"format {str(meta.get('format'))[:20]}", f"format 1 or {FORMAT}"
        raise CheckpointError(format_error("load", str(path), got, wanted, "upgrade fastgate"))
    old = meta["format"] == 1
    digests: Any = {WEIGHTS: meta.get("sha256")} if old else meta.get("sha256")
    whole = isinstance(digests, dict) and set(digests) == ({WEIGHTS} if old else {CONFIG, WEIGHTS})
    if not whole or not all(isinstance(value, str) for value in (*digests.values(), meta.get("class"))):
        raise CheckpointError(
            format_error("load", str(path), "missing or wrong fields", "what fastgate.save writes", ANEW)
        )
    return meta | {"sha256": digests}


def _check_digests(folder: Path, meta: dict[str, Any]) -> None:
    for name, digest in meta["sha256"].items():
        path = atomic_files.find(folder, name)
        try:
            actual = digest_of(path)
        except OSError as error:
            got = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
            remedy = "copy the whole folder again"
            raise CheckpointError(
                format_error("load", str(path), got, "a file that can be read", remedy)
            ) from error
        if actual != digest:
            remedy = "the file was truncated or changed: copy it again or save the model anew"
            got = "contents that do not match their checksum"
            raise CheckpointError(format_error("load", str(path), got, f"{digest[:12]} of {META}", remedy))


def layout_in(meta: dict[str, Any], data: dict[str, Any], folder: Path, config: Any) -> Layout:
    """What fastgate.json says, which config.json must say too. meta, data: the contents of the two."""
    layers = config.num_hidden_layers
    pooling = data.get(POOLING_KEY, "first")
    known = meta if meta["format"] != 1 else {**meta, "pooling": pooling}
    layout = read_layout(known, str(folder / META), layers)
    if KEY in data and read_layout(data[KEY], str(folder / CONFIG), layers) != layout:
        wanted = f"what {META} says"
        raise CheckpointError(format_error("load", str(folder / CONFIG), f"another {KEY!r}", wanted, ANEW))
    if pooling != layout.pooling:
        wanted = f"{layout.pooling!r}, as {META} says"
        raise CheckpointError(
            format_error("load", str(folder / CONFIG), f"pooling {pooling!r}", wanted, ANEW)
        )
    return layout


def class_named(name: str, folder: Path) -> type[PreTrainedModel]:
    """The encoder or head of transformers that a checkpoint holds."""
    cls = architectures.class_named(name)
    if cls is None:
        wanted = "an encoder or head of transformers that fastgate knows"
        remedy = "upgrade fastgate, or make that class, prune it the same, and call load_state_dict"
        got = f"class {name[:60]!r}"
        raise CheckpointError(format_error("load", str(folder / META), got, wanted, remedy))
    return cls


def model_config(data: dict[str, Any], hf: type[nn.Module], where: str, layers: int) -> PreTrainedConfig:
    """The config of transformers in a JSON object, once nothing in it can do harm.

    hf: the class of the model. where: the file, for the message. layers: how many the weights have. Raises
    CheckpointError.
    """
    for name, wanted in _wrong_entries(data, layers):
        raise _refusal(data, where, name, wanted)
    plain = _config_class(data, hf, where)
    for name in data:
        if name.startswith("__") or callable(getattr(plain, name, None)):  # it would take a method's place
            raise _refusal(data, where, name, "no such entry")
    rest = {n: v for n, v in data.items() if n not in (KEY, WEIGHTS_ENTRY, "model_type")}
    try:
        config = plain.from_dict(rest)
        config.validate()
    except Exception as error:
        wanted = "a configuration that transformers reads"
        raise CheckpointError(format_error("load", where, one_line(error), wanted, ANEW)) from error
    return config


def _refusal(data: dict[str, Any], where: str, name: str, wanted: str) -> CheckpointError:
    got = f"{name} {str(data.get(name))[:60]!r}"
    return CheckpointError(format_error("load", where, got, wanted, ANEW))


def _wrong_entries(data: dict[str, Any], layers: int) -> Iterator[tuple[str, str]]:
    """Entries of a config that are refused, in turn, and what is wanted instead."""
    for name in _SIZES:
        if type(data.get(name)) is not int or not 0 < data[name] < 2**31:
            yield name, "a positive integer"
    if data["num_hidden_layers"] != layers:
        yield "num_hidden_layers", f"{layers}, as the weights have"
    if type(data.get("num_labels", 0)) is not int or not 0 <= data.get("num_labels", 0) < 10**6:
        yield "num_labels", "fewer than a million"
    for name in ("dtype", "torch_dtype"):
        if data.get(name) not in (None, *(str(dtype).removeprefix("torch.") for dtype in DTYPES)):
            yield name, "float32, bfloat16, float16 or float64"
    for name in _FOREIGN:
        if data.get(name) is not None:
            yield name, "none"
    for name in ("attn_implementation", "_attn_implementation"):  # the name of a hub's kernel would be run
        if data.get(name) not in (None, "eager", "sdpa", "flash_attention_2", "flex_attention"):
            yield name, "eager or sdpa"


def _config_class(data: dict[str, Any], hf: Any, where: str) -> type[PreTrainedConfig]:
    """The config class of transformers that a `model_type` names, fastgate's or theirs."""
    model_type = data.get("model_type")
    plain = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if plain is None:
        plain = next((cls for cls in PRUNED if cls.model_type == model_type), None)
    if plain is None or not issubclass(hf.config_class, plain):
        raise _refusal(data, where, "model_type", f"that of a {hf.__name__}")
    return plain


def header_of(file: Any, weights: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of each tensor in an open safetensors file."""
    try:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except Exception as error:
        wanted = "a safetensors file"
        raise CheckpointError(format_error("load", str(weights), one_line(error), wanted, ANEW)) from error


def check_header(model: nn.Module, header: dict[str, tuple[tuple[int, ...], str]], weights: Path) -> None:
    """Raises CheckpointError unless the file has the tensors of the model in their shapes."""
    tensors = model.state_dict(keep_vars=True)
    groups = shared(tensors)
    missing = [name for name in tensors if not any(other in header for other in groups[name])]
    unknown = [name for name in header if name not in tensors]
    if missing or unknown:
        got = f"missing {missing[:3]}, unknown {unknown[:3]}"
        raise CheckpointError(
            format_error("load", str(weights), got, "the tensors that the config needs", ANEW)
        )
    for name, (shape, dtype) in header.items():
        if shape != tuple(tensors[name].shape):
            got, wanted = f"{name}: {shape}", f"shapes as in config.json, {tuple(tensors[name].shape)}"
            raise CheckpointError(format_error("load", str(weights), got, wanted, ANEW))
        if dtype not in ("F32", "BF16", "F16", "F64"):
            wanted = "float32, bfloat16, float16 or float64"
            raise CheckpointError(format_error("load", str(weights), f"{name} of {dtype}", wanted, ANEW))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, NaN and an entry that comes twice."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, which is too many")
        data = json.loads(path.read_text("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except FileNotFoundError as error:
        wanted = "a checkpoint written by fastgate.save"
        raise CheckpointError(
            format_error("load", str(path), "no such file", wanted, "check the path")
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        got = f"damaged JSON ({one_line(error)})"
        raise CheckpointError(format_error("load", str(path), got, "a JSON object", ANEW)) from error
    if not isinstance(data, dict):
        got = f"damaged JSON (a {type(data).__name__})"
        raise CheckpointError(format_error("load", str(path), got, "a JSON object", ANEW))
    return data


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an entry that comes twice")
    return data


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
