# %% [markdown]
# # A checkpoint by hand
#
# What a model has learned is one file of numbers. Here it is opened with nothing but `struct`, `json` and NumPy: afterwards you can say what each
# byte is for, what a 16-bit float means, why the older kind of file can take over a computer, and what a program that reads weights must refuse.

# %%
import json
import pickle
import pickletools
import struct
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import torch
from learn import MODEL, check, show

from opt_np import OPTConfig, checkpoint, costs, init, model, pickle_bin, taps, tree
from opt_np.config import parameter_shapes

folder = Path(tempfile.mkdtemp())  # for the files that this notebook writes
print(sorted(path.name for path in MODEL.iterdir()))

# %% [markdown]
# ## The file
#
# `model.safetensors` has three parts: 8 bytes, which give the length of the second part; the second part, a JSON object with each tensor's type,
# shape, and where its bytes begin and end; then those bytes, one tensor after the other.

# %%
raw = (MODEL / "model.safetensors").read_bytes()
(length,) = struct.unpack("<Q", raw[:8])  # a whole number of 8 bytes, the least significant first
header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
metadata = header.pop("__metadata__")
print(f"{len(raw)} bytes: 8, {length} of header, {len(data)} of numbers")
print(f"{len(header)} tensors; metadata {metadata}")
for name in list(header)[:4]:
    print(f"{name:<45} {header[name]}")
ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
assert ends[0][0] == 0
assert ends[-1][1] == len(data)
assert all(a[1] == b[0] for a, b in pairwise(ends))  # no gaps, no overlaps

# %% [markdown]
# A tensor is then a view of its bytes: `F16` is float16, two bytes each, the least significant first, row after row.

# %%
by_hand = {}  # under names without model.decoder.
for name, entry in header.items():
    first, last = entry["data_offsets"]
    assert entry["dtype"] == "F16"
    array = np.frombuffer(data[first:last], "<f2").reshape(entry["shape"])
    by_hand[name.removeprefix("model.decoder.")] = array
params, cfg = checkpoint.load(MODEL, dtype=None)  # None: as stored
loaded = tree.flatten(params)
assert set(loaded) == set(by_hand)
assert all(np.array_equal(loaded[name], a) for name, a in by_hand.items())
print(f"{len(by_hand)} tensors read by hand equal those that checkpoint.load reads")

# %% [markdown]
# ## The tree of names is the tree of calls
#
# The dots in the names make a tree, and in this package the parameters are that tree: nested dicts, and a list for the layers. A function gets the
# branch that it needs, and unpacks its leaves: `ops.linear(h, **p["fc1"])` passes `weight=` and `bias=`. Nothing is renamed between the file and the
# line that computes with it.

# %%
show(tree.unflatten, model.mlp)


# %%
def branches(node, depth=0):
    for name, child in node.items():
        if isinstance(child, list):
            print(f"{'  ' * depth}{name}: {len(child)} of")
            branches(child[0], depth + 1)
        elif "weight" in child:
            shapes = {leaf: a.shape for leaf, a in child.items()}
            print(f"{'  ' * depth}{name:<{24 - 2 * depth}}", shapes)
        else:
            print(f"{'  ' * depth}{name}")
            branches(child, depth + 1)


branches(params)
modules = {f"model.decoder.{name.rpartition('.')[0]}" for name in loaded}
unnamed = modules - set(taps.names(cfg))  # what the forward pass reaches, in its own words
assert {name.rpartition(".")[2] for name in unnamed} == {"out_proj"}  # gives self_attn
assert {name: a.shape for name, a in loaded.items()} == parameter_shapes(cfg)

# %% [markdown]
# The last line shows more than it seems to: the name and the shape of every tensor follow from `config.json` alone. A loader can therefore check that
# nothing is missing, left over or misshapen *before* it computes. Where the numbers are:

# %%
parts = {"embed_tokens": 0, "embed_positions": 0, "attention": 0, "mlp": 0, "LayerNorms": 0}
for name, a in loaded.items():
    kinds = {"embed_t": "embed_tokens", "embed_p": "embed_positions", "layer_norm": "LayerNorms",
             "self_attn.": "attention", "fc": "mlp"}  # fmt: skip
    parts[next(part for key, part in kinds.items() if key in name)] += a.size
fig, ax = plt.subplots(figsize=(6.5, 2.2), layout="constrained")
ax.barh(list(parts)[::-1], [n / 1e6 for n in list(parts.values())[::-1]])
ax.set(xlabel="parameters, millions", title=f"{sum(parts.values()) / 1e6:.2f} million in all")
assert sum(parts.values()) == costs.parameters(cfg)
D, L = cfg.hidden_size, cfg.num_hidden_layers
assert parts["attention"] == L * 4 * (D * D + D)
assert len(data) == 2 * costs.parameters(cfg)  # two bytes each

# %% [markdown]
# ## Sixteen bits
#
# float16 has 1 bit for the sign, 5 for the exponent $e$ and 10 for the fraction $f$:
#
# $$(-1)^s \cdot 2^{e - 15} \cdot \left(1 + \tfrac{f}{1024}\right), \qquad e = 0:\; (-1)^s \cdot 2^{-14} \cdot \tfrac{f}{1024}$$
#
# With $e = 31$, all ones, it is infinite ($f = 0$) or not a number. There are only 65536 patterns: try all of them.

# %%
bits = np.arange(65536, dtype=np.uint16)
s, e, f = bits >> 15, (bits >> 10 & 31).astype(int), bits & 1023
value = (-1.0) ** s * np.where(e == 0, 2.0**-14 * (f / 1024), 2.0 ** (e - 15) * (1 + f / 1024))
finite = e != 31
assert np.array_equal(value[finite], bits[finite].view(np.float16).astype(np.float64))
w = by_hand["layers.0.fc1.weight"][0, 0]
pattern = f"{int(w.view(np.uint16)):016b}"
print(f"a weight: {pattern[0]} {pattern[1:6]} {pattern[6:]} = {w}")
print(f"the largest number is {value[finite].max()}")
assert value[w.view(np.uint16)] == w

# %% [markdown]
# bfloat16 divides its 16 bits differently: it is the upper half of a float32, with its 8 bits of exponent and only 7 of fraction. It reaches as far
# as float32, to $3 \cdot 10^{38}$, where float16 ends at 65504; from $2^{-14}$ up to 65504 float16 is eight times finer. Below: the rounding error of
# storing a number in each format, by its size, and where this model's weights are:

# %%
x = np.exp2(np.random.default_rng(0).uniform(-30, 15.9, 20000))
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
edges = np.arange(-30, 17)
for name, bound in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
    error = np.abs(x.astype(name).astype(np.float64) - x) / x
    worst = [error[(np.log2(x) >= a) & (np.log2(x) < a + 1)].max() for a in edges[:-1]]
    ax.step(edges[:-1], worst, where="post", label=name)
    assert error[x >= 2.0**-14].max() <= bound
sizes = np.abs(np.concatenate([a.ravel() for a in by_hand.values()], dtype=np.float64))
counts, _ = np.histogram(np.log2(sizes[sizes > 0]), edges)
share = counts / counts.max()
ax.bar(edges[:-1] + 0.5, share, 0.9, color="0.85", label="weights (share of the most)")
ax.set(title="rounding to 16 bits", yscale="log", ylim=(1e-4, 2))
ax.set(xlabel="size of the number, power of 2", ylabel="largest relative error")
ax.legend(loc="upper right")
assert np.mean(sizes < 2.0**-14) < 0.01  # few weights are so small that float16 has fewer digits

# %% [markdown]
# Computing is another matter: weights stored in 16 bits are widened, exactly, to float32 before anything is multiplied.

# %%
wide, _ = checkpoint.load(MODEL)  # float32 is the default
for name, a in tree.flatten(wide).items():
    assert a.dtype == np.float32
    assert np.array_equal(a, loaded[name])

# %% [markdown]
# ### Exercise 1: bfloat16
#
# From 16 bits, given as integers (`uint16`), to the values: 1 bit of sign, 8 of exponent minus 127, 7 of fraction. All given numbers are finite and
# have $e > 0$. (There is a shorter way: append 16 zero bits, and view the result as float32.) The package uses `ml_dtypes` for this, in
# `checkpoint.read_safetensors`.


# %%
def bfloat16(bits):
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def my_bfloat16(bits):
    """bits: (N), uint16  ->  (N), float64"""
    return bits.view(np.float16).astype(np.float64)  # 5 bits of exponent are too few


some = np.random.default_rng(0).normal(size=50).astype(ml_dtypes.bfloat16).view(np.uint16)
check(my_bfloat16, bfloat16, (some,))

# %% [markdown]
# ## The older file: `pytorch_model.bin`
#
# Meta's OPT repositories have this kind. It is a zip archive: a raw *storage* for each array, and `data.pkl`, which describes the tensors as views of
# them. Here is a small random OPT, saved by torch itself. Its head and its table of tokens are one matrix, under two names.

# %%
small = OPTConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, ffn_dim=16,
                  num_attention_heads=2, max_position_embeddings=12)  # fmt: skip
weights = tree.flatten(init.init_params(small, seed=0))
state = {f"model.decoder.{name}": torch.from_numpy(a) for name, a in weights.items()}
state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]  # tied: the same storage
torch.save(state, folder / "pytorch_model.bin")
checkpoint.write_text(folder / "config.json", json.dumps(small.to_dict()))
with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
    storages = [name for name in archive.namelist() if "/data/" in name]
    description = archive.read("pytorch_model/data.pkl")
    whole = np.frombuffer(archive.read("pytorch_model/data/0"), "<f4")
print(f"{len(state)} tensors, {len(storages)} storages, {len(description)} bytes of data.pkl")
assert len(storages) == len(state) - 1  # the tied matrix is stored once
assert np.array_equal(whole.reshape(40, 8), weights["embed_tokens.weight"])

# %% [markdown]
# `data.pkl` is a *pickle*, and a pickle is a program for a small stack machine. Its instructions push numbers and texts, and some do more (`NEWOBJ`
# and `BUILD` too): `GLOBAL` imports whatever the file names, and `REDUCE` calls it. Some of the first instructions, and all that this file imports:

# %%
program = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(description)]
for name, argument in program[4:24]:
    print(f"{name:<12} {'' if argument is None else argument}")
imports = {argument for name, argument in program if name == "GLOBAL"}
print(sorted(imports))
assert imports <= pickle_bin.CONSTRUCTORS

# %% [markdown]
# An honest file imports two or three harmless names. A hostile one names whatever it likes. This one, of our own making, writes a file when it is
# loaded; it could just as well send away your keys. The *reading* program needs no bug for that: it is what `pickle.load` is for.


# %%
class Hostile:
    def __reduce__(self):
        note = str(folder / "was-here.txt")
        return exec, (f"open({note!r}, 'w').write('I could have done anything.')",)


program = pickle.dumps({"lm_head.weight": Hostile()}, protocol=2)
pickle.loads(program)  # never do this with a stranger's file
print((folder / "was-here.txt").read_text())
assert (folder / "was-here.txt").exists()
(folder / "was-here.txt").unlink()

# %% [markdown]
# `pickle_bin` never calls pickle. It is a stack machine of its own, which knows only the few instructions that a dict of tensors needs. Constructors
# are mere names to it, and instead of calling anything it records a plain description; anything else is refused, with one line that says what the
# file wanted.

# %%
show(pickle_bin.constructor, pickle_bin.made)


# %%
def said(function, *args):
    """The error that a call ends in, without this machine's folder."""
    try:
        function(*args)
    except checkpoint.CheckpointError as error:
        return str(error).replace(str(folder), "FOLDER")
    return ""


with zipfile.ZipFile(folder / "hostile.bin", "w") as archive:
    archive.writestr("archive/data.pkl", program)
error = said(lambda: dict(pickle_bin.read_bin(folder / "hostile.bin")))
print(error)
assert "was not run" in error
assert "\n" not in error
assert not (folder / "was-here.txt").exists()  # nothing happened

# %% [markdown]
# It reads the honest file, without torch, to the same bits:

# %%
read = dict(pickle_bin.read_bin(folder / "pytorch_model.bin"))
assert read.keys() == state.keys()
assert all(np.array_equal(read[name], tensor.numpy()) for name, tensor in state.items())
from_bin, _ = checkpoint.load(folder)
assert all(np.array_equal(a, weights[name]) for name, a in tree.flatten(from_bin).items())
print(f"{len(read)} tensors read without torch")

# %% [markdown]
# ### Exercise 2: strides
#
# In a `.bin` a tensor is four things: a storage (a row of numbers), an offset where it begins, a shape, and strides. Element $(i, j)$ is number
# $\text{offset} + i \cdot \text{stride}_0 + j \cdot \text{stride}_1$ of the storage. So a transpose is the same storage with other strides. The
# starter is right for matrices that are stored row after row. The package's own is `pickle_bin.view`.


# %%
def strided(numbers, offset, shape, stride):
    storage = pickle_bin.Storage("0", numbers.dtype, numbers.size)
    tensor = pickle_bin.Tensor(storage, offset, shape, stride)
    return pickle_bin.view("a matrix", tensor, numbers.tobytes())


def my_strided(numbers, offset, shape, stride):
    """numbers: (N); shape and stride have two entries  ->  (shape)"""
    return numbers[offset : offset + shape[0] * shape[1]].reshape(shape)


numbers = np.arange(24.0)
views = (4, (3, 5), (5, 1)), (0, (6, 4), (1, 6)), (1, (4, 3), (6, 2))
check(my_strided, strided, *((numbers, *where) for where in views))

# %% [markdown]
# ## Tied weights
#
# The matrix that turns ids into vectors also turns vectors into scores (in opt-125m it is 31 % of the parameters). Files hold it once or twice, under
# one name, the other, or both; `config.json` says with `tie_word_embeddings` whether the two are one. So both names are allowed; but if the two
# differ while the config says "tied", one of them is wrong, and the reader does not guess which.

# %%
state["lm_head.weight"] = state["lm_head.weight"] + 1  # a copy now, and another matrix
torch.save(state, folder / "pytorch_model.bin")
error = said(checkpoint.load, folder)
print(error)
assert "tie_word_embeddings" in error
two = {**small.to_dict(), "tie_word_embeddings": False}
checkpoint.write_text(folder / "config.json", json.dumps(two))
untied, _ = checkpoint.load(folder)
opt_125m = OPTConfig.from_size("125m")
share = opt_125m.vocab_size * opt_125m.word_embed_proj_dim / costs.parameters(opt_125m)
assert round(share, 2) == 0.31
assert np.array_equal(untied["lm_head"]["weight"], untied["embed_tokens"]["weight"] + 1)

# %% [markdown]
# ## Damaged files
#
# The worst thing that a loader can do is to continue: with a missing tensor filled in at random, or an unknown one dropped, a model still runs and
# produces text, only worse, and nobody knows why. So every defect gives one error, in one line, that names the file or tensor, and says what is wrong
# and where to look.

# %%
checkpoint.save(folder / "whole", tree.unflatten(weights), small)
good = (folder / "whole" / "model.safetensors").read_bytes()
(size,) = struct.unpack("<Q", good[:8])
keys, text = small.to_dict(), good[8 : 8 + size].decode()
fc1 = "model.decoder.layers.0.fc1.bias"
damages = {
    "cut short": (good[:-10], keys),
    "header's length wrong": (struct.pack("<Q", 2**40) + good[8:], keys),
    "a tensor renamed": (good.replace(fc1.encode(), fc1.replace("fc1", "fc9").encode()), keys),
    "another width": (good, {**keys, "ffn_dim": 32}),
    "one layer more": (good, {**keys, "num_hidden_layers": 2}),
    "a web page": (b"<!DOCTYPE html><html>Please log in", keys),
}
print(f"the header begins {text[:70]}")
assert text.count(fc1) == 1

# %%
(folder / "bad").mkdir()
told = []
for what, (content, config) in damages.items():
    (folder / "bad" / "model.safetensors").write_bytes(content)
    (folder / "bad" / "config.json").write_text(json.dumps(config))
    error = said(checkpoint.load, folder / "bad")
    told.append(f"{what}:\n    {error}")
    assert error.startswith("FOLDER/bad")
    assert "\n" not in error
print("\n".join(told))
assert said(checkpoint.load, folder / "whole") == ""

# %% [markdown]
# Saving makes the corresponding promise: a file is written beside the old one and renamed when it is complete, so that a crash leaves the old weights
# or the new ones, and what was saved reads back to the same bits.

# %%
again, _ = checkpoint.load(folder / "whole", dtype=None)
assert all(np.array_equal(a, weights[name]) for name, a in tree.flatten(again).items())
assert not list((folder / "whole").glob("*.tmp"))  # nothing half-written is left
checkpoint.save(folder / "whole", tree.unflatten(weights), small, dtype="bfloat16")
rounded, _ = checkpoint.load(folder / "whole", dtype=None)
assert all(a.dtype == ml_dtypes.bfloat16 for a in tree.flatten(rounded).values())
assert (folder / "whole" / "model.safetensors").stat().st_size < len(good) * 0.8

# %% [markdown]
# The bytes are right. Whether the *computation* with them is right is another question: next, the model is compared with PyTorch's, value by value,
# and mistakes are planted and found ([notebook 4](04_verify_and_bisect.ipynb)).
