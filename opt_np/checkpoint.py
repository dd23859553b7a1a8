"""Checkpoints: a folder with config.json and safetensors, read under any of the published layouts, checked, and written so that HF reads it.

Reading renames and casts, and never computes: the arrays are the file's. A missing, extra or misshapen tensor is an error, never a random one.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from opt_np.config import OPTConfig, parameter_shapes
from opt_np.init import ALL_HEADS, HEADS
from opt_np.tree import flatten, unflatten

STORED = ("F16", "BF16", "F32", "F64")  # in files
MEANINGLESS = ("decoder.version", "output_projection.weight")  # metaseq's version mark and its copy of the tied matrix; HF's conversion drops both
ANCHOR = "embed_positions.weight"  # every OPT has it: what stands before it is the decoder's prefix


UMASK = os.umask(0o022)
os.umask(UMASK)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is: names the file or tensor, what was found, what was wanted, and what to do."""


def model_folder(folder: str | Path) -> Path:
    """The folder itself, once it is certain that it exists."""
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise CheckpointError(f"{folder} is {kind}; a model is a folder with config.json, model.safetensors and the tokenizer's files")
    return folder


def load_config(folder: str | Path) -> OPTConfig:
    """The folder's config.json; raises CheckpointError."""
    path = model_folder(folder) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path} is not there; copy it from the model's repository")
    try:
        return OPTConfig.from_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def load(folder: str | Path, dtype: str = "float32") -> tuple[dict, OPTConfig]:
    """Parameters (nested, rooted at the decoder, with lm_head, score or qa_outputs beside where the file has them) and config.

    Raises CheckpointError. Tensors in F16, BF16, F32 or F64 are cast to dtype, exactly or by rounding.
    """
    cfg = load_config(folder)
    flat = {}
    for path in safetensors_files(model_folder(folder)):
        for name, array in read_safetensors(path):
            if name in flat:
                raise CheckpointError(f"{path}: {name} stands in another shard too; was the checkpoint copied from two?")
            flat[name] = array.astype(dtype)
    return unflatten(checked(rooted_at_decoder(flat, cfg, folder), cfg, folder)), cfg


def safetensors_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names. Raises CheckpointError when one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}; is it a model's folder, and was it copied whole?")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards (a JSON object with weight_map): {error}") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is not in {folder}; copy the missing file")
    return [folder / name for name in names]


def read_safetensors(path: Path):
    """(name, array) for each weight of a file; bfloat16 comes as ml_dtypes' type. Raises CheckpointError for a damaged file."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then uses)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name.endswith(MEANINGLESS):
                    continue
                stored = file.get_slice(name).get_dtype()
                if stored not in STORED:
                    raise CheckpointError(f"{path}: {name} is stored as {stored}; weights are {', '.join(STORED)}. Is the checkpoint quantised?")
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Was it copied whole?") from None


def rooted_at_decoder(flat: dict[str, np.ndarray], cfg: OPTConfig, folder: Any = "the checkpoint") -> dict[str, np.ndarray]:
    """The same tensors without the prefix that their file happens to use (model.decoder., decoder., none …), the tied matrix once."""
    prefixes = [name.removesuffix(ANCHOR) for name in flat if name.endswith(ANCHOR)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{folder} has {len(prefixes)} tensors named …{ANCHOR}; an OPT decoder has one. First names: {', '.join(list(flat)[:3])}"
        )
    outer = prefixes[0].removesuffix("decoder.").removesuffix("model.")
    rooted = {name.removeprefix(prefixes[0]).removeprefix(outer): array for name, array in flat.items()}
    head, embed = rooted.get("lm_head.weight"), rooted.get("embed_tokens.weight")
    if cfg.tie_word_embeddings and head is not None:
        if embed is not None and not np.array_equal(head, embed):
            raise CheckpointError(
                f"{folder}: lm_head.weight and embed_tokens.weight differ, but config.json's tie_word_embeddings is true. "
                f"Set it to false to keep both, or remove lm_head.weight"
            )
        rooted["embed_tokens.weight"] = rooted.pop("lm_head.weight")  # some files hold the tied matrix under this name only
    return rooted


def checked(flat: dict[str, np.ndarray], cfg: OPTConfig, folder: Any = "the checkpoint") -> dict[str, np.ndarray]:
    """The tensors in the config's order, once each is there in the right shape and none is left over; heads may be absent. Raises CheckpointError."""
    heads = head_shapes(cfg, flat)
    decoder = {name: shape for name, shape in parameter_shapes(cfg).items() if name not in heads}
    missing, extra = [n for n in decoder if n not in flat], [n for n in flat if n not in decoder and n not in heads]
    if missing or extra:
        problems = [f"{len(names)} {word} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})" for word, names in
                    (("missing", missing), ("unknown", extra)) if names]  # fmt: skip
        raise CheckpointError(f"{folder}: tensors {' and '.join(problems)}. Is config.json this checkpoint's, and was the checkpoint copied whole?")
    ordered = {name: shape for name, shape in {**decoder, **heads}.items() if name in flat}
    for name, shape in ordered.items():
        if flat[name].shape != shape:
            raise CheckpointError(f"{folder}: {name} is {flat[name].shape}; config.json wants {shape}. Is it this checkpoint's config.json?")
    return {name: flat[name] for name in ordered}


def head_shapes(cfg: OPTConfig, flat: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint may have, according to the class it was saved from. The labels are counted by `score` itself."""
    W = cfg.word_embed_proj_dim
    labels = flat["score.weight"].shape[0] if "score.weight" in flat else cfg.num_labels
    return {"lm_head.weight": (cfg.vocab_size, W), "score.weight": (labels, W), "qa_outputs.weight": (2, W), "qa_outputs.bias": (2,)}


def with_head_only(params: dict, head: str | None, source: Any, user: str) -> dict:
    """The parameters without the heads that are not `head`; warns of each that it drops."""
    unused = [name for name in ALL_HEADS if name in params and name != head]
    if unused:
        warnings.warn(f"{source}: {', '.join(unused)} is not used by {user} and was dropped", stacklevel=3)
    return {name: p for name, p in params.items() if name not in unused}


def save(folder: str | Path, params: dict, cfg: OPTConfig, dtype: str | None = None) -> None:
    """Writes config.json and model.safetensors under HF's names (model.decoder.…), each file whole or not at all."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with np.errstate(over="ignore"):
        flat = {name: np.ascontiguousarray(a, dtype) for name, a in flatten(params).items()}
    lost = [name for name, a in flatten(params).items() if np.isfinite(a).all() and not np.isfinite(flat[name]).all()]
    if lost:
        raise CheckpointError(f"{', '.join(lost[:3])}: values too large for {dtype}; save as float32")
    named = {name if name.split(".")[0] in ALL_HEADS else f"model.decoder.{name}": a for name, a in flat.items()}
    architecture = next((cls for head, cls in HEADS.items() if head in params), "OPTForCausalLM")
    keys = {**cfg.to_dict(), "architectures": [architecture], "torch_dtype": str(next(iter(flat.values())).dtype)}
    keys.pop("dtype", None)  # transformers 5's name for torch_dtype; one of the two is enough
    write_atomically(folder / "model.safetensors", lambda path: save_file(named, path, {"format": "pt"}))
    write_text(folder / "config.json", json.dumps(keys, indent=2, sort_keys=True) + "\n")


def write_atomically(path: Path, write: Any) -> None:
    """write(temporary path), then rename: a reader, or a crash, sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a process killed while writing leaves at most one behind
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
