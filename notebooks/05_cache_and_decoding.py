# %% [markdown]
# # Cache and decoding
#
# A model gives one distribution, over the next token. Text comes from choosing again and again, which raises two questions: how to avoid starting
# over each time, and how to choose. Afterwards you can build the cache by hand, say what each option of `generate` does to a real distribution, and
# compute a step of beam search and of contrastive search with a pencil.

# %%
import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, show

from opt_np import OPTConfig, OPTForCausalLM, OPTTokenizer, costs, generate, model, ops, processors
from opt_np.kv_cache import KVCache

lm, tok = OPTForCausalLM.from_pretrained(MODEL), OPTTokenizer.from_pretrained(MODEL)
exact, cfg = OPTForCausalLM.from_pretrained(MODEL, dtype="float64"), lm.config
text = "The captain looked at"
ids = np.array([tok.encode(text)])  # (B, T)
print(repr(tok.decode(lm.generate(ids, max_new_tokens=8)[0])))

# %% [markdown]
# ## Starting over
#
# To choose token 101, the model reads 100 tokens; for token 102, all of them again and one more. $n$ tokens cost $1 + 2 + \dots + n \approx n^2/2$
# readings. `costs` counts the operations of a pass in closed form; here for the shape of opt-125m, a prompt of 16 tokens, and up to 256 new ones:

# %%
opt_125m, prompt, new = OPTConfig.from_size("125m"), 16, 256


def flops(tokens, past):
    steps = costs.steps(opt_125m, 1, tokens, past, fused=True, logits_to_keep=1)
    return sum(step.flops for step in steps)


over = np.cumsum([flops(prompt + i, 0) for i in range(new)])
cached = np.cumsum([flops(prompt, 0)] + [flops(1, prompt + i) for i in range(new - 1)])
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
ax.plot(over / 1e12, label="starting over")
ax.plot(cached / 1e12, label="with a cache")
ax.set(xlabel="new tokens", ylabel="TFLOP", title="opt-125m, one row")
ax.legend()
print(f"{new} tokens: {over[-1] / 1e12:.1f} TFLOP, or {cached[-1] / 1e12:.2f} with a cache")
assert over[-1] / cached[-1] > 90
assert over[0] == cached[0]  # the first token costs the same: the prompt is read once

# %% [markdown]
# ## What can be kept
#
# Attention is causal: nothing that an earlier token computed depends on a later one. So only what later tokens *read* from earlier ones is needed
# again: their keys and values, in every layer. Their queries are not: an earlier token has asked its question already.

# %%
show(KVCache.extend)

# %%
block = exact.params["layers"][0]["self_attn"]
h = np.random.default_rng(0).normal(size=(1, 7, cfg.hidden_size))  # (B, T, D)
heads = (1, -1, cfg.num_attention_heads, cfg.head_dim)
q, k, v = (ops.linear(h, **block[f"{name}_proj"]).reshape(heads) for name in "qkv")
whole = ops.attention(q, k, v, cfg.head_dim**-0.5)  # (B, T, H, Dh)
kept_k, kept_v = k[:, :6], v[:, :6]  # of the first six tokens: this is the cache
q7, k7, v7 = (ops.linear(h[:, 6:], **block[f"{name}_proj"]).reshape(heads) for name in "qkv")
keys, values = np.concatenate([kept_k, k7], 1), np.concatenate([kept_v, v7], 1)
last = ops.attention(q7, keys, values, cfg.head_dim**-0.5)  # one query, seven keys
assert last.shape == (1, 1, cfg.num_attention_heads, cfg.head_dim)
assert np.allclose(last[:, 0], whole[:, -1], rtol=0, atol=1e-12)

# %% [markdown]
# The whole model, one token at a time from a `KVCache`, against all at once. They are equal up to rounding: NumPy multiplies one row in a different
# order than many rows. (The CPU backend of `opt_fast` promises more: equal bits, which its tests check.)

# %%
cache = KVCache()
said = [exact(ids[:, [t]], past_key_values=cache).logits[0, 0] for t in range(ids.shape[1])]
at_once = exact(ids).logits[0]
error = np.abs(np.array(said) - at_once).max() / np.abs(at_once).max()
print(f"one at a time, and all at once: {error:.0e} of the largest logit apart")
assert error < 1e-12
assert cache.length == ids.shape[1]
assert cache.nbytes == costs.cache_bytes(cfg, 1, ids.shape[1], number=8)

# %% [markdown]
# The price is memory: two vectors for each token and layer. For one short row that is little; for many long rows it is more than the weights, and it
# gets there sooner the smaller the model is (here in 16 bits). A cache can also be cut (`crop`), to take tokens back, and copied (`fork`), to
# continue in two ways.

# %%
for size in ("125m", "6.7b", "175b"):
    of = OPTConfig.from_size(size)
    each = costs.cache_bytes(of, 1, 1, number=2)
    share = costs.cache_bytes(of, 32, 2048, number=2) / costs.weight_bytes(of, "float16")
    print(f"{size:<5} {each / 1e3:6.0f} KB a token; 32 rows of 2048: {share:.2f} of the weights")
    assert each == 2 * of.num_hidden_layers * of.hidden_size * 2
cache.crop(3)
again = exact(ids[:, 3:], past_key_values=cache.fork()).logits[0, -1]
assert np.abs(again - said[-1]).max() < 1e-12 * np.abs(at_once).max()
assert cache.length == 3  # the fork grew, not this one

# %% [markdown]
# ## Greedy
#
# The simplest choice: the likeliest token, every time. It is deterministic, and a small model soon turns in circles.

# %%
start = np.array([tok.encode("The old man")])
row, cache = start, KVCache()
for _ in range(24):
    logits = lm(row[:, cache.length :], past_key_values=cache).logits[0, -1]  # (V)
    row = np.append(row, [[logits.argmax()]], axis=1)
print(tok.decode(row[0], skip_special_tokens=True))
assert np.array_equal(row, lm.generate(start, max_new_tokens=24))

# %% [markdown]
# ## Bending a distribution
#
# The alternative is to draw. Sampled unchanged, the distribution's long tail comes up again and again: thousands of tokens, each unlikely, but not
# unlikely together. Three options bend it before the draw, all on the scores $s$ (logits), in this order:
#
# * **temperature** $\tau$: $s/\tau$. Below 1 the likely get likelier; towards 0 it is greedy.
# * **top-k**: only the $k$ highest scores stay; the others become $-\infty$.
# * **top-p**: the smallest set of likeliest tokens whose probabilities add up to at least $p$ stays: many where the model is unsure, few where it is
#   sure.

# %%
scores = exact(ids).logits[:, -1]  # (B, V)
best = np.argsort(-scores[0])[:14]  # to be shown
bent = {
    "as it is": scores,
    "temperature 0.6": scores / 0.6,
    "temperature 1.5": scores / 1.5,
    "top-k 5": processors.top_k(scores, 5),
    "top-p 0.8": processors.top_p(scores, 0.8),
}
p = ops.softmax(scores)[0]
fifth = np.sort(p)[-5]
cut = np.where(p < fifth, 0, p)
assert np.allclose(ops.softmax(bent["top-k 5"])[0], cut / cut.sum())
powers = p ** (1 / 0.6)
assert np.allclose(ops.softmax(bent["temperature 0.6"])[0], powers / powers.sum())

# %%
fig, axes = plt.subplots(1, 5, figsize=(12, 3.4), sharex=True, layout="constrained")
for ax, (name, s) in zip(axes, bent.items(), strict=True):
    P = ops.softmax(s)[0]
    ax.barh(range(len(best)), P[best])
    ax.set(title=f"{name}\n{(P > 0).sum()} can be drawn", xlabel="probability")
    ax.set_ylim(len(best) - 0.5, -0.5)
    ax.set_yticks(range(len(best)), [repr(tok.decode([i])) for i in best] if ax is axes[0] else [])
    assert np.isclose(P.sum(), 1)
fig.suptitle(f"after {text!r}", fontsize=10)
assert (bent["top-p 0.8"] > -np.inf).sum() == 10

# %% [markdown]
# How many tokens top-p keeps depends on the position. Here for every position of a sentence:

# %%
line = tok.encode("The captain looked at the ship, and said that he would go in the morning.")
at_each = exact([line]).logits[0]  # (T, V)
stay = (processors.top_p(at_each, 0.8) > -np.inf).sum(-1)
fig, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
ax.bar(range(len(stay)), stay)
labels = [tok.decode([i]) for i in line]
ax.set_xticks(range(len(stay)), labels, rotation=60, ha="right", fontsize=8)
ax.set(yscale="log", ylim=(1, 2000), ylabel="tokens kept")
ax.set_title("top-p 0.8: how many tokens may follow each token")
sums = np.cumsum(-np.sort(-ops.softmax(at_each), axis=-1), axis=-1)  # (T, V), likeliest first
at = np.arange(len(stay))
assert sums[at, stay - 1].min() > 0.8 - 1e-9  # the set reaches p …
assert np.where(stay > 1, sums[at, stay - 2], 0).max() < 0.8 + 1e-9  # … and no smaller one does

# %% [markdown]
# ### Exercise 1: top-p
#
# From scores to the probabilities after top-p. The token that takes the sum over $p$ stays: a set without it would not reach $p$. The starter
# forgets it. (The package's own is `processors.top_p`, on scores.)


# %%
def nucleus(scores, p):
    return ops.softmax(processors.top_p(scores, p))


def my_nucleus(scores, p):
    """scores: (B, V);  p: a number  ->  (B, V)"""
    P = ops.softmax(scores)
    for row in P:
        order = np.argsort(-row)
        reached = np.cumsum(row[order])
        row[order[reached > p]] = 0
    return P / np.maximum(P.sum(-1, keepdims=True), 1e-300)


rng = np.random.default_rng(0)
cases = (rng.normal(size=(3, 9)) * 2, 0.7), (rng.normal(size=(2, 30)), 0.9), (scores, 0.8)
check(my_nucleus, nucleus, *cases)

# %% [markdown]
# ## Why this token?
#
# `explain` shows every processor's work on the leading candidates. The **repetition penalty** comes first: tokens that the row already has get
# their score divided by the penalty where it is positive, and multiplied where it is negative, so that both go down.

# %%
filters = {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 5, "top_p": 0.9}
way = {"do_sample": True, "seed": 1, "max_new_tokens": 6}
print(lm.explain(start, top=7, tokenizer=tok, **filters, **way)[-1])  # the sixth token
logits, seen = lm(row).logits[:, -1], np.unique(row)
by_hand = logits.copy()
by_hand[:, seen] = np.where(by_hand[:, seen] > 0, by_hand[:, seen] / 1.3, by_hand[:, seen] * 1.3)
found = processors.repetition_penalty(logits, row, padding=np.array([0]), penalty=1.3)
assert np.allclose(found, by_hand, atol=1e-6)
assert (found <= logits).all()
free = lm.generate(start, max_new_tokens=24, repetition_penalty=1.3)
print("with the penalty, greedily:", tok.decode(free[0], skip_special_tokens=True))
assert len(np.unique(free)) > len(np.unique(row))

# %% [markdown]
# ## Drawing, and seeds
#
# To draw from a distribution, add its probabilities up and see where a random number from $[0, 1)$ falls. That number comes from the seed, the row's
# place in the batch and the step, and from nothing else. So a row's text does not depend on which rows are beside it, or how long they continue.

# %%
show(generate.choose, generate.Request.random_numbers)

# %%
draws = np.random.default_rng(0).random(4000)
drawn = generate.choose(np.repeat(bent["top-k 5"], 4000, axis=0), draws)
shares = np.array([(drawn == i).mean() for i in best[:5]])
expected = ops.softmax(bent["top-k 5"])[0, best[:5]]
print("drawn   ", shares.round(3), "\nexpected", expected.round(3))
assert np.abs(shares - expected).max() < 0.03


# %%
def drawn_from(*texts):
    batch = tok(list(texts), padding=True, padding_side="left")
    out = lm.generate(**batch, max_new_tokens=12, do_sample=True, top_p=0.9, seed=5)
    return tok.batch_decode(out, skip_special_tokens=True)


a = drawn_from("The old man", "In the morning she")
b = drawn_from("A long beginning, which is nobody's business", "In the morning she")
print("\n".join([*a, b[1]]))
assert a[1] == b[1]  # another neighbour, the same text
assert a[0] == drawn_from("The old man")[0]  # no neighbour at all

# %% [markdown]
# ## Beams
#
# Greedy takes the best step, not the best path. Beam search keeps the $k$ best *beginnings*: each is continued with every token, and of all
# $k \cdot V$ sums
#
# $$\text{score} = \textstyle\sum_t \log P(\text{token}_t \mid \text{before})$$
#
# the best $k$ are kept. By hand, with three beams and two tokens:

# %%
k = 3
log_p = processors.log_softmax(exact(ids).logits[:, -1])[0]  # (V)
beams = np.argsort(-log_p)[:k]
running = log_p[beams]
rows = np.concatenate([np.repeat(ids, k, 0), beams[:, None]], 1)  # (k, T + 1)
sums = running[:, None] + processors.log_softmax(exact(rows).logits[:, -1])  # (k, V)
beam, token = np.divmod(np.argsort(-sums, axis=None)[:k], sums.shape[1])
for i, j in zip(beam, token, strict=True):
    words, step = tok.decode([beams[i], j]), sums[i, j] - running[i]
    print(f"{running[i]:.3f} {step:+.3f} = {sums[i, j]:.3f}  {words!r}")
found = exact.generate(ids, max_new_tokens=2, num_beams=k, num_return_sequences=k, eos_token_id=[])
assert np.array_equal(found[:, -2:], np.stack([beams[beam], token], 1))

# %% [markdown]
# Longer paths sum more negative numbers, so finished ones are compared by score / length$^{\text{length penalty}}$. More beams find likelier texts,
# but not always, and likelier is not better: likely text is bland and repeats itself, which is why stories are sampled, and beams are for translation
# and the like.


# %%
def per_token(rows, start):
    """Mean log probability of the tokens after `start`, in nats."""
    log_p = processors.log_softmax(exact(rows).logits[0, start - 1 : -1])
    return log_p[np.arange(len(log_p)), rows[0, start:]].mean()


ways = {"greedy": {}, "4 beams": {"num_beams": 4}, "8 beams": {"num_beams": 8}}
ways["drawn"] = {"do_sample": True, "top_k": 0, "seed": 0}
means, lines = {}, []
for name, way in ways.items():
    out = lm.generate(ids, max_new_tokens=12, eos_token_id=[], **way)
    means[name] = per_token(out, ids.shape[1])
    lines.append(f"{name:<9} {means[name]:5.2f}  {tok.decode(out[0, ids.shape[1] :])!r}")
print("\n".join(lines))
assert means["8 beams"] > means["greedy"] > means["drawn"]

# %% [markdown]
# ### Exercise 2: one step of beams
#
# Given the beams' scores so far and the log probabilities of what may follow each, return three arrays: the new scores, best first, the beams that
# they come from, and their tokens. The starter continues every beam once, with its best token. (The package's own is in `beam.search`.)


# %%
def beam_step(running, log_p):
    k, V = log_p.shape
    sums = (running[:, None] + log_p).reshape(1, -1)
    picked = processors.highest(sums, k)[0]
    return sums[0, picked], picked // V, picked % V


def my_beam_step(running, log_p):
    """running: (K);  log_p: (K, V)  ->  (K), (K), (K)"""
    tokens = log_p.argmax(-1)
    new = running + log_p.max(-1)
    order = np.argsort(-new)
    return new[order], order, tokens[order]


cases = [(rng.normal(size=k), processors.log_softmax(rng.normal(size=(k, 8)))) for k in (3, 4)]
check(my_beam_step, beam_step, *cases)

# %% [markdown]
# ## Contrastive search
#
# Repetition can also be seen in the hidden states: a token that only repeats has a hidden state much like an earlier one's. Contrastive search looks
# at the $k$ likeliest tokens, reads each, and takes the one with the highest
#
# $$(1 - \alpha)\, P(\text{token}) - \alpha \max_j \cos(h_{\text{token}}, h_j)$$
#
# where $h$ are last hidden states and $j$ runs over the text so far. It is deterministic. One step by hand:


# %%
def hidden(rows):
    h = model.last_hidden_state(exact.params, rows, cfg)  # (N, T, D)
    return h / np.linalg.norm(h, axis=-1, keepdims=True)


# %%
alpha, k = 0.6, 4
text_h = hidden(row)[0]  # (T, D): the greedy text above, which turns in circles
P = ops.softmax(exact(row).logits[0, -1])
tokens = np.argsort(-P)[:k]
candidates = hidden(np.concatenate([np.repeat(row, k, 0), tokens[:, None]], 1))[:, -1]  # (k, D)
similarity = (candidates @ text_h.T).max(-1)
score = (1 - alpha) * P[tokens] - alpha * similarity
for i, token in enumerate(tokens):
    parts = f"P {P[token]:.3f}  similarity {similarity[i]:.3f}  score {score[i]:+.3f}"
    print(f"{tok.decode([token])!r:<8} {parts}")
found = exact.generate(row, max_new_tokens=1, penalty_alpha=alpha, top_k=k)
assert found[0, -1] == tokens[score.argmax()]
out = lm.generate(start, max_new_tokens=24, penalty_alpha=alpha, top_k=k)
print(tok.decode(out[0], skip_special_tokens=True))
assert len(np.unique(out)) > len(np.unique(row))

# %% [markdown]
# ## Streaming
#
# `stream` yields a step per token, with its log probability, the entropy of the distribution that it was chosen from, and, with a tokenizer, the text
# that has become certain. A stop string may begin and end inside tokens.

# %%
prompt = [tok.encode("She said")]
lines, texts, new = [f"{'text':<10}{'log P':>7}{'entropy':>9}"], [], []
for step in lm.stream(prompt, max_new_tokens=24, tokenizer=tok, stop_strings=["do."]):
    lines.append(f"{step.text[0]!r:<10}{step.logprobs[0]:7.2f}{step.entropies[0]:9.2f}")
    texts.append(step.text[0])
    new.append(int(step.ids[0]))
print("\n".join(lines))
assert "".join(texts) == tok.decode(new)
assert "".join(texts).endswith("do.")
assert "do." not in [tok.decode([i]) for i in new]  # no token holds it

# %% [markdown]
# A character that is several tokens (notebook 2) comes with its last one; until then the text is empty. The shipped model produces few such
# characters, so here are the ids of a text, fed in order as if the model had produced them:

# %%
said = tok.encode("Déjà vu 🙂", add_special_tokens=False)
teller = tok.detokenizer()
pieces = [teller.put(i) for i in said] + [teller.end()]
print(pieces)
assert "".join(pieces) == "Déjà vu 🙂"
assert "🙂" in pieces
assert pieces.count("") >= 5  # bytes held back

# %% [markdown]
# All of this only *used* the weights. Where they come from: next, the backward pass through a block, gradient by gradient ([notebook
# 6](06_backprop_through_a_block.ipynb)).
