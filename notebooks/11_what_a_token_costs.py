# %% [markdown]
# # What a token costs
#
# Parameters, operations, bytes, and the seconds that follow from them can be computed before anything is loaded. This notebook computes them for all
# nine sizes of OPT, counts what the shipped model actually does, and asserts that both are equal, step by step. Then you will know why one token
# takes as long as it takes, what 8 bits and a batch are worth, and when a cache is larger than its model.

# %%
import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, show

from opt_np import OPTConfig, OPTForCausalLM, costs, plan, trace
from opt_np.cli import main
from opt_np.config import SIZES, parameter_shapes
from opt_np.init import init_params
from opt_np.kv_cache import KVCache

configs = {size: OPTConfig.from_size(size) for size in SIZES}
print("  ".join(SIZES))

# %% [markdown]
# ## Parameters
#
# With $D$ the width, $L$ layers, $V = 50272$ tokens and 2048 + 2 positions, count the tensors of a block: four matrices of attention, $4D^2$; the
# mlp's two, $D \times 4D$ each, $8D^2$; biases $4D + 4D + D = 9D$; two LayerNorms, $4D$. Then the two tables and the last LayerNorm:
#
# $$\text{parameters} = L\,(12 D^2 + 13 D) + V D + 2050\, D + 2 D$$
#
# The head is the table of tokens again, and costs nothing. One size is different: **opt-350m** has a table of width 512, two matrices between 512
# and 1024, and no last LayerNorm.

# %%
print(" size   layers  heads  width       parameters   12 L D²")
for size, (L, H, D) in SIZES.items():
    cfg = configs[size]
    W = cfg.word_embed_proj_dim
    by_hand = L * (12 * D**2 + 13 * D) + cfg.vocab_size * W + 2050 * D
    by_hand += 2 * D * W if size == "350m" else 2 * D
    print(f"{size:>5}   {L:>6}  {H:>5}  {D:>5}  {by_hand:>15,}   {12 * L * D**2 / by_hand:>6.1%}")
    assert by_hand == costs.parameters(cfg)

# %% [markdown]
# For the large ones, $12 L D^2$ is nearly all. Where the parameters are:


# %%
def part_of(name):
    """Which part of the model a tensor belongs to."""
    if name.startswith(("embed", "project")):
        return "embeddings"
    if "layer_norm" in name:
        return "norms"
    return "attention" if "self_attn." in name else "mlp"


parts = {part: np.zeros(9) for part in ("embeddings", "attention", "mlp", "norms")}
for n, cfg in enumerate(configs.values()):
    for name, shape in parameter_shapes(cfg).items():
        parts[part_of(name)][n] += np.prod(shape)
totals = sum(parts.values())
assert np.array_equal(totals, [costs.parameters(cfg) for cfg in configs.values()])

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
below = np.zeros(9)
for part, sizes in parts.items():
    axes[0].bar(list(SIZES), sizes / totals, bottom=below, label=part)
    below += sizes / totals
axes[0].set(title="where the parameters sit", ylabel="share")
axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
axes[1].loglog([c.hidden_size for c in configs.values()], totals, "o-")
for size, cfg, total in zip(SIZES, configs.values(), totals, strict=True):
    axes[1].text(cfg.hidden_size * 1.05, total * 0.7, size, fontsize=8)
axes[1].set(title="nine sizes", xlabel="width D", ylabel="parameters", xlim=(600, 18000))
assert np.allclose(below, 1)
assert parts["embeddings"][0] > 0.3 * totals[0]
assert parts["embeddings"][-1] < 0.01 * totals[-1]
assert np.allclose(parts["mlp"] / parts["attention"], 2, rtol=0.01)

# %% [markdown]
# A third of 125m is its tables; of 175b, less than a hundredth. Everywhere the mlp has twice the parameters of attention.
#
# ### Exercise 1: count them
#
# Write the count from a config: `cfg.hidden_size`, `cfg.num_hidden_layers`, `cfg.vocab_size`, `cfg.word_embed_proj_dim` (the width $W$ of the
# table; $2DW$ more for the two matrices if `cfg.has_projections`), `cfg.has_final_layer_norm`. `check` gives 125m, 350m and 175b.


# %%
def my_parameters(cfg):
    """Numbers of an OPT with biases and tied tables."""
    return 12 * cfg.num_hidden_layers * cfg.hidden_size**2


check(my_parameters, costs.parameters, *((configs[size],) for size in ("125m", "350m", "175b")))

# %% [markdown]
# (The package's own, `costs.parameters`, adds up `config.parameter_shapes`.)
#
# ## Operations
#
# A matrix $(O, I)$ times a vector takes $I$ multiplications and about as many additions for each of $O$ results: $2 \cdot O \cdot I$, **two for
# each parameter**. That is nearly all that a token costs. Exactly, for a token after $S - 1$ others, with everything that `costs.py` counts (a bias
# 1, a LayerNorm $7D + 5$, softmax 5 for each key and 2 a head, relu 1, a sum 1):


# %%
def flops_of_a_token(cfg, S):
    """One new token that sees S keys, itself among them; pre-norm, with biases."""
    L, D, H, Dh = cfg.num_hidden_layers, cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
    matrices = 2 * 12 * D**2 + 9 * D  # and biases
    attention = D + H * (S * (4 * Dh + 5) + 2)  # q · scale, q kᵀ, softmax, P v
    rest = 2 * (7 * D + 5) + 4 * D + 2 * D  # two norms, relu, two sums
    return L * (matrices + attention + rest) + D + (7 * D + 5) + 2 * cfg.vocab_size * D


print("FLOPs of a token / 2 · parameters\n size    first    128th   2048th")
for size, cfg in configs.items():
    counted = {S: sum(step.flops for step in costs.steps(cfg, 1, 1, S - 1)) for S in (1, 128, 2048)}
    ratios = [flops / 2 / costs.parameters(cfg) for flops in counted.values()]
    print(f"{size:>5}   " + "  ".join(f"{ratio:>6.3f} " for ratio in ratios))
    assert 0.98 < ratios[0] < 1.001
    assert ratios[2] < 1.31
    if size != "350m":  # which is post-norm and has two matrices more
        assert all(flops == flops_of_a_token(cfg, S) for S, flops in counted.items())

# %% [markdown]
# Without a past, $2 \cdot \text{parameters}$ is right to two per cent (looking up a position costs nothing, so its table does not count). Attention
# adds $L H S\,(4 d_h + 5) \approx 4 L D S$, which no parameter accounts for, and which grows with the context:

# %%
contexts = 2 ** np.arange(0, 15)
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for size in ("125m", "1.3b", "175b"):
    cfg, share = configs[size], []
    for S in contexts:
        steps = costs.steps(cfg, 1, 1, int(S) - 1)
        own = [s.flops for s in steps if ".attn_" in s.name]
        share.append(sum(own) / sum(s.flops for s in steps))
    ax.semilogx(contexts, share, "o-", ms=3, label=size)
    print(f"{size:>4}: {share[11]:.1%} at 2048 keys")
    assert np.all(np.diff(share) > 0)
ax.axvline(2048, color="grey", ls=":", lw=0.8)
ax.text(1900, 0.6, "OPT's context", fontsize=8, ha="right")
ax.set(title="attention's share of a token's FLOPs", xlabel="keys seen", ylabel="share")
ax.legend(fontsize=8)
assert share[11] < 0.03  # 175b

# %% [markdown]
# ## Counted while it runs
#
# Formulas can be wrong. `trace.record` runs the model and counts from the arrays that each operation takes and returns: FLOPs, bytes of weights,
# bytes of activations read and written. Here is the shipped model reading seven tokens, then one more from the cache, each against `costs.steps`:

# %%
lm = OPTForCausalLM.from_pretrained(MODEL)
counts = ("name", "shape", "flops", "weights", "read", "written")


def same(recorded, formula):
    """Asserts that every step of a run has the name, shape and counts of the closed form."""
    for ran, said in zip(recorded, formula, strict=True):
        for count in counts:
            assert getattr(ran, count) == getattr(said, count), (ran.name, count)
    return f"{len(formula)} steps, {sum(s.flops for s in formula):,} FLOPs, equal"


ids, cache = np.array([[2, 133, 812, 1163, 9, 5, 77]]), KVCache()
prefill = trace.record(lm, ids, cache=cache)
decode = trace.record(lm, [[42]], cache=cache)
print("prefill:       ", same(prefill, costs.steps(lm.config, 1, 7)))
print("decode:        ", same(decode, costs.steps(lm.config, 1, 1, past=7)))
fused = trace.record(lm, np.repeat(ids, 3, 0), fused=True)  # which cannot see the residual sums
said = [s for s in costs.steps(lm.config, 3, 7, fused=True) if "resid" not in s.name]
print("3 rows, fused: ", same(fused, said))

# %%
print(f"{'the new token, layer 0':<32}{'':<22}{'FLOPs':>9}{'bytes':>12}")
for s in decode[3:17]:
    print(f"{trace.short(s.name):<32}{s.equation:<22}{s.flops:>9,}{s.bytes:>12,}")
print(trace.total(decode))
assert sum(s.flops for s in decode) == flops_of_a_token(lm.config, 8)

# %% [markdown]
# ### opt-350m
#
# The exception: its LayerNorms come after the sums, there is none at the end, and `project_in` and `project_out` bring 512 to 1024 and back. A random
# model of that kind, three layers deep and small, counts as the formulas say. The int8 model's FLOPs are equal, too; so are its bytes, except for one
# array, `columns`:

# %%
sizes = {"num_hidden_layers": 3, "hidden_size": 64, "ffn_dim": 256, "word_embed_proj_dim": 32}
odd = OPTConfig.from_size("350m", num_attention_heads=4, vocab_size=500, **sizes)
small = OPTForCausalLM(init_params(odd), odd)
print("350m's kind:  ", same(trace.record(small, [[2, 9, 8, 7]]), costs.steps(odd, 1, 4)))
int8 = OPTForCausalLM.from_pretrained(MODEL, quantize="int8")
ran, said = trace.record(int8, ids), costs.steps(int8.config, 1, 7, kind="int8")
more = {r.name: r.weights - s.weights for r, s in zip(ran, said, strict=True)}
extra = {trace.short(name): n for name, n in more.items() if n}
print("opt-tiny, int8: bytes that the formula does not have:", extra)
assert [r.flops for r in ran] == [s.flops for s in said]
assert all(name.endswith("fc2") and n == 4 * 1024 for name, n in extra.items())

# %% [markdown]
# The int8 model differs in the leaf `columns` ([notebook 10](10_int8_and_int4.ipynb)), which the closed form cannot know: it depends on the
# weights. Here some `fc2` have it, 1024 float32 each. What the projections of the real 350m cost:

# %%
cfg = configs["350m"]
steps = {step.name.rpartition(".")[2]: step for step in costs.steps(cfg, 1, 1)}
for name in ("project_in", "project_out", "lm_head"):
    print(f"{name:<12} {steps[name].shape}  {steps[name].flops:>11,} FLOPs")
wide = OPTConfig.from_size("350m", word_embed_proj_dim=1024)
saved = costs.parameters(wide) - costs.parameters(cfg)
print(f"parameters that a table of 512 saves: {saved:,}")
assert steps["project_in"].flops == steps["project_out"].flops == 2 * 512 * 1024
assert saved == cfg.vocab_size * 512 - 2 * 512 * 1024

# %% [markdown]
# ## Bytes
#
# To produce one token, every weight has to be read from memory once, and so have the keys and values of all tokens before it: $2 L D$ numbers for
# each. (Of the table of tokens one row is looked up, but as the head it is read whole.)

# %%
show(costs.cache_bytes)

# %%
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for color, size in zip(("C0", "C1", "C2"), ("125m", "6.7b", "175b"), strict=True):
    cfg = configs[size]
    passes = [costs.steps(cfg, 1, 1, int(S), "float16", fused=True) for S in contexts]
    moved = [plan.work(steps).bytes for steps in passes]
    cached = [costs.cache_bytes(cfg, 1, int(S)) for S in contexts]
    ax.loglog(contexts, moved, "-", color=color, label=f"{size}: all that is moved")
    ax.loglog(contexts, cached, ":", color=color, label=f"{size}: keys and values")
    weights = costs.weight_bytes(cfg, "float16")
ax.axvline(2048, color="grey", ls=":", lw=0.8)
ax.legend(fontsize=7, ncols=3)
ax.set(title="for one token: float16 weights, float32 keys and values")
ax.set(xlabel="tokens before it", ylabel="bytes")
assert abs(moved[0] / weights - 1) < 0.1  # 175b
assert moved[-1] - moved[0] == costs.cache_bytes(cfg, 1, int(contexts[-1] - contexts[0]))

# %% [markdown]
# ## Reading a prompt, and writing
#
# A prompt of T tokens uses each weight T times once it has been read; a decoding step uses it once. So the two are on different sides of the
# machine's limits ([notebook 9](09_flash_attention.ipynb)): FLOPs for each byte moved, against what the machine can do while a byte arrives. A step
# takes at least
#
# $$\max\left(\frac{\text{bytes}}{\text{bandwidth}},\ \frac{\text{FLOPs}}{\text{FLOP/s}}\right)$$
#
# The machines are H100 and H200 as their maker states them (16 bits; `plan.DEVICES`), and an imagined laptop with 16 GB, 20 GB/s and 200 GFLOP/s.
# **These are lower bounds on the time, not measurements**; nothing here was run on a GPU. Weights are stored in the type named, and everything
# computed, keys and values included, in 16 bits (`number=2`).

# %%
machines = {"laptop": (16e9, 20e9, 200e9)}  # bytes, bytes/s, FLOP/s
machines |= {name: stated[:3] for name, stated in plan.DEVICES.items()}


def token_step(cfg, dtype, kind=None, batch=1, past=512):
    """FLOPs and bytes of one more token for each row of a batch."""
    return plan.work(costs.steps(cfg, batch, 1, past, dtype, kind, fused=True, number=2))


cfg = configs["6.7b"]
first, step = plan.prefill(cfg, 1, 512, "float16", number=2), token_step(cfg, "float16")
for name, work in (("prefill of 512", first), ("one more token", step)):
    print(f"opt-6.7b, {name}: {work.flops / work.bytes:6.1f} FLOP/byte")
for name, (_, bandwidth, flops) in machines.items():
    times = [work.seconds(bandwidth, flops) for work in (first, step)]
    seconds = f"{times[0]:7.4f} s, then {times[1]:.4f} s a token"
    print(f"{name:>6}, bend at {flops / bandwidth:5.1f}: {seconds}")
    assert step.flops / step.bytes < 1.1 < flops / bandwidth  # decoding waits for memory
    assert np.isclose(times[1], step.bytes / bandwidth)

# %%
kinds = {"float16": ("float16", None), "int8": ("float32", "int8"), "int4": ("float32", "int4")}
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
for ax, (name, (room, bandwidth, flops)) in zip(axes, machines.items(), strict=True):
    for color, (label, kind) in zip(("C0", "C1", "C2"), kinds.items(), strict=True):
        works = [token_step(c, *kind) for c in configs.values()]
        ms = 1e3 * np.array([work.seconds(bandwidth, flops) for work in works])
        fits = np.array([costs.weight_bytes(c, *kind) < room for c in configs.values()])
        ax.semilogy(range(9), ms, "-", lw=0.7, color=color)
        ax.semilogy(np.arange(9)[fits], ms[fits], "o", color=color, label=label)
        ax.semilogy(np.arange(9)[~fits], ms[~fits], "o", color=color, mfc="none")
        assert fits[:5].all() or name == "laptop"
    ax.set_xticks(range(9), list(SIZES), rotation=60)
    ax.set_title(f"{name}, {bandwidth / 1e9:,.0f} GB/s")
    ax.grid(alpha=0.3)
axes[0].set_ylabel("ms a token, at least")
axes[0].legend(fontsize=8)
assert not fits[-2:].all()

# %% [markdown]
# Hollow markers: the weights do not fit into that machine's memory. One row, with 512 tokens before. The lines are copies of each other, moved by the
# bandwidth and by the bits: at one row a machine's FLOPs do not matter.

# %%
both = [f"{name} {kind}" for name in ("laptop", "h200") for kind in kinds]
print("ms a token" + "".join(f"{column:>16}" for column in both))
for size, cfg in configs.items():
    line = []
    for name in ("laptop", "h200"):
        room, bandwidth, flops = machines[name]
        for kind in kinds.values():
            ms = 1e3 * token_step(cfg, *kind).seconds(bandwidth, flops)
            line.append(f"{ms:.4g}" if costs.weight_bytes(cfg, *kind) < room else "-")
    print(f"{size:>10}" + "".join(f"{ms:>16}" for ms in line))
assert line[:5] == ["-"] * 5  # 175b: only the H200, and only in int4
assert line[5] != "-"

# %% [markdown]
# ## Batches
#
# Several rows share each weight that is read, so tokens per second grow with the batch, until arithmetic is the limit. With float16 weights and no
# context the intensity is about one FLOP per byte and row, so that the bend is at as many rows as the machine does FLOPs while a byte arrives. But
# **keys and values are not shared**: each row brings its own.

# %%
room, bandwidth, flops = machines["h100"]
cfg, batches = configs["6.7b"], 2 ** np.arange(0, 13)
fig, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
bound = {}
for past in (0, 128, 512, 2000):
    works = [token_step(cfg, "float16", batch=int(b), past=past) for b in batches]
    rate = batches / [work.seconds(bandwidth, flops) for work in works]
    waits = np.array([w.flops / flops < w.bytes / bandwidth for w in works])
    bound[past] = batches[~waits].tolist()
    (line,) = ax.loglog(batches, rate, lw=0.8, label=f"{past} tokens before")
    caches = costs.cache_bytes(cfg, 1, past + 1, 2) * batches
    fits = caches + costs.weight_bytes(cfg, "float16") < room
    ax.plot(batches[fits], rate[fits], "o", ms=4, color=line.get_color())
ax.axvline(flops / bandwidth, color="grey", ls=":", lw=0.8)
ax.set(title="opt-6.7b in float16 on an H100, at most", xlabel="rows at once", ylabel="tokens/s")
ax.legend(fontsize=8, title="dots: fits into 80 GB", title_fontsize=8)
print({past: found[:1] for past, found in bound.items()}, "rows from which arithmetic is the limit")
assert bound[0][0] == 512  # the power of two after 989/3.35 = 295
assert bound[128] == bound[512] == bound[2000] == []

# %% [markdown]
# Already with 128 tokens before, decoding waits for memory at any batch: for large batches the caches are nearly all that is read, $4LDS$ bytes a
# row, for $2\cdot$parameters $+ 4LDS$ FLOPs: 198 FLOPs a byte at 128 tokens, less than the 295 that an H100 could do. (Below some 85 tokens
# arithmetic would be the limit.) This is why so much work goes into keys and values: fewer bits, shared prefixes, pages without gaps.

# %%
contexts, batches = np.array([128, 256, 512, 1024, 2048]), np.array([1, 4, 16, 64, 256])
fig, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for ax, size in zip(axes, ("125m", "13b"), strict=True):
    cfg = configs[size]
    each = costs.cache_bytes(cfg, 1, 1, 2)  # 16 bits
    gigabytes = each * batches[:, None] * contexts / 1e9
    ax.imshow(np.log10(gigabytes), cmap="Blues", aspect="auto")
    ax.set_xticks(range(5), contexts)
    ax.set_yticks(range(5), batches)
    weights = costs.weight_bytes(cfg, "float16") / 1e9
    for (r, c), n in np.ndenumerate(gigabytes):
        bold = "bold" if n > weights else "normal"
        color = "white" if r + c > 5 else "black"
        ax.text(c, r, f"{n:.3g}", ha="center", va="center", weight=bold, color=color, fontsize=9)
    ax.set(title=f"opt-{size}: keys and values in GB, 16 bits (weights {weights:.3g})")
    ax.set(xlabel="tokens", ylabel="rows")
assert gigabytes[-1, -1] == costs.cache_bytes(cfg, 256, 2048, 2) / 1e9

# %% [markdown]
# Bold: more than the weights.
#
# ### Exercise 2: the cache
#
# How many bytes are the keys and values of `batch` rows of `tokens` each, at `number` bytes a number? The starter forgets something.


# %%
def my_cache_bytes(cfg, batch, tokens, number):
    return batch * tokens * cfg.num_hidden_layers * cfg.hidden_size * number


check(my_cache_bytes, costs.cache_bytes, (configs["125m"], 1, 1, 4), (configs["350m"], 8, 640, 2))

# %% [markdown]
# ## A plan
#
# `opt-np plan` puts all this together for a generation, before anything is loaded: opt-6.7b on the laptop, and eight rows of opt-13b on an H200.

# %%
laptop = "--memory 16 --bandwidth 20 --tflops 0.2 --backend cpu"
for case in (f"opt-6.7b --prompt 200 --gen 100 --dtype int4 {laptop}",
             "opt-13b --batch 8 --prompt 512 --gen 128 --dtype float16 --device h200"):  # fmt: skip
    print(f"opt-np plan --model {case}")
    main(["plan", "--model", *case.split()])
    print()
work = plan.decode(configs["6.7b"], 1, 200, 100, "float32", "int4")
per_token = work.seconds(20e9, 200e9) / 99  # the first of the 100 comes with the prompt
print(f"6.7b in int4 on the laptop: {1 / per_token:.1f} tokens/s at most")
assert np.isclose(per_token, work.bytes / 99 / 20e9)

# %% [markdown]
# (On the CPU backend keys and values are float32, and a device's memory is planned as if that backend ran there: `plan` knows no other. What is
# "lost to malloc" was freed and not given back.) These are limits; what this package reaches of them on a real processor, and against other engines,
# is in [docs/performance.md](../docs/performance.md).
#
# That was the last notebook. To go through the whole model once more, knowing all this, return to [the first](01_opt_in_one_sitting.ipynb).
