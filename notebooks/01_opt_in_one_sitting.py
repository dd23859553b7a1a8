# %% [markdown]
# # An OPT in one sitting
#
# OPT is a *decoder*: it reads a text and predicts, at every position, which token is likely to come next. This notebook follows one short text
# through all of it. The code that you see is the package's own: `show` prints the lines that actually run.
#
# The model is the shipped one, six layers of width 256, trained on old novels. The published sizes, 125m to 175b, run through the same lines.
#
# Letters in the code: B rows of a batch, T tokens (S with those that a cache holds), D the width, H heads of width Dh, F the mlp's width, V the
# vocabulary; W is the table's width, D in all sizes but 350m; I and O are a matrix's inputs and outputs, `*N` any leading axes. For now, skip `tap`
# (notebook 4), `cache` (5), `layout` (2), and the branches for opt-350m, which normalises after its sums: none of them changes a number here.

# %%
import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, picture, show

from opt_np import OPTForCausalLM, OPTTokenizer, lens, model, ops

lm, tok = OPTForCausalLM.from_pretrained(MODEL), OPTTokenizer.from_pretrained(MODEL)
params, cfg = lm.params, lm.config
print(cfg.num_hidden_layers, "layers,", cfg.num_attention_heads, "heads of", cfg.head_dim)

# %% [markdown]
# ## Text becomes numbers
#
# A tokenizer cuts text into pieces and numbers them. OPT puts `</s>`, id 2, in front of every text. Notebook 2 looks at this closely.

# %%
text = "The old man sat by the"
ids = np.array([tok.encode(text)])  # (B, T): one row, T tokens
for i in ids[0]:
    print(int(i), repr(tok.decode([i])))
assert ids[0, 0] == tok.bos_token_id == 2

# %% [markdown]
# ## Numbers become vectors
#
# Each id looks up a row of a table, `embed_tokens`, and each *position* a row of another, `embed_positions`. Without the second, order would enter
# only through the rule that no token sees a later one. Their sum is the **residual stream**, or stream: one vector of 256 numbers for each token,
# which every block reads from and adds to.

# %%
show(model.embeddings)

# %%
layout = model.make_layout(cfg, ids)
x = model.embeddings(params, ids, layout, ops, model.no_tap)  # (B, T, D)
E, places = params["embed_tokens"]["weight"], params["embed_positions"]["weight"]
by_hand = E[ids[0]] + places[2 : 2 + ids.shape[1]]  # place 0 reads row 2
print("the stream:", x.shape)
assert np.array_equal(x[0], by_hand)

# %% [markdown]
# ## A block
#
# The stream then passes through blocks, all alike, each with weights of its own. A block adds two things to the stream:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{LN}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{LN}(x))$$
#
# **Attention** moves information between tokens; the **mlp** works on each token alone. LayerNorm, $\mathrm{LN}$, brings what they read to a common
# scale. This is the whole block:

# %%
show(model.decoder_layer)

# %% [markdown]
# ### LayerNorm
#
# $$\mathrm{LN}(x) = \frac{x - \bar x}{\sqrt{\mathrm{var}(x) + 10^{-5}}} \cdot w + b$$
#
# Mean and variance are over the 256 numbers of one token; $w$ and $b$ are learnt, with one number each for every one of the 256.

# %%
block = params["layers"][0]
h = ops.layer_norm(x, **block["self_attn_layer_norm"])
plain = ops.layer_norm(x)  # before weight and bias
print("means:", plain.mean(-1)[0].round(5) + 0, "deviations:", plain.std(-1)[0].round(3))
assert np.allclose(plain.mean(-1), 0, atol=1e-5)
assert np.allclose(plain.var(-1), 1, atol=0.1)

# %% [markdown]
# ### Attention
#
# Every token asks a question, a **query** $q$; every token offers a **key** $k$ and a **value** $v$. All three are linear in $h$. The better a key
# matches a query, the more of its value the asking token takes; no token sees those after it:
#
# $$s = \frac{q\,k^\top}{\sqrt{d}}, \quad P = \mathrm{softmax}(s), \quad O = P\,v$$
#
# This happens in several **heads** side by side, each with its own part of the vectors, $d$ = 64 numbers wide; their outputs are concatenated and go
# through one more matrix, `out_proj`. In the pictures below, a row is the token that asks, a column the one that it takes from.

# %%
show(model.self_attention)

# %%
heads = (1, ids.shape[1], cfg.num_attention_heads, cfg.head_dim)
q, k, v = (ops.linear(h, **block["self_attn"][f"{c}_proj"]).reshape(heads) for c in "qkv")
P = ops.attention_probs(q, k, cfg.head_dim**-0.5)  # (B, H, T, T)
O = ops.attention(q, k, v, cfg.head_dim**-0.5)  # (B, T, H, Dh)
words = [tok.decode([i]) for i in ids[0]]
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for head, ax in enumerate(axes):
    picture(P[0, head], words, words, f"layer 0, head {head}", ax, vmin=0, vmax=1)
assert np.allclose(P.sum(-1), 1, atol=1e-5)  # each row is a share of 1
assert not np.triu(P[0], 1).any()  # nothing from the future
assert np.allclose(np.einsum("bhts,bshd->bthd", P, v), O, atol=1e-5)

# %% [markdown]
# ### Exercise 1: causal attention
#
# Write it for one head at a time, from the three formulas above; a score of a key that comes after its query is $-\infty$ before the softmax, so that
# its weight is 0. `check` compares yours with the package's on random inputs, and says how far off it is.


# %%
def my_attention(q, k, v, scale):
    """q, k, v: (B, T, H, Dh)  ->  (B, T, H, Dh)"""
    O = np.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = scale * q[b, :, head] @ k[b, :, head].T  # (T, T)
            # here: hide the future, and take the softmax
            O[b, :, head] = scores @ v[b, :, head]
    return O


check(my_attention, spec=ops.attention)

# %% [markdown]
# ### The mlp
#
# One matrix widens the 256 numbers to 1024, negative values become zero, and a second matrix brings them back to 256.

# %%
show(ops.mlp)

# %%
x1 = x + ops.linear(O.reshape(x.shape), **block["self_attn"]["out_proj"])
h1 = ops.layer_norm(x1, **block["final_layer_norm"])  # a block's second LayerNorm, by its name
inner = ops.activation(ops.linear(h1, **block["fc1"]), cfg.activation_function)
x2 = x1 + ops.linear(inner, **block["fc2"])
print(f"{(inner == 0).mean():.0%} of the {inner.shape[-1]} inner numbers are zero")
expected = model.decoder_layer(x, block, cfg, layout, ops, None, 0, model.no_tap)
assert np.allclose(x2, expected, atol=1e-5)

# %% [markdown]
# ### Exercise 2: LayerNorm
#
# The variance is the mean of the squared deviations, and $10^{-5}$ goes inside the root.


# %%
def my_layer_norm(x, weight, bias):
    """x: (*N, D);  weight: (D);  bias: (D)  ->  (*N, D)"""
    return x * weight + bias


check(my_layer_norm, spec=ops.layer_norm)

# %% [markdown]
# ## All blocks, and the head
#
# After the last block one more LayerNorm; then every token of the vocabulary gets a score: how well its row of `embed_tokens` fits the stream. The
# table that turns ids into vectors is also the one that turns vectors into scores: the two are **tied**.

# %%
show(model.decoder, model.final, model.lm_logits)

# %%
for p in params["layers"]:
    x = model.decoder_layer(x, p, cfg, layout, ops, None, 0, model.no_tap)
x = ops.layer_norm(x, **params["final_layer_norm"])
logits = x @ params["embed_tokens"]["weight"].T  # (B, T, V)
assert np.allclose(logits, model.forward(params, ids, cfg), atol=1e-3)
assert np.allclose(logits, lm(ids).logits, atol=1e-3)

# %% [markdown]
# ## Scores become a choice
#
# Softmax turns the scores into probabilities. The likeliest next tokens:

# %%
P_next = ops.softmax(logits[0, -1])
best = np.argsort(-P_next)[:8]
plt.figure(figsize=(6, 2.6), layout="constrained")
plt.barh([repr(tok.decode([i])) for i in best][::-1], P_next[best][::-1])
plt.xlabel(f"probability after {text!r}")
assert np.isclose(P_next.sum(), 1, atol=1e-5)

# %% [markdown]
# Take the likeliest, append it, and start again: that is how text is generated. (`generate` reuses what it has computed: notebook 5.)

# %%
row = ids
for _ in range(12):
    row = np.append(row, [[lm(row).logits[0, -1].argmax()]], axis=1)
print(tok.decode(row[0], skip_special_tokens=True))
assert np.array_equal(row, lm.generate(ids, max_new_tokens=12))

# %% [markdown]
# ## What each layer would have said
#
# Since every block only *adds* to the stream, the head (the last LayerNorm and the table) can be applied to it after any of them. At the embeddings
# it finds the token that went in, since the table is tied; "layer 0" is after the first block; the answer comes up late:

# %%
layers = list(lens.logit_lens(lm, ids))
for name, at_layer in layers:
    p = ops.softmax(np.asarray(at_layer)[0, -1])
    print(f"{name:<11}", "  ".join(f"{tok.decode([i])!r} {p[i]:.2f}" for i in np.argsort(-p)[:4]))
assert np.allclose(layers[-1][1], logits, atol=1e-3)

# %% [markdown]
# That was all of OPT: two tables, blocks of attention and mlp, a LayerNorm, and one of the tables again. Next: what the ids really are, where `</s>`
# and the 2 in the positions come from, and what padding does ([notebook 2](02_tokens_and_positions.ipynb)).
