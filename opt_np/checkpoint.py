"""Checkpoints: a folder with config.json and weights, read from any published format, checked, and written as safetensors that HF can read.

Unless it quantises, reading only renames and casts tensors. A missing, extra or misshapen tensor is an error, and is never initialised at random.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opt_np.config import OPTConfig, parameter_shapes
from opt_np.init import ALL_HEADS, HEADS
from opt_np.quantize import Quantized, Quantizer, expanded, is_quantized_matrix, stored
from opt_np.tree import flatten, unflatten

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5",
           "tf_model.h5.index.json", "flax_model.msgpack", "flax_model.msgpack.index.json")  # the first that exists is read  # fmt: skip
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
STORED = ("F16", "BF16", "F32", "F64", "I8", "U8")  # dtypes in safetensors; the last two if config.json declares the weights quantised
FLOATS = ("float16", "bfloat16", "float32", "float64")
TIED = ("lm_head.weight", "embed_tokens.weight")  # an index may name both although the files hold the shared matrix only once
MEANINGLESS = ("decoder.version", "output_projection.weight")  # metaseq's version mark and its copy of the tied matrix; HF's conversion drops both
METASEQ = {"layer_norm": "final_layer_norm", "project_in_dim": "project_in", "project_out_dim": "project_out"}  # its names, at the decoder's root
LONGEST_MESSAGE = 1500  # characters
KEPT_OPEN = 64_000_000  # bytes to read from a file before it is reopened
ANCHOR = "embed_positions.weight"  # every OPT checkpoint has it; what precedes it in the name is the decoder's prefix


UMASK = os.umask(0o022)
os.umask(UMASK)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; one line names the file or tensor, what was found, what was expected, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    """The text on one line, shortened, with control characters escaped: names in a file are untrusted, and could hold terminal codes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 303]} … {text[-300:]}"


def few(names: list[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def model_folder(folder: str | Path) -> Path:
    """The folder as a Path; raises CheckpointError if it is not a folder."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        kind = "a file" if os.path.exists(folder) else "a link that leads nowhere" if os.path.islink(folder) else "not there"
        raise CheckpointError(f"{folder} is {kind}; a model is a folder with config.json, model.safetensors and the tokenizer's files")
    return folder


def load_config(folder: str | Path) -> OPTConfig:
    """The folder's config.json; raises CheckpointError."""
    path = model_folder(folder) / "config.json"
    try:
        return OPTConfig.from_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; copy it from the model's repository") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Is it a file, and may you read it?") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist. Raises CheckpointError."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Is it a file, and may you read it?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(keys, dict):
        raise CheckpointError(f"{path} holds a JSON {type(keys).__name__}; it is an object of keys and values")
    return keys


def load(name: str | Path, dtype: str | None = "float32", revision: str | None = None, strict: bool = False) -> tuple[dict, OPTConfig]:
    """Parameters (nested, from the decoder down, plus lm_head, score or qa_outputs if the file has them) and config of a folder or hub id.

    Raises CheckpointError. Tensors in F16, BF16, F32 or F64 are cast to dtype, exactly or by rounding; None keeps them as they are stored.
    NaN and infinite weights cause a warning, or with strict an error.
    """
    from opt_np.hub import find

    return load_from(find(name, revision, tokenizer=False), dtype, strict)


def load_from(source: Any, dtype: str | None = "float32", strict: bool = False, copy: bool = True,
              quantizer: Quantizer | None = None) -> tuple[dict, OPTConfig]:  # fmt: skip
    """As `load`, from folders already located (hub.Source). Without `copy`, arrays may be views of the file, for a caller that reads each once.

    With a quantizer, each matrix is quantised as soon as it is read.
    """
    cfg = load_config(source.config)
    if quantizer and cfg.quantized:
        raise CheckpointError(f"{source.name} is {cfg.quantized[0]} already; quantise the checkpoint that it was made from")
    flat = as_type(read_weights(source.weights), cfg, source.name, dtype, strict, copy, quantizer)
    return expanded(unflatten(checked(rooted_at_decoder(flat, cfg, source.name), cfg, source.name))), cfg


def as_type(tensors: Iterable[tuple[str, np.ndarray]], cfg: OPTConfig, name: str, dtype: str | None, strict: bool | None, copy: bool,
            quantizer: Quantizer | None = None) -> dict[str, Any]:  # fmt: skip
    """The tensors of the checkpoint `name` in dtype; NaN and infinite weights are treated as in `load` (with strict=None not looked for).

    The integers, scales and columns of matrices that are quantised already, by cfg, stay as they are stored.
    """
    flat: dict[str, Any] = {}
    not_finite = []
    for tensor, array in tensors:
        whole = stays_whole(tensor, array.dtype, cfg, name)
        if quantizer and is_quantized_matrix(tensor, array.ndim):
            flat[tensor] = quantizer(tensor, array)
            continue
        if whole:
            flat[tensor] = np.array(array) if copy else array
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # values too large for dtype become infinite, and are reported below
            cast = np.array(array, dtype) if copy else np.asarray(array, dtype)
            if strict is not None and not all_finite(cast):
                not_finite.append(tensor)
        flat[tensor] = cast
    if not_finite:
        told = f"{name}: {few(not_finite)} hold NaN or infinite weights"
        if strict:
            raise CheckpointError(f"{told}; get the checkpoint again, or load it without strict")
        warnings.warn(printable(f"{told}, and so will the results; strict refuses such a checkpoint"), stacklevel=4)
    return flat


def stays_whole(tensor: str, dtype: np.dtype, cfg: OPTConfig, name: str) -> bool:
    """Whether a tensor belongs to a quantised matrix. Raises CheckpointError for one that does not, and is not floating-point."""
    whole = cfg.quantized is not None and (dtype in (np.int8, np.uint8) or tensor.endswith((".scale", ".columns")))
    if dtype.name not in FLOATS and not whole:
        raise CheckpointError(f"{name}: {tensor} is stored as {dtype}; weights are {', '.join(FLOATS)}. Is the checkpoint quantised?")
    return whole


def all_finite(a: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; 16-bit values by their exponent bits, all 1 in these, because NumPy is slow in 16 bits."""
    if a.dtype.itemsize == 2:
        return not a.size or int((a.view(np.uint16) & 0x7FFF).max()) < (0x7C00 if a.dtype == np.float16 else 0x7F80)
    return not a.size or bool(np.isfinite(a.min()) and np.isfinite(a.max()))


def weights_entry(folder: Path) -> Path:
    """The weights file, or the index of its shards, of the first format that exists. Raises CheckpointError if there is none."""
    found = next((folder / file for file in WEIGHTS if os.path.exists(folder / file)), None)
    if found is None:
        dead = [file for file in WEIGHTS if os.path.islink(folder / file)]
        raise CheckpointError(
            f"{folder}: {dead[0]} is a link that leads nowhere; copy or download it again"
            if dead
            else f"{folder} has no weights: none of {', '.join(WEIGHTS)}. Is it a model's folder, and was it copied whole?"
        )
    if not os.path.isfile(found):
        raise CheckpointError(f"{found} is no file; copy the weights again")
    return found


def weight_files(entry: Path) -> list[Path]:
    """The file itself, or the shards that an index names. Raises CheckpointError if one is missing."""
    if not entry.name.endswith(".index.json"):
        return [entry]
    paths = [entry.parent / name for name in shards(entry)]
    for path in paths:
        if not os.path.isfile(path):
            raise CheckpointError(f"{entry} names the shard {path.name!r}, which is not in {entry.parent}; copy the missing file")
    return paths


def shards(index: Path) -> list[str]:
    """The files that an index names, each once. Raises CheckpointError for a file that is no index, or that names a file outside its folder."""
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names the shard {name!r}; shards lie beside their index. Do not trust this checkpoint")
    return names


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor, according to an index. Raises CheckpointError."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} is not an index of shards: it has no weight_map from tensors to files")
    return {tensor: str(file) for tensor, file in found.items()}


def read_weights(folder: Path, read: Callable[[Path], Iterable[tuple[str, Any]]] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, array) for each weight of a folder, under the names of the PyTorch checkpoint; `read`, if given, replaces the reader of the format.

    Raises CheckpointError.
    """
    entry, seen = weights_entry(folder), set()
    for path in weight_files(entry):
        for name, array in (read or reader(path))(path):
            if name in seen:
                raise CheckpointError(f"{path}: {name} stands in another shard too; was the checkpoint copied from two?")
            seen.add(name)
            if not name.endswith(MEANINGLESS):
                yield name, array
    if entry.name.endswith(("safetensors.index.json", "bin.index.json")):
        lost = [name for name in weight_map(entry) if name not in seen and not name.endswith((*MEANINGLESS, *TIED))]
        if lost:
            raise CheckpointError(f"{entry} names {few(lost)}, which no shard holds; copy the shards again")


def reader(path: Path) -> Callable[[Path], Iterator[tuple[str, np.ndarray]]]:
    """The function that reads this format of weights."""
    if path.suffix == ".bin":
        from opt_np.pickle_bin import read_bin

        return read_bin
    if path.suffix in (".h5", ".msgpack"):
        from opt_np import tf_flax

        return tf_flax.read_h5 if path.suffix == ".h5" else tf_flax.read_msgpack
    return read_safetensors


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for each weight of a file; bfloat16 has ml_dtypes' dtype. Raises CheckpointError for a damaged file."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then uses)
    from safetensors import SafetensorError, safe_open

    try:
        open(path, "rb").close()  # safetensors calls a file that may not be read missing
        file, read = safe_open(path, framework="numpy"), 0
        names, twins = names_once(path), {kept: dropped for dropped, kept in (file.metadata() or {}).items() if dropped.endswith(TIED)}
        for name in names:
            if read > KEPT_OPEN:  # an open file keeps in memory all that was read from it
                file, read = safe_open(path, framework="numpy"), 0
            stored = file.get_slice(name).get_dtype()
            if stored not in STORED and name.endswith(MEANINGLESS):
                continue
            if stored not in STORED:
                raise CheckpointError(f"{path}: {name} is stored as {stored}; weights are {', '.join(STORED)}. Is the checkpoint quantised?")
            array = file.get_tensor(name)
            read += array.nbytes
            yield name, array
            if name in twins and twins[name] not in names:
                yield twins[name], array  # the converter wrote a shared tensor once, and its other name into the metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Was it copied whole?") from None


def names_once(path: Path) -> dict[str, None]:
    """The tensor names in the header of a file that safetensors has accepted: of two equal names it takes the last, we raise CheckpointError."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
    names = json.loads(header, object_pairs_hook=lambda items: [name for name, _ in items], parse_int=str)
    once = dict.fromkeys(names)
    if len(once) < len(names):
        raise CheckpointError(f"{path} names {Counter(names).most_common(1)[0][0]} twice in its header; get the file again")
    once.pop("__metadata__", None)
    return once


def rooted_at_decoder(flat: dict[str, np.ndarray], cfg: OPTConfig, folder: Any = "the checkpoint") -> dict[str, np.ndarray]:
    """The same tensors without the prefix that their file uses (model.decoder., decoder., none …), and a tied matrix only once."""
    prefixes = [name.removesuffix(ANCHOR) for name in flat if name.endswith(ANCHOR)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{folder} has {len(prefixes)} tensors named …{ANCHOR}; an OPT decoder has one. First names: {', '.join(list(flat)[:3])}"
        )
    outer = prefixes[0].removesuffix("decoder.").removesuffix("model.")
    others = [name for name in flat if not name.startswith(outer)]  # OPT is part of a larger model, such as BLIP-2
    if others:
        told = f"{folder}: {len(others)} tensors outside {outer} ({', '.join(others[:2])} …) are not OPT's and were dropped"
        warnings.warn(printable(told), stacklevel=4)
    rooted: dict[str, np.ndarray] = {}
    for name in (name for name in flat if name.startswith(outer)):
        first, dot, rest = name.removeprefix(prefixes[0]).removeprefix(outer).partition(".")
        short = METASEQ.get(first, first) + dot + rest
        if short in rooted:
            raise CheckpointError(f"{folder} holds {short} under two names, {name} one of them; remove one")
        rooted[short] = flat[name]
    head, embed = rooted.get("lm_head.weight"), rooted.get("embed_tokens.weight")
    if cfg.tie_word_embeddings and head is not None:
        if embed is not None and not same_numbers(head, embed):
            raise CheckpointError(
                f"{folder}: lm_head.weight and embed_tokens.weight differ, but config.json's tie_word_embeddings is true. "
                f"Set it to false to keep both, or remove lm_head.weight"
            )
        rooted["embed_tokens.weight"] = rooted.pop("lm_head.weight")  # some files hold the tied matrix under lm_head's name only
    return rooted


def same_numbers(a: Any, b: Any) -> bool:
    """Whether two matrices are equal, NaN included; compares bits, because NumPy's equal_nan copies both."""
    if isinstance(a, Quantized):
        return a.leaves.keys() == b.leaves.keys() and all(np.array_equal(a.leaves[name], b.leaves[name]) for name in a.leaves)
    bits = f"u{a.dtype.itemsize}"
    return np.array_equal(a, b) or (a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits)))


def checked(flat: dict[str, np.ndarray], cfg: OPTConfig, folder: Any = "the checkpoint") -> dict[str, np.ndarray]:
    """The tensors in the config's order; raises CheckpointError if one is missing, misshapen or left over. Heads may be absent."""
    if cfg.num_hidden_layers > max(1000, len(flat)):  # listing that many names would take forever
        told = f"{folder} has {len(flat)} tensors; config.json's num_hidden_layers={cfg.num_hidden_layers} wants more"
        raise CheckpointError(f"{told}. Is it this checkpoint's config.json?")
    heads = stored(head_shapes(cfg, flat), cfg)
    decoder = stored({name: shape for name, shape in parameter_shapes(cfg).items() if name not in heads}, cfg)
    missing = [name for name in decoder if name not in flat and not name.endswith(".columns")]
    extra = [name for name in flat if name not in decoder and name not in heads]
    if missing or extra:
        problems = [f"{len(names)} {word} ({few(names)})" for word, names in
                    (("missing", missing), ("unknown", extra)) if names]  # fmt: skip
        raise CheckpointError(f"{folder}: tensors {' and '.join(problems)}. Is config.json this checkpoint's, and was the checkpoint copied whole?")
    ordered = {name: wanted for name, wanted in {**decoder, **heads}.items() if name in flat}
    for name, (shape, dtype) in ordered.items():
        if flat[name].shape != shape:
            raise CheckpointError(f"{folder}: {name} is {flat[name].shape}; config.json wants {shape}. Is it this checkpoint's config.json?")
        if dtype and flat[name].dtype != dtype:
            raise CheckpointError(
                f"{folder}: {name} is {flat[name].dtype}; config.json's quantization_config wants {dtype}. Is it this checkpoint's?"
            )
    return {name: flat[name] for name in ordered}


def head_shapes(cfg: OPTConfig, flat: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of the heads that a checkpoint may have, depending on the class it was saved from; `score`, if there, gives the number of labels."""
    W = cfg.word_embed_proj_dim
    labels = flat["score.weight"].shape[0] if "score.weight" in flat else cfg.num_labels
    return {"lm_head.weight": (cfg.vocab_size, W), "score.weight": (labels, W), "qa_outputs.weight": (2, W), "qa_outputs.bias": (2,)}


def with_head_only(params: dict, head: str | None, source: Any, user: str) -> dict:
    """The parameters without heads other than `head`; warns about those that it drops."""
    unused = [name for name in ALL_HEADS if name in params and name != head]
    if unused:
        warnings.warn(f"{source}: {', '.join(unused)} is not used by {user} and was dropped", stacklevel=3)
    return {name: p for name, p in params.items() if name not in unused}


def save(folder: str | Path, params: dict, cfg: OPTConfig, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes config.json and model.safetensors, or shards of max_shard_bytes with an index if it would be larger, under HF's names (model.decoder.…).

    The weights are replaced in one rename, so that a reader, or a crash, sees the old ones or the new; config.json is written after them.
    Raises CheckpointError for values that dtype cannot hold.
    """
    if not isinstance(params["layers"], list):
        raise CheckpointError(f"{folder}: a model whose layers stay on disk cannot be saved; load it without stream_layers, or use opt-np convert")
    folder, flat = Path(folder), flatten(params)
    if packed := [name for name, a in flat.items() if getattr(a, "kind", None)]:
        raise CheckpointError(f"{folder}: {packed[0]} is packed as {flat[packed[0]].kind}, and cannot be saved; opt-np quantize writes such a folder")
    if dtype and (whole := [name for name, a in flat.items() if a.dtype.kind in "iu"]):
        raise CheckpointError(
            f"{folder}: {whole[0]} is {flat[whole[0]].dtype}, of a quantised model, which is saved as it is: leave out dtype={dtype}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    named = {name if name.split(".")[0] in ALL_HEADS else f"model.decoder.{name}": a for name, a in flat.items()}
    parts = divided(named, dtype, max_shard_bytes)
    architecture = next((cls for head, cls in HEADS.items() if head in params), "OPTForCausalLM")
    stored_as = flat[ANCHOR].dtype.name if dtype is None else dtype
    keys = {**cfg.to_dict(), "architectures": [architecture], "torch_dtype": stored_as}
    keys.pop("dtype", None)  # transformers 5's name for torch_dtype; one of the two is enough
    write_weights(folder, parts, dtype)
    write_text(folder / "config.json", json.dumps(keys, indent=2, sort_keys=True) + "\n")


def divided(named: dict[str, np.ndarray], dtype: str | None, most: int) -> list[dict[str, np.ndarray]]:
    """The tensors in order, split into parts of at most `most` bytes as stored (a larger tensor is a part of its own)."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, array in named.items():
        if parts[-1] and stored_bytes({**parts[-1], name: array}, dtype) > most:
            parts.append({})
        parts[-1][name] = array
    return parts


def stored_bytes(part: dict[str, np.ndarray], dtype: str | None) -> int:
    """Bytes of tensors as they will be stored."""
    return sum(a.size * (a.dtype if dtype is None else float_type(dtype)).itemsize for a in part.values())


def write_weights(folder: Path, parts: list[dict[str, np.ndarray]], dtype: str | None) -> None:
    """Writes the parts, and makes them the folder's weights in one rename: of model.safetensors, or of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    old = [folder / name for name in shards(index)] if index.exists() else []
    if len(parts) == 1:
        write_atomically(single, lambda path: write_part(path, parts[0], dtype))
        stale = [index, *old]  # the single file takes precedence, so these are no longer read
    else:
        names = free_names(folder, len(parts))
        try:
            for name, part in zip(names, parts, strict=True):
                write_atomically(folder / name, lambda path, part=part: write_part(path, part, dtype))
            total = sum(stored_bytes(part, dtype) for part in parts)
            weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        except BaseException:
            for name in names:
                (folder / name).unlink(missing_ok=True)
            raise
        stale = [single, *old]
    for path in stale:
        path.unlink(missing_ok=True)


def free_names(folder: Path, n: int) -> list[str]:
    """HF's names for n shards; if some exist, other names, because the existing shards are the checkpoint until the index is replaced."""
    for attempt in range(1, 1000):
        again = f"{attempt}-" if attempt > 1 else ""
        names = [f"model-{again}{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        if not any((folder / name).exists() for name in names):
            return names
    raise CheckpointError(f"{folder} holds a thousand unfinished checkpoints; empty it")


def write_part(path: Path, part: dict[str, np.ndarray], dtype: str | None) -> None:
    """One file of safetensors. Raises CheckpointError for values that overflow dtype."""
    with np.errstate(over="ignore"):
        cast = {name: np.ascontiguousarray(a, None if dtype is None else float_type(dtype)) for name, a in part.items()}
    lost = [name for name, a in part.items() if dtype is not None and not np.isfinite(cast[name]).all() and np.isfinite(a).all()]
    if lost:
        raise CheckpointError(f"{', '.join(lost[:3])}: values too large for {dtype}; save as float32")
    write_safetensors(path, cast, {"format": "pt"})


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """safetensors' save_file, with its errors, such as a full disk, raised as OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def float_type(dtype: str) -> np.dtype:
    """NumPy's type of this name; bfloat16 is ml_dtypes'. Raises ValueError."""
    import ml_dtypes  # noqa: F401

    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(FLOATS)}")
    return np.dtype(dtype)


def copy_small_files(source: Any, folder: str | Path) -> None:
    """Copies the tokenizer's files and generation_config.json of a hub.Source, those that exist."""
    paths = (source.config / "generation_config.json", *(source.tokenizer / name for name in TOKENIZER_FILES))
    found = {path.name: path.read_bytes() for path in paths if path.exists()}  # all are read before the first is written: one may be unreadable
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        write_atomically(Path(folder) / name, lambda temporary, content=content: temporary.write_bytes(content))


def write_atomically(path: Path, write: Any) -> None:
    """write(temporary path), then rename: a reader, or a crash, sees the old file or the new one, never half of one.

    The temporary file has a folder of its own, because safetensors writes another beside it; what killed processes left behind is removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not is_running(left.suffixes[-2][1:]):
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary = folder / path.name
    try:
        folder.mkdir()
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_running(name: str) -> bool:
    """Whether the process that a temporary folder is named after is there."""
    try:
        os.kill(int(name.split("-")[0]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # another user's; a name that is not ours
        return True
    return True


def write_numpy(path: Path, values: Any) -> None:
    """Writes one array (npy) or a dict of arrays (npz) atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, NumPy would append its own suffix
            if isinstance(values, dict):
                np.savez(file, **values)
            else:
                np.save(file, values)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
