# %% [markdown]
# # Looking inside
#
# A trained model is a pile of numbers that nobody wrote. This notebook examines how the shipped model works: what its heads look at, which part of it
# carries a word from the start of a text to its end, and which part contributes what to the output. Every method is also tried where the answer is
# known, since an instrument that always says yes shows nothing. All values have names, and can be read and replaced: `opt_np.taps`; the arithmetic is
# `opt_np.lens`.

# %%
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy starts: small matrices like one thread
import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, picture, show

from opt_np import OPTConfig, OPTForCausalLM, OPTTokenizer, explore, grad, init, lens, ops, taps
from opt_np.tree import map_leaves

lm = OPTForCausalLM.from_pretrained(MODEL, dtype="float64")
tok = OPTTokenizer.from_pretrained(MODEL)
L, H = lm.config.num_hidden_layers, lm.config.num_attention_heads


def words(ids):
    return [tok.decode([i]) for i in ids]


# %% [markdown]
# ## Every value has a name
#
# `run_with_cache` returns the logits and every intermediate value, by the name of HF's module or by TransformerLens's. With them the model's own
# equations can be checked: a block adds the outputs of its attention and its mlp, and nothing else happens to the stream.

# %%
text = "The old man sat by the fire, and the old woman sat by the window."
ids = np.array([tok.encode(text)])  # (B, T)
logits, cache = lm.run_with_cache(ids)
for name, value in list(cache.items())[2:18]:
    print(f"{name:<45} {value.shape}")
for i in range(L):
    mid = cache["resid_pre", i] + cache["attn_out", i]
    assert np.array_equal(cache["resid_mid", i], mid)
    assert np.array_equal(cache["resid_post", i], mid + cache["mlp_out", i])

# %% [markdown]
# ## What each head looks at
#
# A head's **pattern** gives for every token (a row) how much it takes from each earlier one (a column); a row adds up to 1. All heads of all layers:

# %%
patterns = np.stack([cache["pattern", i][0] for i in range(L)])  # (L, H, T, S)
fig, axes = plt.subplots(H, L, figsize=(12, 7.6), layout="constrained")
for layer, head in np.ndindex(L, H):
    ax = axes[head, layer]
    ax.imshow(patterns[layer, head], cmap="Blues", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[], title=f"layer {layer}, head {head}")
assert np.allclose(patterns.sum(-1), 1)
assert not np.triu(patterns, 1).any()

# %% [markdown]
# One of them large. Layer 0, head 1 is choosy when a " the" looks: "the", "by", "and" and the comma get next to nothing, and the later ones give most
# to " fire". It will turn up again.

# %%
title = "layer 0, head 1: the share that each row gives each column"
picture(patterns[0, 1], words(ids[0]), words(ids[0]), title, vmin=0, vmax=1)
row = patterns[0, 1, 15]  # the last " the", which sees 16 tokens
assert words(ids[0])[15] == " the"
small = np.isin(words(ids[0]), [" by", " the", " and", ","])[:16]
print(f"' the' gives {small.sum()} small words {row[:16][small].sum():.0%}, ' fire' {row[7]:.0%}")
assert row.argmax() == 7 and row[:16][small].sum() < 0.1

# %% [markdown]
# ## `</s>`, the place to look at when there is nothing to see
#
# A softmax must distribute a total of 1. Many models learn to give it to the first token, which is in front of every text and carries nothing about
# this one: an **attention sink** (Xiao et al., [arXiv:2309.17453](https://arxiv.org/abs/2309.17453)). How much does each head give to `</s>`, over
# the rows of three sentences? A head that spread its attention evenly would give $1/(t+1)$ at place $t$.

# %%
sentences = [text, "She opened the door and looked at him without a word.",
             "It was a dark night, and the captain did not see the shore."]
shares, even = [], []
for sentence in sentences:
    row = np.array([tok.encode(sentence)])
    seen = lm.run_with_cache(row, lambda path: path.endswith("attn_weights"))[1]
    shares.append(np.stack([seen["pattern", i][0, :, 1:, 0] for i in range(L)]))  # (L, H, T - 1)
    even.append(1 / np.arange(2, row.shape[1] + 1))
to_first, evenly = np.concatenate(shares, -1).mean(-1), np.concatenate(even).mean()  # (L, H)
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for head in range(H):
    ax.bar(np.arange(L) + 0.2 * (head - 1.5), to_first[:, head], 0.18, label=f"head {head}")
ax.axhline(evenly, color="black", linestyle=":", label="spread evenly")
ax.set(xlabel="layer", ylabel="share given to </s>", title="What </s> gets", ylim=(0, 1))
ax.legend(ncols=5, fontsize=8)
assert np.unravel_index(to_first.argmax(), to_first.shape) == (1, 0)
assert to_first[1, 0] > 0.6 > 3 * evenly

# %% [markdown]
# Layer 1, head 0 is a sink: it rests on `</s>` most of the time. Most other heads are somewhat above the dotted line: this model has begun
# to make sinks, no more. (In large models most heads of most layers do this. Meta's weights have not been looked at here.)

# %% [markdown]
# ## Is there an induction head?
#
# An **induction head** finds an earlier copy of the current token and looks at what came after it: in "A B … A" it looks at B, and so predicts B. In
# the textbook it has help from a **previous-token head** in an earlier layer, which tells every token which one came before it. (Notebook 7 trained
# one from scratch, which had found help of another kind.) Three scores tell heads apart on a row of random tokens that comes twice, $n$ tokens and
# the same $n$ again:
#
# | score | the share that a token gives to | at |
# |---|---|---|
# | previous token | the one before it | $t - 1$ |
# | duplicate token | its own earlier copy | $t - n$ |
# | induction | the one after its earlier copy | $t - n + 1$ |


# %%
def scores(model, tokens):
    """The three scores of all heads on </s>, tokens, tokens.  tokens: (B, n)  ->  3 times (L, H)"""
    B, n = tokens.shape
    row = np.concatenate([np.full((B, 1), 2), tokens, tokens], 1)
    seen = model.run_with_cache(row, lambda path: path.endswith("attn_weights"))[1]
    P = np.stack([seen["pattern", i] for i in range(len(seen))])  # (L, B, H, T, S)
    again = np.arange(n + 1, 2 * n)  # the second copy; its last token has nothing to predict
    return {name: P[..., again, again - back].mean((1, 3))
            for name, back in (("previous token", 1), ("duplicate token", n), ("induction", n - 1))}


# %% [markdown]
# ### The control: a model made by hand
#
# To trust the scores, try them on a model whose heads are known. Here are two layers with the circuit set by hand: the stream has a place for the
# token (numbers 0 to 29 of 96), one for its position (32 to 61) and one for the token before (64 to 93). Head 0 of layer 0 asks "which token is at my
# position minus one?" and writes it into the stream; head 0 of layer 1 asks "which position has me as the token before?" and predicts that position's
# token. Heads 1 do nothing.


# %%
def by_hand(V=30, T=30):
    """Two layers of two heads: a previous-token head, an induction head, two idle ones."""
    cfg = OPTConfig(vocab_size=V, hidden_size=96, num_hidden_layers=2, ffn_dim=4,
                    num_attention_heads=2, max_position_embeddings=T)
    params = map_leaves(np.zeros_like, init.init_params(cfg, dtype=np.float64))
    token, place, before = (np.arange(32 * i, 32 * i + 30) for i in range(3))  # where in the stream
    slot = np.arange(30)  # where in head 0

    params["embed_tokens"]["weight"][:, token] = np.eye(V)
    params["embed_positions"]["weight"][2:, place] = np.eye(T)
    params["final_layer_norm"]["weight"][:] = 1
    wires = ((place[1:], slot[:-1], place, before, 0.15), (token, slot, before, token, 1.5))
    for block, (asks, into, offers, to, gain) in zip(params["layers"], wires, strict=True):
        block["self_attn_layer_norm"]["weight"][:] = 1
        attn = {name: leaf["weight"] for name, leaf in block["self_attn"].items()}
        attn["q_proj"][into, asks] = 10
        attn["k_proj"][slot, offers] = 1
        attn["v_proj"][slot, token] = 1
        attn["out_proj"][to, slot] = gain
    return OPTForCausalLM(params, cfg)


# %%
control = by_hand()
rng = np.random.default_rng(0)
tokens = rng.permuted(np.tile(np.arange(4, 18), (8, 1)), axis=1)  # (8, 14): each once in a row
known = scores(control, tokens)
for name, score in known.items():
    print(f"{name:<16}", score.round(2).tolist())
assert known["previous token"][0, 0] > 0.95 and known["induction"][1, 0] > 0.95
assert known["duplicate token"].max() < 0.2

# %% [markdown]
# The scores find both heads, and show that the idle ones are evenly spread. Now the shipped model, on random tokens of its vocabulary:

# %%
tokens_lm = rng.integers(260, lm.config.vocab_size, (8, 14))  # (8, 14)
found = scores(lm, tokens_lm)
fig, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for line, (model, said) in zip(axes, (("by hand", known), ("in the box", found)), strict=True):
    for ax, (name, score) in zip(line, said.items(), strict=True):
        picture(score, *map(range, score.shape), f"{name}, {model}", ax, vmin=0, vmax=1)
        ax.set(xlabel="head", ylabel="layer")
best = np.unravel_index(found["induction"].argmax(), (L, H))
even = (1 / np.arange(16, 29)).mean()
print(f"layer {best[0]}, head {best[1]}: {found['induction'].max():.3f}; evenly {even:.3f}")
assert found["induction"].max() < 0.2 and found["previous token"].max() < 0.5

# %% [markdown]
# **It has none.** (An even spread over the 16 to 28 tokens that a token of the second copy sees would score about 1/21.) Its best "induction head"
# does little better than a head that spreads its attention evenly, and no head looks mainly at the previous token. It is small, and saw 18 million
# tokens of training; induction heads came in other people's runs after billions (Olsson et al.,
# [arXiv:2209.11895](https://arxiv.org/abs/2209.11895)). Its loss shows the same: reading the tokens a second time does not help it predict them.


# %%
def second_half(model, tokens, hooks=()):
    """The loss on the second copy of some tokens: nats a token.  tokens: (B, n)"""
    B, n = tokens.shape
    row = np.concatenate([np.full((B, 1), 2), tokens, tokens], 1)
    labels = np.where(np.arange(2 * n + 1) > n + 1, row, -100)
    return grad.shifted_cross_entropy(model.run_with_hooks(row, hooks), labels)


def without(layer, head):
    def hook(z, name):  # z: (B, T, H, Dh), what each head says before out_proj
        z[:, :, head] = 0

    return [(f"blocks.{layer}.attn.hook_z", hook)]


for name, model, given in (("by hand", control, tokens), ("in the box", lm, tokens_lm)):
    blind = np.log(model.config.vocab_size)
    print(f"{name}: {second_half(model, given):.2f} nats a token; guessing: {blind:.2f}")
assert second_half(control, tokens) < 0.1
assert second_half(lm, tokens_lm) > np.log(lm.config.vocab_size)

# %% [markdown]
# ## Without one head
#
# What a head looks at is not yet what it is good for. **Ablation** asks directly: silence a head, and see how much worse the model predicts. The
# model made by hand is tested on the second copy; the shipped one on what it was made for, the opening of a novel that it never saw in training.

# %%
novel = (
    "The Time Traveller (for so it will be convenient to speak of him) was expounding a "
    "recondite matter to us. His pale grey eyes shone and twinkled, and his usually pale face "
    "was flushed and animated. The fire burnt brightly, and the soft radiance of the "
    "incandescent lights in the lilies of silver caught the bubbles that flashed and passed in "
    "our glasses."
)
page = np.array([tok.encode(novel)])  # (1, T)
at_best = grad.shifted_cross_entropy(lm(page).logits, page)
lost = np.zeros((L, H))
for at in np.ndindex(L, H):
    lost[at] = grad.shifted_cross_entropy(lm.run_with_hooks(page, without(*at)), page) - at_best
lost_by_hand = np.zeros((2, 2))
for at in np.ndindex(2, 2):
    lost_by_hand[at] = second_half(control, tokens, without(*at)) - second_half(control, tokens)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for ax, worse, name in zip(axes, (lost_by_hand, lost), ("by hand", "in the box"), strict=True):
    scale = {"cmap": "RdBu_r", "vmin": -np.abs(worse).max(), "vmax": np.abs(worse).max()}
    picture(worse, *map(range, worse.shape), f"nats a token worse, {name}", ax, **scale)
    ax.set(xlabel="head", ylabel="layer")
assert (lost_by_hand[:, 0] > 2).all()  # the circuit needs both
assert (np.abs(lost_by_hand[:, 1]) < 1e-9).all()  # and nothing else
assert np.unravel_index(lost.argmax(), lost.shape) == (1, 1)
assert 0.1 < lost.max() < 0.3 and np.median(lost) < 0.05

# %% [markdown]
# In the model by hand both heads of the circuit are needed, and only they. (Note the two scales.) In the shipped one a single head, layer 1's head 1,
# is worth a sixth of a nat on this page; every other costs a few hundredths or nothing. A page is short: the small values are within chance.

# %%
order = np.argsort(-lost, axis=None)[:3]
for layer, head in zip(*np.unravel_index(order, (L, H)), strict=True):
    print(f"layer {layer}, head {head}: {lost[layer, head]:+.3f} on top of {at_best:.2f}")
weights = map_leaves(np.copy, lm.params)  # the same by the weights: no head 1 in layer 0
weights["layers"][0]["self_attn"]["out_proj"]["weight"][:, 64:128] = 0
same = OPTForCausalLM(weights, lm.config)(page).logits
assert np.allclose(same, lm.run_with_hooks(page, without(0, 1)), atol=1e-9)

# %% [markdown]
# ## Where a word goes: activation patching
#
# The model has no induction head, and yet it remembers: after "The man saw the ship. The man saw the" it finds " ship" ten times likelier than after
# the same with "house". How does the word get to the end? Run the text with *house*, but put in, at one layer and place, the stream of the run with
# *ship*. If the answer comes back, the information passes there. As a measure, the difference of the two words' logits: 0 is the house's, 1 the
# ship's.

# %%
clean, corrupt = (np.array([tok.encode(f"The man saw the {word}. The man saw the")])
                  for word in ("ship", "house"))
ship, house = (tok.encode(word, add_special_tokens=False)[0] for word in (" ship", " house"))
clean_logits, clean_cache = lm.run_with_cache(clean)


def difference(logits):
    return logits[0, -1, ship] - logits[0, -1, house]


high, low = difference(clean_logits), difference(lm(corrupt).logits)
likelier = ops.softmax(clean_logits[0, -1])[ship] / ops.softmax(lm(corrupt).logits[0, -1])[ship]
print(f"' ship' is {likelier:.1f} times likelier after the text with ship")
print(f"logit of ' ship' less that of ' house': {high:+.2f} after ship, {low:+.2f} after house")
assert likelier > 8 and high > 1 and low < -1


# %%
def brought_back(point, places):
    """How much of the difference comes back when `point` has the clean run's values at `places`."""
    def hook(x, name):
        x[:, *places] = clean_cache[name][:, *places]

    return (difference(lm.run_with_hooks(corrupt, [(point, hook)])) - low) / (high - low)


back = np.zeros((L, clean.shape[1]))  # (L, T)
for layer, t in np.ndindex(back.shape):
    back[layer, t] = brought_back(f"blocks.{layer}.hook_resid_pre", (t,))
columns = [f"{word!r}{' / house' if word == ' ship' else ''}" for word in words(clean[0])]
title = "share of the difference that the clean stream brings back, by layer and place"
ax = picture(back, range(L), columns, title, vmin=0, vmax=1)
ax.figure.set_size_inches(8, 3.4)
ax.set(ylabel="before layer")
assert np.isclose(back[0, 5], 1)  # before layer 0 all of it is in the word itself
assert back[1, -1] > 0.5  # before layer 1 most of it is at the end already
assert np.abs(back[:, :5]).max() < 1e-9  # nothing before the word can know

# %% [markdown]
# Most of it jumps in layer 0, from the word straight to the last token; the rest follows later, mainly in layers 3 and 4. By which head? Put in what
# a single head says, at all places:

# %%
by_head = np.zeros((L, H))
for layer, head in np.ndindex(L, H):
    by_head[layer, head] = brought_back(f"blocks.{layer}.attn.hook_z", (slice(None), head))
ax = picture(by_head, range(L), range(H), "brought back by a head", vmin=0, vmax=1)
ax.set(xlabel="head", ylabel="layer")
carrier = tuple(int(i) for i in np.unravel_index(by_head.argmax(), (L, H)))
looks = clean_cache["pattern", carrier[0]][0, carrier[1], -1]
print(f"layer {carrier[0]}, head {carrier[1]} brings back {by_head[carrier]:.0%}")
print(f"from the last token it gives {looks[5]:.0%} to ' ship'")
gone = difference(lm.run_with_hooks(clean, without(*carrier)))
print(f"without it the difference after ship falls from {high:+.2f} to {gone:+.2f}")
assert carrier == (0, 1) and by_head[carrier] > 0.5
assert looks.argmax() == 5 and gone < high / 2

# %% [markdown]
# It is the head of the large picture, the one that from a "the" passes over small words. So this model copies without induction: a head of the first
# layer gathers what stood there so far, and the rest of the model makes that likelier again. It does not ask what came *after* "saw the" last time.
# An induction head would; this is a crude substitute, and in a novel not a bad one. This was one pair of sentences: try others.

# %% [markdown]
# ## Which part said so: attribution
#
# The last logit is the head's product with the last stream, and the stream is a sum of what each part has put there. Given the size that the last
# LayerNorm divides by, everything after is linear, so the logit itself is a sum, one term for each part of the model:
#
# $$\mathrm{logit}_v = E_v \cdot \mathrm{LN}\Big(\sum_i x_i\Big) = \Big[\sum_i E_v \cdot \Big(w \odot \frac{x_i - \bar x_i}{\sigma}\Big)\Big] + E_v \cdot b$$
#
# $x_i$ is what part $i$ wrote, $\bar x_i$ the mean of its numbers, $\sigma$ the deviation of the whole stream, $w$ and $b$ the last LayerNorm's, and
# $E_v$ token $v$'s row of the table.

# %%
show(lens.normed)

# %%
parts = lens.attribution(lm, clean, tokens=[ship, house], heads=True)  # by name, (B, 2)
said = {name: float(part[0, 0] - part[0, 1]) for name, part in parts.items()}
order = sorted(said, key=lambda name: abs(said[name]))[-14:]
plt.figure(figsize=(7, 3.6), layout="constrained")
plt.barh(order, [said[name] for name in order])
plt.axvline(0, color="black", linewidth=0.8)
plt.xlabel("logit of ' ship' less logit of ' house'")
plt.title(f"the 14 largest of {len(said)} parts; all add up to {sum(said.values()):+.2f}")
assert np.isclose(sum(said.values()), high, atol=1e-9)
assert np.allclose(sum(parts.values()), clean_logits[:, -1, [ship, house]], atol=1e-9)
assert max(said, key=said.get) == "layer 0 mlp"
assert abs(said["layer 0 head 1"]) < 0.2

# %% [markdown]
# The head that carries the word contributes almost nothing to the logit itself: it writes for other parts to read, first of all the mlp of its own
# layer, which turns the summary into words. Patching finds the parts that *matter*, attribution those that write to the logit; the two need not be
# the same.
#
# ### Exercise 1: what each head adds
#
# `out_proj` takes the heads' outputs side by side, $H$ times $D_h$ numbers, and gives $D$. A matrix times vectors side by side is a sum: head $j$ is
# multiplied only by columns $j D_h$ to $(j+1) D_h$ of the matrix. Return what each head adds, on an axis of its own. (The package's answer:
# `taps.head_results`.)


# %%
def each_head(z, weight):
    """z: (B, T, H, Dh);  weight: (D, D)  ->  (B, T, H, D)"""
    return np.stack([part for _, part in taps.head_results(z, {"weight": weight}, ops)], axis=2)


def my_each_head(z, weight):
    B, T, H, Dh = z.shape
    whole = z.reshape(B, T, H * Dh) @ weight.T  # (B, T, D): all heads together
    return np.repeat(whole[:, :, None], H, axis=2) / H


check(my_each_head, spec=each_head)
z = clean_cache["z", 3]
out_proj = lm.params["layers"][3]["self_attn"]["out_proj"]
together = each_head(z, out_proj["weight"]).sum(2) + out_proj["bias"]  # (B, T, D)
assert np.allclose(together, clean_cache["attn_out", 3], atol=1e-9)

# %% [markdown]
# ## What the stream would say at each layer
#
# The **logit lens** reads the stream after any block as if it were the last. For every position of the sentence, the word that would be predicted
# there, and with what probability:

# %%
guesses = list(lens.logit_lens(lm, clean))  # (name, (B, T, V)), the embeddings first
sure = np.array([ops.softmax(at_layer[0]).max(-1) for _, at_layer in guesses])  # (L + 1, T)
title = "the likeliest next token, said after each layer, and its probability"
ax = picture(sure, [name for name, _ in guesses], words(clean[0]), title, vmin=0, vmax=1)
ax.figure.set_size_inches(11, 3.8)
for (i, t), p in np.ndenumerate(sure):
    word = tok.decode([guesses[i][1][0, t].argmax()])
    word = "?" if "\ufffd" in word else word.strip() or repr(word)  # half a character
    ax.text(t, i, word, ha="center", va="center", fontsize=8, color="white" if p > 0.5 else "black")
assert np.allclose(guesses[-1][1], clean_logits, atol=1e-9)

# %% [markdown]
# The embeddings mostly say the token itself, for the table is read as it was written: that is what tying does. (A "?" is half a character: the row is
# one of bytes.) From the first block on the model predicts what comes next, and from layer 1 on it is right more and more often.

# %%
itself = [(at_layer[0].argmax(-1) == clean[0]).mean() for _, at_layer in guesses]
nll = [grad.shifted_cross_entropy(at_layer.copy(), clean) for _, at_layer in guesses]
for (name, _), share, loss in zip(guesses, itself, nll, strict=True):
    print(f"{name:<11} says the token itself at {share:>4.0%} of the places; loss {loss:5.2f}")
assert itself[0] > 0.5 > itself[-1]
assert nll[-1] == min(nll)

# %% [markdown]
# ### Exercise 2: the lens
#
# What the model would say if the stream ended as `x`: the last LayerNorm, `ops.layer_norm(x, **model.params["final_layer_norm"])`, then each token's
# score, the product with its row of `model.params["embed_tokens"]["weight"]`, $(V, D)$. (The package's answer: `lens.unembed`.)


# %%
def my_unembed(model, x):
    """x: (B, T, D)  ->  (B, T, V)"""
    E = model.params["embed_tokens"]["weight"]
    return x @ E.T


check(my_unembed, lens.unembed, *((lm, clean_cache["resid_post", i]) for i in (2, 5)))
assert np.allclose(lens.unembed(lm, clean_cache["resid_post", 2]), guesses[3][1], atol=1e-9)

# %% [markdown]
# ## A page to play with
#
# `opt-np explore "The man saw the ship. The man saw the" --out page.html` makes one file that opens offline in any browser: the candidates after each
# token, attention of any layer and head, the lens for every place. It is made of the same arrays.

# %%
html = explore.page(lm, tok, "The man saw the ship. The man saw the")
found = explore.gather(lm, tok, "The man saw the ship. The man saw the")
print(f"a page of {len(html) / 1000:.0f} kB")
assert html.startswith("<!DOCTYPE html>") and "src=" not in html  # it loads nothing
assert np.allclose(found["attention"], np.stack([clean_cache["pattern", i][0] for i in range(L)]))
assert found["top_ids"][-1, -1, 0] == clean_logits[0, -1].argmax()

# %% [markdown]
# So much for what a model does with its values. Next, how fast they can be computed: attention without ever storing its matrix ([notebook
# 9](09_flash_attention.ipynb)).
