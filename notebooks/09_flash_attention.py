# %% [markdown]
# # Attention without its matrix
#
# Plain attention computes a matrix of T × T scores for every head, and discards it. FlashAttention computes the same result, forward and backward,
# and never holds more than a small tile of it. At the end you will have derived it, broken it, checked its gradients, seen it run on the processor's
# vector units, and know which of a machine's two limits it moves attention away from.
#
# The papers: FlashAttention ([arXiv:2205.14135](https://arxiv.org/abs/2205.14135)) and FlashAttention-2
# ([arXiv:2307.08691](https://arxiv.org/abs/2307.08691)). $d$ is the width of a head throughout, `Dh` in the code.

# %%
import os
from functools import partial

# one thread, for the measurement near the end
os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import matplotlib.pyplot as plt
import numpy as np
from learn import check, picture, show

from opt_fast import attention_cpu, limits, ops_cpu
from opt_np import OPTConfig, costs, flash, ops
from opt_np.plan import DEVICES

rng = np.random.default_rng(0)


def random_head(T, S, Dh=8):
    return [rng.normal(size=(n, Dh)) for n in (T, S, S)]  # Q (T, Dh), K (S, Dh), V (S, Dh)


# %% [markdown]
# ## What plain attention holds
#
# $$s = \frac{Q K^\top}{\sqrt{d}}, \quad P = \mathrm{softmax}(s), \quad O = P V$$
#
# $Q$, $K$, $V$ and $O$ are as long as the text, T. The scores and the weights $P$ are T × T, for each head. `costs.steps` knows the bytes of every
# step of a pass; here are those of one layer's scores, in float32, against those of its $Q$, $K$, $V$ and $O$ together.

# %%
lengths = 2 ** np.arange(6, 12)  # 64 … 2048, OPT's context
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for color, size in zip(("C0", "C1", "C2"), ("125m", "6.7b", "175b"), strict=True):
    cfg = OPTConfig.from_size(size)
    scores = []
    for T in lengths:
        step = next(s for s in costs.steps(cfg, 1, int(T)) if s.name.endswith("attn_scores"))
        scores.append(step.written)
        assert step.written == 4 * cfg.num_attention_heads * T * T
    ax.loglog(lengths, scores, "o-", color=color, label=f"{size}: scores")
    others = 4 * 4 * lengths * cfg.hidden_size  # four arrays of float32
    ax.loglog(lengths, others, "--", color=color, label=f"{size}: Q, K, V, O")
ax.set(title="one layer, one text", xlabel="tokens T", ylabel="bytes")
ax.set_xticks(lengths, lengths)
ax.legend(fontsize=8, ncols=3)
by_layer = [s.name for s in costs.steps(cfg, 1, 8, fused=True) if "layers.0" in s.name]
assert not any(name.endswith(("attn_scores", "attn_weights")) for name in by_layer)

# %% [markdown]
# At 64 tokens the scores are the smaller part; at 2048 they are 8 times as large as all the rest, for heads of 64, and 4 times for heads of 128, as
# 6.7b and 175b have them: $HT^2/4TD = T/4d$. And they are written, read, written as weights and read again. The last assertion says that a
# *fused* attention has no such arrays. How can that be? A softmax needs the whole row: its maximum and its sum.

# %% [markdown]
# ## The safe softmax
#
# $e^{89}$ is more than float32 can hold. So one subtracts the row's maximum $m$ first, which changes nothing, as it cancels:
#
# $$\frac{e^{s_j}}{\sum_k e^{s_k}} = \frac{e^{s_j - m}}{\sum_k e^{s_k - m}}$$
#
# The largest exponent is then 0. A key that must not be seen has the score $-\infty$ and gets the weight $e^{-\infty} = 0$; a row of nothing but
# $-\infty$ would be $-\infty + \infty$, which is NaN, and is made 0 instead.

# %%
s = np.array([[1, 100, 99, -np.inf], [-np.inf] * 4], np.float32)
with np.errstate(all="ignore"):
    naive = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
print("naive:", naive[0], " and", naive[1])
print("safe: ", ops.softmax(s)[0], " and", ops.softmax(s)[1])
m = s[0].max()
assert np.allclose(ops.softmax(s)[0], np.exp(s[0] - m) / np.exp(s[0] - m).sum())
assert np.isnan(naive).any()
assert not np.isnan(ops.softmax(s)).any()

# %% [markdown]
# ## The online softmax
#
# Now suppose that the scores of a query arrive in pieces, and that we may not store them. For those that have arrived so far, keep three things:
#
# * $m$, the largest score,
# * $l = \sum_j e^{s_j - m}$, the sum under that maximum,
# * $a = \sum_j e^{s_j - m}\, v_j$, the sum of values, weighted but not yet divided.
#
# When a piece comes that holds a larger score, the new maximum is $m'$, and what was summed under the old one is too large by a known factor:
# $e^{s_j - m'} = e^{s_j - m} \cdot e^{m - m'}$. So both sums shrink by $e^{m - m'}$, and the piece is added under $m'$. At the end $O = a / l$.


# %%
def online(s, V, cuts):
    """One query: scores (S), values (S, Dh), where to cut  ->  O (Dh), L"""
    m, l, a = -np.inf, 0.0, np.zeros(V.shape[1])
    for piece, values in zip(np.split(s, cuts), np.split(V, cuts), strict=True):
        m_new = max(m, piece.max(initial=-np.inf))
        shrink, weights = np.exp(m - m_new), np.exp(piece - m_new)
        l, a, m = l * shrink + weights.sum(), a * shrink + weights @ values, m_new
    return a / l, m + np.log(l)


s, V = rng.normal(size=40) * 30, rng.normal(size=(40, 8))
for _ in range(200):
    cuts = np.sort(rng.integers(1, 40, rng.integers(0, 12)))  # of any lengths, and empty pieces
    O, L = online(s, V, cuts)
    assert np.allclose(O, ops.softmax(s) @ V, rtol=1e-12)
    assert np.isclose(L, np.log(np.exp(s - s.max()).sum()) + s.max(), rtol=1e-12)
print("200 ways to cut 40 scores, one result")

# %% [markdown]
# $L = m + \log l = \log \sum_j e^{s_j}$ comes with it: one number for each query, from which any of its weights can be recomputed:
# $P_j = e^{s_j - L}$. The backward pass depends on that.

# %% [markdown]
# ### Where to begin
#
# $m$ begins at $-\infty$, and it matters. A maximum that begins at 0 (or at `1e-30`, a "very small number" that is not small in the sense that is
# meant) never falls to where the scores are. With scores near −200, every exponential is then 0 in float32, and the result is 0/0.

# %%
low = np.float32([-200, -201, -199.5])
for start in (-np.inf, 0, 1e-30, -1e30):
    m = np.maximum(np.float32(start), low.max())
    weights = np.exp(low - m)
    print(f"m begins at {start:>6}: weights {weights}, sum {weights.sum():.4f}")
    assert (weights.sum() > 0) == (start < 0)
assert np.allclose(ops.softmax(low), np.exp(low + 199.5) / np.exp(low + 199.5).sum())

# %% [markdown]
# A large negative number such as `-1e30` works here, and fails elsewhere: if hidden keys also get that score, a query that sees nothing has the
# weights $e^0 = 1$ and returns the mean of what it must not see. With $-\infty$ for both, "nothing" stays nothing.

# %%
finite, infinite = np.full(3, -1e30, np.float32), np.full(3, -np.inf, np.float32)
weights = np.exp(finite - finite.max())
print("hidden by -1e30:", weights, " by -inf:", ops.softmax(infinite))
assert weights.sum() == 3
assert not ops.softmax(infinite).any()

# %% [markdown]
# ## Tiles
#
# FlashAttention-2 does this for a block of queries at once. A **tile** is Br queries × Bc keys: their scores are computed, used, and discarded. This
# is the whole algorithm in NumPy, for one head, and the specification of every kernel in this project:

# %%
show(flash.attention, flash.tile_scores)

# %% [markdown]
# Two lines are there for what can go wrong: `safe`, for a query that has seen nothing yet, and `seen`, for one that never does. Whatever the tile,
# it is plain attention:

# %%
Q, K, V = random_head(37, 37)
scale = 8**-0.5
q, k, v = (a[None, :, None] for a in (Q, K, V))  # (B, T, H, Dh): one row, one head
plain = ops.attention(q, k, v, scale)[0, :, 0]  # (T, Dh)
for Br, Bc in ((1, 1), (4, 7), (16, 16), (64, 64), (5, 100)):
    O, L = flash.attention(Q, K, V, scale, Br=Br, Bc=Bc)
    print(f"tiles of {Br:>2} × {Bc:<3} within 1e-14: {np.abs(O - plain).max() < 1e-14}")
    assert np.allclose(O, plain, rtol=1e-12, atol=1e-14)

# %% [markdown]
# A causal query does not see the keys after it, so tiles above the diagonal need not be computed: the inner loop ends before them. To see which are,
# replace `tile_scores` by a function that records its calls:


# %%
def tiles(T, S, Br, Bc):
    """How often each pair of a query and a key is computed: (T, S)"""
    computed, original = np.zeros((T, S)), flash.tile_scores

    def noting(Q, K, scale, visible, rows, cols, past):
        computed[rows, cols] += 1
        return original(Q, K, scale, visible, rows, cols, past)

    flash.tile_scores = noting
    flash.attention(*random_head(T, S), 1.0, Br=Br, Bc=Bc)
    flash.tile_scores = original
    return computed


# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained", width_ratios=(1, 1, 1.3))
cases = (48, 48, 8, 8), (48, 48, 16, 4), (16, 48, 8, 8)
for ax, (T, S, Br, Bc) in zip(axes, cases, strict=True):
    computed, needed = tiles(T, S, Br, Bc), np.tri(T, S, S - T)
    title = f"T = {T}, S = {S}, tiles {Br} × {Bc}: {needed.sum() / computed.sum():.0%} of it used"
    picture(computed + needed, title=title, ax=ax, vmin=0, vmax=2)
    ax.set(xlabel="key", ylabel="query")
    assert computed.max() == 1  # nothing twice
    assert (computed >= needed).all()  # and all that is needed

# %% [markdown]
# Dark: pairs that are used. Light: computed with a tile on the diagonal, then hidden. White: never computed, about half of the square.
#
# ### Exercise 1: the running maximum
#
# Write causal attention for one head, two keys at a time, without ever holding a row of scores. The starter tracks the maximum, but forgets to shrink
# its sums when the maximum grows. The formulas are in the section on the online softmax; `L` is $m + \log l$.


# %%
def my_attention(Q, K, V, scale):
    """Q, K, V: (T, Dh)  ->  (T, Dh), (T)"""
    m, l, acc = np.full(len(Q), -np.inf), np.zeros(len(Q)), np.zeros(Q.shape)
    for j in range(0, len(K), 2):
        scores = scale * Q @ K[j : j + 2].T  # (T, 2)
        scores[np.arange(j, j + scores.shape[1]) > np.arange(len(Q))[:, None]] = -np.inf
        m = np.maximum(m, scores.max(1))
        P = np.exp(scores - m[:, None])
        l = l + P.sum(1)
        acc = acc + P @ V[j : j + 2]
    return acc / l[:, None], m + np.log(l)


check(my_attention, flash.attention, (*random_head(7, 7), 0.5), (*random_head(9, 9), 400.0))

# %% [markdown]
# `check` gives two heads, the second with scores in the hundreds, which no softmax survives without its maximum. The package's own answer is
# `flash.attention`, above.

# %% [markdown]
# ## Fewer queries than keys
#
# When a text is continued, the new tokens are the last ones, and their keys come after those in the cache: T queries against S keys, T < S. The
# causal mask is **aligned to the end**: query t is at key S − T + t. (Aligned to the start, a single new token would see nothing but the first key.)
# So computing only the last queries gives the last rows of computing all, the third picture above:

# %%
Q, K, V = random_head(20, 20)
whole, _ = flash.attention(Q, K, V, scale, Br=4, Bc=4)
for T in (1, 3, 19):
    last, _ = flash.attention(Q[-T:], K, V, scale, Br=4, Bc=4)
    assert np.allclose(last, whole[-T:], rtol=1e-12)
wrong = ops.softmax(scale * Q[-1:] @ K[:1].T) @ V[:1]  # aligned to the start
assert np.array_equal(wrong, V[:1])
assert not np.allclose(wrong, whole[-1:])

# %% [markdown]
# Padding hides keys, and then a query may see none at all: the pads in front of a text have only pads before them. They get exactly 0, and $L =
# -\infty$, and nothing becomes NaN:

# %%
visible = np.arange(20) >= 5  # five pads in front
O, L = flash.attention(Q, K, V, scale, visible, Br=4, Bc=4)
alone, _ = flash.attention(Q[5:], K[5:], V[5:], scale, Br=4, Bc=4)
assert not O[:5].any()
assert (L[:5] == -np.inf).all()
assert np.isfinite(O).all()
assert np.allclose(O[5:], alone, rtol=1e-12)  # as if the pads were not there

# %% [markdown]
# ## The backward pass
#
# Given $dO$, how the loss changes with each element of $O$, we want $dQ$, $dK$, $dV$. With $P$ known:
#
# $$dV = P^\top dO, \quad dP = dO\,V^\top, \quad ds_{ij} = P_{ij}\Big(dP_{ij} - \sum_k P_{ik}\,dP_{ik}\Big), \quad dQ = \frac{ds\,K}{\sqrt d},
# \quad dK = \frac{ds^\top Q}{\sqrt d}$$
#
# Two things need a whole row: $P$, and the sum in the middle. $P$ can be recomputed, tile by tile, from $L$. And the sum needs no row at all:
#
# $$D_i = \sum_j P_{ij}\,dP_{ij} = \sum_j P_{ij} \sum_c dO_{ic} V_{jc} = \sum_c dO_{ic} \sum_j P_{ij} V_{jc} = \sum_c dO_{ic}\, O_{ic}$$

# %%
show(flash.attention_bwd)

# %%
Q, K, V = random_head(11, 17)
dO = rng.normal(size=Q.shape)
O, L = flash.attention(Q, K, V, scale)
P = ops.attention_probs(Q[None, :, None], K[None, :, None], scale)[0, 0]  # (T, S), to look at
seen = P > 0
assert np.allclose(np.exp(scale * Q @ K.T - L[:, None])[seen], P[seen])  # the weights again, from L
assert np.allclose((P * (dO @ V.T)).sum(1), (dO * O).sum(1))  # D needs no row of P

# %% [markdown]
# Three judges: plain attention's backward pass in `ops`, any tile, and finite differences, which know nothing of the derivation: move one number a
# little, and see how $\sum dO \cdot O$ moves.

# %%
grads = flash.attention_bwd(dO, Q, K, V, O, L, scale, Br=4, Bc=4)
q, k, v, o, do = (a[None, :, None] for a in (Q, K, V, O, dO))  # (1, T, 1, Dh)
all_plain = ops.attention_bwd(do, q, k, v, o, L[None, :, None], scale)
for ours, plain in zip(grads, all_plain, strict=True):
    assert np.allclose(ours, plain[0, :, 0], rtol=1e-10, atol=1e-13)
for name, array, grad in zip("QKV", (Q, K, V), grads, strict=True):
    slopes = np.zeros(array.shape)
    for at in np.ndindex(array.shape):
        kept, ends = array[at], []
        for step in (1e-5, -1e-5):
            array[at] = kept + step
            ends.append((dO * flash.attention(Q, K, V, scale)[0]).sum())
        array[at], slopes[at] = kept, (ends[0] - ends[1]) / 2e-5
    print(f"d{name}: {grad.size} slopes agree: {np.allclose(slopes, grad, rtol=1e-6, atol=1e-8)}")
    assert np.allclose(slopes, grad, rtol=1e-6, atol=1e-8)

# %% [markdown]
# ### Exercise 2: the backward pass, in one tile
#
# Here all of $P$ may be held. The starter leaves out $D$; everything else is there. (The package's own answer is the inner loop above.)


# %%
def my_attention_bwd(dO, Q, K, V, O, L, scale):
    """dO, Q, O: (T, Dh);  K, V: (S, Dh);  L: (T)  ->  dQ (T, Dh), dK (S, Dh), dV (S, Dh)"""
    scores = scale * Q @ K.T
    scores[np.triu(np.ones(scores.shape, bool), len(K) - len(Q) + 1)] = -np.inf
    P = np.exp(scores - L[:, None])
    dP = dO @ V.T
    dscores = P * dP * scale
    return dscores @ K, dscores.T @ Q, P.T @ dO


check(my_attention_bwd, flash.attention_bwd, (dO, Q, K, V, O, L, scale))

# %% [markdown]
# ## The same on the processor's vectors
#
# NumPy's `flash.py` is clear, and not fast: tiles are small, and each line of it is a call. `opt_fast/attention_cpu.py` is the same algorithm in
# Numba, which compiles Python to machine code. Three ideas make it fast.
#
# **Lanes.** A processor's vector register holds several float32, its *lanes*: 8 with AVX2, 16 with AVX-512, 4 with NEON; one instruction multiplies
# and adds in all of them. **A tile in registers.** The micro-kernel of the matrix products (`gemm.py`) keeps rows × columns of a result in
# registers, and in each step takes one number of k: a column of x times a row of a panel, added to the tile. A step loads `rows + columns` numbers
# and does `rows · columns` products. In NumPy:


# %%
def micro_kernel(tile, x, panel):
    """tile (R, C) += x (R, n) times panel (n, C)"""
    for k in range(x.shape[1]):
        tile += x[:, k, None] * panel[k]  # in the real one the tile never leaves the registers
    return tile


Q, K, V = random_head(6, 16)
scores = micro_kernel(np.zeros((6, 16)), Q * scale, K.T)  # n runs over d: keys packed as columns
weights = np.exp(scores - scores.max(1, keepdims=True))
acc = micro_kernel(np.zeros((6, 8)), weights, V)  # n runs over the keys: values as they are
assert np.allclose(scores, scale * Q @ K.T)
assert np.allclose(acc / weights.sum(1, keepdims=True), ops.softmax(scale * Q @ K.T) @ V)

# %% [markdown]
# Both products of attention are this one kernel: with $K$ packed as columns, and with the weights as x and $V$ as it lies. Between the two, a row
# of scores becomes weights. These are the kernels' own lines (`at(p, n)` is the address n numbers after p; a group is as many queries as the tile
# has rows; `many` and `one` are gemm's micro-kernel for many rows and for one):

# %%
show(attention_cpu.score.py_func, attention_cpu.softmax.py_func)

# %% [markdown]
# You know `softmax`: $m$, $l$ and $a$, shrunk only when the maximum has grown. `maximum` and `exponentials` work on whole vectors of lanes; the
# exponential is a polynomial, since processors have no instruction for it.
#
# **Threads.** A task is a head and a block of its queries. Tasks share nothing that is written, so each thread takes the next one from a counter
# until none is left; no sum is ever split between two threads, and the result has the same bits with any number of them.

# %%
sizes = (2, 150, 3, 64), (2, 400, 3, 64), (2, 400, 3, 64)  # (B, T, H, Dh), twice (B, S, H, Dh)
q, k, v = (rng.normal(size=size).astype(np.float32) for size in sizes)
fast, plain = ops_cpu.attention(q, k, v, 0.125), ops.attention(q, k, v, 0.125)
exact = ops.attention(*(a.astype(np.float64) for a in (q, k, v)), 0.125)
error, numpys = np.abs(fast - exact).max(), np.abs(plain - exact).max()
print("as near to float64 as NumPy's float32, within a factor of two:", error <= 2 * numpys)
assert error <= 2 * numpys
alone = ops_cpu.attention(q[1:, -1:], k[1:], v[1:], 0.125)  # one query of one row, as in decoding
assert np.array_equal(alone, fast[1:, -1:])  # equal bits

# %%
O, L = attention_cpu.attention_lse(q, k, v, 0.125, None)
dO = rng.normal(size=q.shape).astype(np.float32)
all_ours, all_plain = (o.attention_bwd(dO, q, k, v, O, L, 0.125) for o in (ops_cpu, ops))
for ours, plain in zip(all_ours, all_plain, strict=True):
    assert np.allclose(ours, plain, rtol=1e-3, atol=1e-4)
print("forward and backward agree with NumPy")

# %% [markdown]
# ## Which limit?
#
# A machine has two limits: FLOPs in a second, and bytes in a second that memory delivers. Which of them applies depends on the **arithmetic
# intensity**, the FLOPs that are done for each byte moved:
#
# $$\text{FLOP/s} \le \min(\text{peak},\ \text{intensity} \times \text{bandwidth})$$
#
# Plain attention does $(4d_h + 5)$ FLOPs for each pair of a query and a key that it sees, about $T^2/2$ of them, and moves four arrays of $T^2$
# float32: however long the text, its intensity stays below $(4 d_h + 5)/32$, 8 for heads of 64. Flash attention moves only $Q$, $K$, $V$ and $O$:
# its intensity grows with T. (If $K$ and $V$ do not fit into fast memory, they are read once for each block of Br queries; then it is about Br/2.)


# %%
def intensity(cfg, T, past=0, fused=False):
    """FLOP per byte of one layer's attention, from the closed forms of costs.py"""
    names = ("attn_scores", "attn_weights", "attn_output")
    steps = [s for s in costs.steps(cfg, 1, T, past, fused=fused) if "layers.0" in s.name]
    steps = [s for s in steps if s.name.endswith(names)]
    return sum(s.flops for s in steps) / sum(s.bytes for s in steps)


cfg = OPTConfig.from_size("125m")  # heads of 64
for T in (64, 256, 1024, 2048):
    plain, tiled = intensity(cfg, T), intensity(cfg, T, fused=True)
    print(f"T = {T:>4}: plain {plain:5.2f}, flash {tiled:6.2f} FLOP/byte")
    assert plain < (4 * 64 + 5) / 32 < tiled
one_token = intensity(cfg, 1, past=1023, fused=True)
print(f"decoding, one query, 1024 keys: {one_token:.2f}")
assert np.isclose(intensity(cfg, 2048, fused=True) / intensity(cfg, 1024, fused=True), 2, rtol=0.01)
assert np.isclose(one_token, 261 / (2 * 64 * 4), rtol=0.01)

# %% [markdown]
# The machine's limits are measured by `opt_fast.limits`: the fastest read of a large array, and the fastest float32 product of NumPy. One core is
# measured; the first cell asked for one thread. **The numbers on the left are this machine's, at this moment; they vary, and nothing depends on
# them.** NumPy's plain attention here makes whole scores and whole weights, as the formulas say; beside it, the kernels.


# %%
def plain_attention(q, k, v, scale):
    P = ops.softmax(ops.attention_scores(q, k, scale))  # (B, H, T, S)
    return (P @ v.swapaxes(1, 2)).swapaxes(1, 2)


bandwidth = max(limits.bandwidth(1, 2**27) for _ in range(3))
matmul = max(limits.matmul(1024) for _ in range(3))
points = {"plain": [], "flash": []}
for T in (128, 256, 512, 1024):
    q, k, v = (rng.normal(size=(1, T, 4, 64)).astype(np.float32) for _ in range(3))
    flops = 4 * (4 * 64 + 5) * T * (T + 1) / 2

    plain = partial(plain_attention, q, k, v, 0.125)
    kernel = partial(ops_cpu.attention, q, k, v, 0.125)
    assert np.allclose(plain(), kernel(), atol=1e-5)
    seconds = [min(limits.fastest(f) for _ in range(4)) for f in (plain, kernel)]
    points["plain"].append((intensity(cfg, T), flops / seconds[0]))
    points["flash"].append((intensity(cfg, T, fused=True), flops / seconds[1]))

# %%
I = np.geomspace(0.1, 2000, 200)
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
_, *h200 = DEVICES["h200"]  # bytes/s and FLOP/s, as its maker states them
axes[0].loglog(I, np.minimum(I * bandwidth, matmul) / 1e9, "k-", label="limits, as measured")
axes[1].loglog(I, np.minimum(I * h200[0], h200[1]) / 1e9, "k-", label="limits, as stated")
for name, mark in (("plain", "s"), ("flash", "o")):
    x, y = np.array(points[name]).T
    axes[0].loglog(x, y / 1e9, mark, label=f"{name}, T = 128 … 1024")
softmax = (5 * 2049 / 2 + 2) / (8 * 2048)  # FLOP per byte of that step, T = 2048
whole, tiled = intensity(cfg, 2048), intensity(cfg, 2048, fused=True)
places = {"decoding": one_token, "softmax alone": softmax, "plain": whole, "flash": tiled}
titles = {"one core of this machine, float32": 1, "an H200, 16 bits": 2}
for ax, (title, factor) in zip(axes, titles.items(), strict=True):
    for name, x in places.items():  # half the bytes, twice the intensity
        ax.axvline(x * factor, color="grey", lw=0.8, ls=":")
        ax.annotate(name, (x * factor, 0.04), xycoords=("data", "axes fraction"), rotation=90)
    ax.set(title=title, xlabel="FLOP for each byte moved", ylabel="GFLOP/s")
    ax.legend(fontsize=8, loc="center right")

# %%
steps = [s for s in costs.steps(cfg, 1, 2048) if s.name.endswith("layers.0.self_attn.attn_weights")]
assert np.isclose(steps[0].flops / steps[0].bytes, softmax)
assert 2 * whole < h200[1] / h200[0] < 2 * tiled

# %% [markdown]
# On a GPU the bend of the roofline is far to the right: an H200 could do some 200 FLOPs while a byte arrives. Plain attention as a whole is on the
# slope there, at a thirteenth of what the arithmetic could do; flash attention at 2048 tokens is beyond the bend. (Nothing here was run on a GPU.)
#
# A processor's core bends earlier. Taken as a whole, plain attention need not wait for memory; but it is three steps one after the other, and the
# softmax alone, 5 FLOPs for each pair, stands on the slope; it passes over T × T numbers several times, and works above the diagonal, too. Where the
# scores fit into the processor's cache, they are not read from memory.
#
# Decoding, with one query, is far to the left whatever the algorithm: every key is read for two products and used once. No tile helps there, only
# fewer bytes ([notebook 10](10_int8_and_int4.ipynb)), and for the weights more rows at once ([notebook 11](11_what_a_token_costs.ipynb)).

# %% [markdown]
# ## And on a GPU?
#
# The kernels for GPUs ([docs/gpu.md](../docs/gpu.md)) read beside `flash.py`: `attention_numba.py` climbs from a naive kernel to this algorithm, and
# `kernels/flash_fwd_mma.cu` has it on tensor cores. Nothing in this notebook has been run on a GPU. What is the same: tiles, $m$, $l$ and $a$, the
# division at the end, $L$ and $D$. What differs: a block of threads takes a head and Br queries; its tiles are in shared memory, up to some 200 KB,
# which it fills itself while it computes; the products are done by tensor cores, in 16 bits with float32 sums; and with one query there are too few
# blocks to fill the machine, so the keys are split between blocks, and partial results are merged. The merging is the online softmax once more: two
# triples $(m, l, a)$ make one.

# %%
Q, K, V = random_head(1, 30)
parts = [flash.attention(Q, K[c], V[c], scale) for c in (slice(0, 11), slice(11, 30))]
Ls = np.array([L[0] for _, L in parts])
shares = ops.softmax(Ls)  # a part's share is exp(L), of all
merged = sum(share * O for share, (O, _) in zip(shares, parts, strict=True))
O, L = flash.attention(Q, K, V, scale)
assert np.allclose(merged, O, rtol=1e-12)
assert np.isclose(np.logaddexp(*Ls), L[0], rtol=1e-12)

# %% [markdown]
# Attention's matrix is gone, and its result is the same. What is left to move are the weights: [notebook 10](10_int8_and_int4.ipynb) makes them
# integers of 8 and 4 bits.
