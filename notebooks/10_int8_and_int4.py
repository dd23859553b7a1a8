# %% [markdown]
# # Weights in 8 bits and in 4
#
# A weight can be stored as a small integer, with one scale factor shared by a row or a group of weights. This notebook makes such weights by hand,
# follows their error from one row through the whole model, shows what a few large channels do to it and what helps, and ends with the kernel that
# multiplies integers exactly. All measurements are on the small shipped model; Meta's weights have not been measured.

# %%
import copy

import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, picture, show

from opt_fast import gemm_int, ops_cpu
from opt_np import OPTConfig, OPTForCausalLM, OPTTokenizer, costs, model, ops, quantize, trace
from opt_np.perplexity import perplexity
from opt_np.tree import flatten

lm, tok = OPTForCausalLM.from_pretrained(MODEL), OPTTokenizer.from_pretrained(MODEL)
params, cfg = lm.params, lm.config

# %% [markdown]
# ## A row in 8 bits
#
# The largest weight of a row becomes 127 or −127; every other is rounded to the nearest integer. The step between two integers, the `scale`, is
# stored as a float32 for each row:
#
# $$\text{scale} = \frac{\max_i |w_i|}{127}, \quad n_i = \mathrm{round}(w_i / \text{scale}), \quad \hat w_i = n_i \cdot \text{scale}$$

# %%
show(quantize.int8_rows)

# %%
W = params["layers"][0]["self_attn"]["q_proj"]["weight"]  # (O, I)
row = W[3]
scale = np.abs(row).max() / np.float32(127)
numbers = np.rint(row / scale).astype(np.int8)
print("weights ", row[:6].round(4))
print("numbers ", numbers[:6], f" scale {scale:.6f}")
print("again   ", (numbers * scale)[:6].round(4))
leaves = quantize.int8_rows(W)
assert np.array_equal(leaves["weight"][3], numbers)
assert leaves["scale"][3] == scale
assert np.abs(numbers * scale - row).max() <= 0.5001 * scale  # never off by more than half a step
assert np.array_equal(ops.dequantized(**leaves)[3], numbers * scale)

# %% [markdown]
# ## A row in 4 bits
#
# Four bits make 16 numbers, −8 to 7. One scale for a whole row would be too coarse, so each **group** of 32 columns has its own, in float16. The
# largest number of a group, with its sign, becomes about −8. "About": six candidates for the step are tried, and the one with the smallest squared
# error is kept. Two numbers share a byte, the even column in its lower half, as 0 to 15.

# %%
group = row[:32]
largest = group[np.abs(group).argmax()]
steps = (largest / np.float32([-7, -7.5, -8, -8.5, -9, -9.5])).astype(np.float16).astype(np.float32)
tried = np.clip(np.rint(group / steps[:, None]), -8, 7)  # (6, 32)
best = np.square(tried * steps[:, None] - group).sum(1).argmin()
four = (tried[best] + 8).astype(np.uint8)  # 0 to 15
packed = four[::2] | four[1::2] << 4
print("numbers", tried[best][:8].astype(int), " bytes", [f"{byte:08b}" for byte in packed[:4]])
leaves4 = quantize.int4_rows(W, 32)
assert np.array_equal(leaves4["weight"][3, :16], packed)
assert leaves4["scale"][3, 0] == steps[best]
assert np.array_equal(ops.dequantized(**leaves4)[3, :32], tried[best] * steps[best])

# %% [markdown]
# The row and its grids: int8's levels are so close that the row hardly moves; int4 has only 16 levels for the 32 weights of a group, different in
# each group.

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
axes[0].hist(row, bins=40, color="C0")
for n in range(-127, 128, 8):
    axes[0].axvline(n * scale, color="C1", lw=0.5)
axes[0].set(title="a row of weights, and every 8th int8 level", xlabel="weight", ylabel="weights")
levels = np.arange(-8, 8) * steps[best]
for level in levels:
    axes[1].axvline(level, color="C1", lw=0.8)
axes[1].plot(group, np.arange(32), "o", ms=4, label="weight")
axes[1].plot(tried[best] * steps[best], np.arange(32), "kx", ms=5, label="in int4")
axes[1].set(title="its first group, and all 16 int4 levels", xlabel="weight", ylabel="column")
axes[1].legend(fontsize=8)
assert set(tried[best] * steps[best]) <= set(levels)

# %% [markdown]
# ### Exercise 1: unpack
#
# Write what 4-bit weights mean: from bytes (O, I/2) and scales (O, I/32) to float32 (O, I). The lower half of a byte is `byte & 15`, the upper
# `byte >> 4`; subtract 8 from both; each is multiplied by its group's scale. The starter puts all the lower halves first, and subtracts nothing.


# %%
def my_dequantized(weight, scale):
    """weight: (O, I/2) uint8;  scale: (O, I/32) float16  ->  (O, I) float32"""
    w = np.concatenate([weight & 15, weight >> 4], axis=1).astype(np.float32)
    return w * np.repeat(scale.astype(np.float32), 32, axis=1)


check(my_dequantized, ops.dequantized, (leaves4["weight"], leaves4["scale"]))

# %% [markdown]
# (The package's own: `opt_np.ops.dequantized`. It is the specification; kernels must equal it.)
#
# ## How large is the error?
#
# Rounding to a step $\Delta$ leaves an error that is spread evenly over $\pm\Delta/2$, whose root mean square is $\Delta/\sqrt{12}$. With b bits a
# row has $\Delta = \max|w| / (2^{b-1} - 1)$. So each bit halves the error:

# %%
bits, measured, expected = np.arange(3, 13), [], []
for b in bits:
    step = np.abs(W).max(1, keepdims=True) / (2 ** (b - 1) - 1)
    error = np.rint(W / step) * step - W
    measured.append(np.linalg.norm(error) / np.linalg.norm(W))
    expected.append(np.sqrt((step**2).mean() / 12) / np.sqrt((W**2).mean()))
plt.figure(figsize=(6, 3.2), layout="constrained")
plt.semilogy(bits, expected, "-", label="Δ/√12")
plt.semilogy(bits, measured, "o", label="measured, one scale a row")
plt.semilogy(4, quantize.relative_error(W, leaves4), "rx", label="int4, a scale for each 32")
plt.gca().set(title="q_proj of layer 0", xlabel="bits", ylabel="‖W − Ŵ‖ / ‖W‖")
plt.legend(fontsize=8)
assert np.allclose(measured, expected, rtol=0.03)
assert np.isclose(measured[5], quantize.relative_error(W, leaves), rtol=1e-4)
assert quantize.relative_error(W, leaves4) < 0.7 * measured[1]  # groups take a third off

# %% [markdown]
# All matrices of the blocks, six in each of six layers. They differ little: what counts is how far a row's (or a group's) largest weight stands above
# the others. `fc2`, with rows of 1024, has larger extremes, and layer 0's `out_proj` has a few weights ten times the usual size.

# %%
names = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["fc1", "fc2"]
flat, errors = flatten(params), {}
for kind in ("int8", "int4"):
    errors[kind] = np.zeros((len(names), cfg.num_hidden_layers))
    for r, c in np.ndindex(errors[kind].shape):
        weight = flat[f"layers.{c}.{names[r]}.weight"]
        made = quantize.quantize_matrix(weight, kind)
        errors[kind][r, c] = quantize.relative_error(weight, made)
fig, axes = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
short = [name.removeprefix("self_attn.") for name in names]
for ax, (kind, found) in zip(axes, errors.items(), strict=True):
    picture(found, short, range(cfg.num_hidden_layers), f"{kind}: ‖W − Ŵ‖ / ‖W‖", ax)
    ax.set_xlabel("layer")
assert (errors["int8"] < 0.01).all()
assert (errors["int4"] < 0.1).all()
assert (errors["int4"] > 8 * errors["int8"]).all()

# %% [markdown]
# ## A few large channels
#
# From 6.7b on, a few channels of OPT's stream are many times as large as all others (LLM.int8(), arXiv:2208.07339). The small model has none, so
# let us make six. Multiply six channels of what a matrix reads by 60, and divide the matrix's columns for them by 60: what comes out is the same.
# Or the other way round, with six large columns. Then round the matrix by rows:

# %%
large = [3, 40, 77, 128, 200, 251]
factor = np.ones(256, np.float32)
factor[large] = 60
rng = np.random.default_rng(0)
h = rng.normal(size=(50, 256)).astype(np.float32)  # (N, D), what a LayerNorm gives
cases = {"no large channel": factor / factor, "six small columns": 1 / factor}
cases["six large columns"] = factor
for name, f in cases.items():
    x, weight = h / f, W * f  # x Wᵀ stays as it is
    y, found = x @ weight.T, {}
    both = {"rows": quantize.int8_rows(weight), "columns": quantize.quantize_matrix(weight, "int8")}
    for way, leaf in both.items():
        found[way] = np.linalg.norm(ops.linear(x, **leaf) - y) / np.linalg.norm(y)
    print(f"{name:<18} rows alone {found['rows']:.4f}   with columns {found['columns']:.4f}")
    assert found["columns"] < 0.008
    assert f is factor or found["rows"] < 0.1
assert found["rows"] > 0.2

# %% [markdown]
# Large columns set the scale: the other 250 are left two of 127 steps. Small columns are rounded to nothing, although the activations that they are
# multiplied by are large. The cure costs almost nothing: bring uneven columns to a common size first, by powers of two, which lose no bit, and store
# the powers in a third array beside `weight` and `scale`, `columns`. A product then multiplies $x$ by them before it begins.

# %%
show(quantize.quantize_matrix, quantize.column_sizes)

# %%
leaf = quantize.quantize_matrix(W * factor, "int8")
print("columns:", {int(c): int(leaf["columns"][c]) for c in large}, "and 1 elsewhere")
assert (np.delete(leaf["columns"], large) == 1).all()
by_rows = quantize.int8_rows(W * factor / leaf["columns"])
assert np.array_equal(leaf["weight"], by_rows["weight"])

# %% [markdown]
# ### Exercise 2: which columns are uneven
#
# A column's size is its root mean square. Its ratio to the median size decides: above 4 or below 1/4, it gets the power of two nearest to the ratio
# (to its logarithm: `np.exp2(np.rint(np.log2(ratio)))`), and all others get 1. The starter gives every column its ratio.


# %%
def my_column_sizes(weight):
    """weight: (O, I)  ->  (I)"""
    size = np.sqrt((weight**2).mean(0))
    return size / np.median(size)


check(my_column_sizes, quantize.column_sizes, (W * factor,), (W / factor,))

# %% [markdown]
# ## What the weights are multiplied with
#
# A product of integers needs integers on both sides, so $x$ is rounded, too, when the product is computed. Many engines round a token's activations
# to 8 bits, with one scale for all of them or one for each block of 32. Where large channels of $x$ are multiplied by small columns, `columns` evens
# both out, if $x$ is rounded after it was multiplied by them, as the kernel does. Where the columns are of ordinary size, nothing evens out $x$, and
# the scale must fit the largest: the table below rounds $x$ first, so that it shows this case. This project rounds $x$ to **16 bits**, with one scale
# for 384 values.
#
# Now in the whole model, with float32 weights, and with six large channels made in every LayerNorm. `linear` of a backend is all that is replaced:


# %%
class Rounding:
    """opt_np.ops with x rounded to so many bits, one scale for a token, before each product."""

    def __init__(self, bits):
        self.most = np.float32(2 ** (bits - 1) - 1)

    def __getattr__(self, name):
        return getattr(ops, name)

    def linear(self, x, weight, *others, **leaves):
        step = np.abs(x).max(-1, keepdims=True) / self.most
        return ops.linear(np.rint(x / step) * step, weight, *others, **leaves)

    def mlp(self, h, fc1, fc2, function):
        return self.linear(ops.activation(self.linear(h, **fc1), function), **fc2)


# %%
def with_large_channels(params):
    """The same function, with six channels of every LayerNorm in a block 60 times as large."""
    params = copy.deepcopy(params)
    for block in params["layers"]:
        attn = block["self_attn"]
        readers = [attn["q_proj"], attn["k_proj"], attn["v_proj"]]
        for norm, below in (("self_attn", readers), ("final", [block["fc1"]])):
            for part in block[f"{norm}_layer_norm"].values():
                part[large] *= np.float32(60)
            for linear in below:
                linear["weight"][:, large] /= np.float32(60)
    return params


# %% [markdown]
# The text is the beginning of *Moby-Dick*, which the model has not read.

# %%
text = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money
in my purse, and nothing particular to interest me on shore, I thought I would sail about a little
and see the watery part of the world. It is a way I have of driving off the spleen and regulating
the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp,
drizzly November in my soul; whenever I find myself involuntarily pausing before coffin warehouses,
and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an
upper hand of me, that it requires a strong moral principle to prevent me from deliberately
stepping into the street, and methodically knocking people's hats off, then, I account it high time
to get to sea as soon as I can. This is my substitute for pistol and ball. With a philosophical
flourish Cato throws himself upon his sword; I quietly take to the ship. There is nothing
surprising in this. If they but knew it, almost all men in their degree, some time or other,
cherish very nearly the same feelings towards the ocean with me.""".replace("\n", " ")
ids = np.array([tok.encode(text)])  # (B, T)
exact = lm(ids).logits
print(ids.shape[1], "tokens")
assert 200 < ids.shape[1] <= cfg.max_position_embeddings

# %%
trees = {"as it is": params, "six large channels": with_large_channels(params)}
assert np.allclose(model.forward(trees["six large channels"], ids, cfg), exact, atol=1e-3)
off = {}  # ‖difference from float32‖ / ‖logits‖
for shape, tree in trees.items():
    for weights in ("float32", "int8"):
        used = tree if weights == "float32" else quantize.quantized(tree, cfg, weights)[0]
        for x, backend in (("float32", ops), ("16 bits", Rounding(16)), ("8 bits", Rounding(8))):
            logits = model.forward(used, ids, cfg, ops=backend)
            off[shape, weights, x] = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
print("weights, x            as it is   six large channels")
for weights, x in ((w, x) for w in ("float32", "int8") for x in ("float32", "16 bits", "8 bits")):
    two = "   ".join(f"{off[shape, weights, x]:>9.1g}" for shape in trees)
    print(f"{weights:<9} {x:<9} {two}")
assert off["six large channels", "float32", "8 bits"] > 5 * off["as it is", "float32", "8 bits"]
for weights in ("float32", "int8"):  # 16 bits are as good as float32 beside int8 weights
    assert off["six large channels", weights, "16 bits"] < 0.006
assert off["six large channels", "int8", "float32"] < 1.2 * off["as it is", "int8", "float32"]

# %% [markdown]
# With `columns`, int8 weights do not notice the large channels; 16-bit $x$ loses nothing that can be seen beside them; 8-bit $x$ is what breaks.
# [docs/quantization.md](../docs/quantization.md) has the same on 10,000 tokens, with perplexities: +7.3 % for 8 bits a token at a time, none for
# 16.
#
# ## Through the model
#
# Where does the error of int8 weights go? `trace.record` records every step of a pass, and `trace.compare` gives the difference of two passes at each
# step, relative to its largest value:

# %%
lms, passes, compared = {"float32": lm}, {"float32": trace.record(lm, ids)}, {}
for kind in ("int8", "int4"):
    lms[kind] = OPTForCausalLM(*quantize.quantized(params, cfg, kind))
    passes[kind] = trace.record(lms[kind], ids)
    compared[kind] = trace.compare(passes["float32"], passes[kind])
    print(f"{kind}: {compared[kind].verdict().partition(': ')[2]}")
    assert compared[kind].first.name == "model.decoder.embed_tokens"
    assert compared[kind].rows[-1].name == "lm_head"

# %%
fig, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
for kind in ("int8", "int4"):
    rows = compared[kind].rows
    error = np.array([row.error or np.nan for row in rows])  # positions have none
    stream = [n for n, row in enumerate(rows) if row.name.endswith("resid_post")]
    taken = [n for n, row in enumerate(rows) if row.name.endswith("attn_output")]
    ax.semilogy(error, label=kind, lw=0.6, marker=".", ms=3)
    ax.plot(stream, error[stream], "k-", lw=1)
    ends = error[[stream[0], stream[-1]]]
ax.set_xticks(stream, [f"layer {i}" for i in range(cfg.num_hidden_layers)])
ax.legend(fontsize=8)
ax.set(title="every step of a pass against float32", xlabel="the stream after")
ax.set(ylabel="largest difference / largest value", ylim=(1e-3, 0.3))
assert ends[1] < 2 * ends[0]
assert error[taken].mean() > 1.5 * error[stream].mean()

# %% [markdown]
# The black lines are the stream after each block. It hardly gets worse from block to block: the errors of different matrices have nothing to do
# with each other, and add up like steps in random directions, while the stream grows. What attention takes from it, `attn_output`, is off by about
# twice as much, and the logits, which are read from the last stream by the rounded table of tokens, by twice to three times as much.
#
# What a reader would notice is how well the text is predicted. Perplexity, by one of the conventions of `opt_np.perplexity`:

# %%
found, likeliest = {}, passes["float32"][-1].value.argmax(-1)
for kind in lms:
    found[kind] = perplexity(lms[kind], tok, text, "lm-eval").perplexity
    agree = (passes[kind][-1].value.argmax(-1) == likeliest).mean()
    print(f"{kind:<8} perplexity {found[kind]:.1f}   the same likeliest token {agree:.0%}")
assert abs(found["int8"] / found["float32"] - 1) < 0.005
assert abs(found["int4"] / found["float32"] - 1) < 0.08

# %% [markdown]
# (On so short a text a difference of a percent is chance. On a book of which 10,000 tokens were read: +0.01 % for int8, +1.2 % for int4.)
#
# ## Exact sums
#
# `ops.linear` rebuilds the whole float32 matrix at each use: this is the specification, and slow. `opt_fast/gemm_int.py` multiplies the integers. A
# 16-bit element of $x$ times an 8-bit weight, 384 times, is at most $384 \cdot 127 \cdot 32767 < 2^{31}$: it fits a 32-bit sum, which therefore is
# exact, in any order. Only then come the scales, in float32. With integers for $x$ and scales of 1 this can be seen:

# %%
x = rng.integers(-32767, 32768, (5, 384)).astype(np.float32)
x[:, 0] = 32767  # so that one step of x is worth exactly 1
w = rng.integers(-127, 128, (40, 384)).astype(np.int8)
ones = np.ones(40, np.float32)
true = x.astype(np.int64) @ w.T.astype(np.int64)  # (5, 40), whole numbers
kernel = ops_cpu.linear(x, gemm_int.PackedIntegers(w, ones))
floats = ops.linear(x, w, scale=ones)
print("the first sum:", int(true[0, 0]), " the kernel's, as a float32:", int(kernel[0, 0]))
assert np.array_equal(kernel, true.astype(np.float32))  # each the float32 nearest to the true sum
assert not np.array_equal(floats, true.astype(np.float32))  # sums in float32 are not

# %% [markdown]
# **What is stored.** The processor multiplies pairs of 16-bit integers and adds both products of a pair to one 32-bit sum. So two neighbours in k of
# one output are needed side by side, for as many outputs as the vector has lanes. A 16-bit word holds two int8 numbers (or four int4), ordered so
# that one shift turns a vector of words into a vector of such pairs: nothing is unpacked into memory, and nothing is masked. A word that is shifted
# down to one weight still holds those above it, 256 (or 16) times as large; what they add is a multiple of the sum of the next vector's columns,
# which is subtracted at the end, exactly. The lower weight is stored with 128 added, which is subtracted as well.

# %%
show(gemm_int.word_order)

# %%
panels = gemm_int.PackedIntegers(w, ones)
columns = gemm_int.COLUMNS  # outputs side by side in a panel; how many depends on the processor
words = panels.blocks()[0][0, 0]  # the first panel's first row: two neighbours in k of each
first = np.zeros((columns, 2), np.int8)  # zeros where the panel is wider than the matrix
first[: len(w)] = w[:columns, :2]
pairs = first.T.reshape(-1)  # number k · columns + column
lower = ((words ^ 128) & 255).astype(np.uint8).view(np.int8)
upper = (words >> 8).astype(np.uint8).view(np.int8)
assert np.array_equal(lower, pairs[gemm_int.ORDER[8][0]])
assert np.array_equal(upper, pairs[gemm_int.ORDER[8][1]])
for kind in ("int8", "int4"):
    leaf = quantize.quantize_matrix(W * factor, kind)
    assert np.array_equal(np.asarray(gemm_int.PackedIntegers(**leaf)), ops.dequantized(**leaf))
    y, wanted = ops_cpu.linear(h, gemm_int.PackedIntegers(**leaf)), ops.linear(h, **leaf)
    assert np.abs(y - wanted).max() < 2e-4 * np.abs(wanted).max()

# %% [markdown]
# ## What is saved
#
# Decoding reads every weight for every token, so its time is the weights' bytes over the memory's bandwidth: half the bytes take half the time. A
# scale of 4 bytes for a row is next to nothing; int4's float16 for each 32 makes 4.5 bits of 4. Positions, biases and LayerNorms stay floats.

# %%
print("GB         float32   float16      int8      int4   bits a weight in int4")
for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"):
    big = OPTConfig.from_size(size)
    kinds = (("float32", None), ("float16", None), ("float32", "int8"), ("float32", "int4"))
    sizes = [costs.weight_bytes(big, dtype, kind) for dtype, kind in kinds]
    bits = 8 * sizes[3] / costs.parameters(big)
    print(f"{size:>5}   " + "".join(f"{n / 1e9:>10.3f}" for n in sizes) + f"   {bits:.2f}")
    assert sizes[0] > 1.9 * sizes[1] > 1.9 * 1.9 * sizes[2] > 1.9 * 1.9 * 1.6 * sizes[3]

# %%
for kind in ("int8", "int4"):
    leaves = flatten(lms[kind].params).items()
    held = sum(array.nbytes for name, array in leaves if not name.endswith("columns"))
    print(f"opt-tiny in {kind}: {held:,} bytes")
    assert held == costs.weight_bytes(cfg, "float32", kind)

# %% [markdown]
# `opt-np quantize MODEL OUT --kind int4` writes such a model as a folder, and `quantize="int8"` makes one while loading. What these bytes are worth
# in seconds, for every size and on several machines, is the subject of [notebook 11](11_what_a_token_costs.ipynb).
