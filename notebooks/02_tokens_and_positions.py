# %% [markdown]
# # Tokens and positions
#
# A model reads neither letters nor words: it reads ids, each at a position. Afterwards you can cut a word into tokens by hand, say why OPT's and
# GPT-2's ids differ although both cut alike, and pad a batch so that no row notices its neighbours.

# %%
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, show

from opt_np import OPTForCausalLM, OPTTokenizer, gpt2, model, ops
from opt_np import tokenizer as tokenizing

lm, tok = OPTForCausalLM.from_pretrained(MODEL), OPTTokenizer.from_pretrained(MODEL)
cfg, positions = lm.config, lm.params["embed_positions"]["weight"]
vocab = json.loads((MODEL / "vocab.json").read_text(encoding="utf-8"))  # token -> id
print(f"{len(vocab)} tokens, {cfg.max_position_embeddings} positions")

# %% [markdown]
# ## Text is bytes
#
# UTF-8 writes every text as bytes, 1 to 4 for a character. GPT-2's tokenizer, which is OPT's too, starts from these 256 values, so no text is unknown
# to it. Its files are text, though, and some bytes cannot be printed. So each byte is represented by a letter: printable bytes by themselves, the
# others by letters from U+0100 on. A space, byte 32, becomes `Ġ`.

# %%
show(tokenizing.byte_alphabet)

# %%
letter = {byte: c for c, byte in tokenizing.BYTE_OF.items()}
for text in ("a", " ", "é", "🙂"):
    print(repr(text), list(text.encode()), "".join(letter[b] for b in text.encode()))
assert sorted(letter) == list(range(256))
assert len(set(letter.values())) == 256  # no two bytes share a letter
assert set(letter.values()) <= set(vocab)  # each byte alone is a token: nothing is unknown

# %% [markdown]
# ## Merging: byte-pair encoding
#
# `merges.txt` is a list of pairs, in the order in which the tokenizer's training found them: at each step the pair that was then the most frequent in
# the books. To cut a word, begin with its letters, look at all pairs of neighbours, and join the pair that is **earliest** in the list; repeat until
# no pair is in it.

# %%
lines = (MODEL / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
rank = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
word = " threshold"
pieces = [letter[b] for b in word.encode()]
while len(pieces) > 1:
    ranks = [rank.get(pair, len(rank)) for pair in itertools.pairwise(pieces)]
    if min(ranks) == len(rank):
        break
    i = int(np.argmin(ranks))  # the first of the earliest
    print(f"{' '.join(pieces):<22} joins {pieces[i]!r} + {pieces[i + 1]!r}, number {ranks[i]}")
    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
print(" ".join(pieces))
assert [vocab[piece] for piece in pieces] == tok.encode(word, add_special_tokens=False)

# %% [markdown]
# Before any merging, the text is cut into words, each with the space before it, so that no token reaches across two words. The space is part of the
# token: `" man"` and `"man"` have different ids. A space lost in a prompt, or left at its end, changes what the model reads.

# %%
for text in ("The man", "Theman", "the man", " The man"):
    print(f"{text!r:<11}", [tok.decode([i]) for i in tok.encode(text, add_special_tokens=False)])
assert tok.encode(" man", add_special_tokens=False) != tok.encode("man", add_special_tokens=False)
assert tok.decode(tok.encode(" The man\n")) == "</s> The man\n"  # nothing is lost

# %% [markdown]
# ### Exercise 1: cutting a word
#
# The function below takes the longest token that fits, from the left: a natural idea, right for many words and wrong for some. Make it join by
# rank, as the loop above does; it gets the text and the tokenizer's next two arguments, which it may ignore. The package leaves this to the library
# `tokenizers`, called in `opt_np/tokenizer.py`, `_encoding`.


# %%
def my_encode(text, text_pair=None, add_special_tokens=False):
    """One word, with its space, to ids."""
    rest, ids = "".join(letter[b] for b in text.encode()), []
    while rest:
        n = next(n for n in range(len(rest), 0, -1) if rest[:n] in vocab)
        ids.append(vocab[rest[:n]])
        rest = rest[n:]
    return ids


words = (" captain", " nevertheless", " threshold", " wilderness", "unhappily", " née")
check(my_encode, tok.encode, *((word, None, False) for word in words))

# %% [markdown]
# ## The same merges, other ids
#
# GPT-2 numbers its tokens by its merges: the 256 bytes in the order of that alphabet, then merge 0, merge 1, and so on, and one special token at the
# end. OPT took over GPT-2's 50000 merges, but its training code, fairseq, numbers tokens by how often they occur, behind four specials: in OPT `.` is
# 4 and ` the` is 5. So both cut every text into the same pieces, but an id of one stands for a different piece in the other.
#
# Our small tokenizer has its own merges, and shows half of this: its ids are GPT-2's numbering moved up by the four specials. In OPT the order
# differs too.

# %%
merges_only = Path(tempfile.mkdtemp())  # without vocab.json, ids follow from the merges alone
shutil.copy(MODEL / "merges.txt", merges_only)
as_gpt2 = gpt2.tokenizer(merges_only)
numbers = {c: i for i, c in enumerate([*tokenizing.BYTE_OF, *("".join(pair) for pair in rank)])}
text = "The old man crossed the threshold."
ours, others = tok.encode(text, add_special_tokens=False), as_gpt2.encode(text)
print("token      ours  as GPT-2")
for i, j in zip(ours, others, strict=True):
    print(f"{tok.decode([i])!r:<9} {i:>5} {j:>9}")
cut = [tok.token_bytes(i) for i in ours]
assert cut == [as_gpt2.token_bytes(j) for j in others]  # equal pieces
assert others[-3:] == [numbers[piece] for piece in ("resh", "old", ".")]  # each by its place
assert not set(ours) & set(others)

# %% [markdown]
# Read with the wrong table, the text is nonsense, but no error is raised. This is what happens to an OPT that is given GPT-2's ids.

# %%
print(repr(tok.decode(others)))
assert tok.decode(others) != text

# %% [markdown]
# ## One `</s>` in front
#
# Ids 0 to 3 are `<s>`, `<pad>`, `</s>` and `<unk>`. OPT begins every text with `</s>`, id 2, which also ends it: in training, texts were concatenated
# with `</s>` between them. `<s>` looks like a beginning, but OPT never saw it there. What another beginning does to the prediction of the *same*
# tokens, the mean of $-\ln P$ of each, on one sentence and our small model: a hint, no more, and without a beginning all positions move by one as
# well (Meta's weights have not been measured here):

# %%
text = "It was a cold and windy night, and the old man sat alone by the fire."
plain = tok.encode(text, add_special_tokens=False)
losses = {}  # nats per token
for name, start in (("</s>", [2]), ("<s>", [0]), ("nothing", [])):
    ids = np.array([start + plain])
    log_p = np.log(ops.softmax(lm(ids).logits[0]))
    seen = log_p[len(start) : -1][np.arange(len(plain) - 1), plain[1:]]  # all but the first token
    losses[name] = -seen.mean()
print({name: round(float(loss), 3) for name, loss in losses.items()})
assert tok.encode(text) == [2, *plain]
assert losses["</s>"] == min(losses.values())

# %% [markdown]
# ## Characters that span tokens
#
# An emoji that the books did not have stays four bytes, four tokens. None of them is a character, so none can be printed alone: decoding a piece
# gives the replacement character `�`. A program that prints tokens as they come must hold bytes back until a character is complete. `Detokenizer`
# does.

# %%
show(tokenizing.Detokenizer)

# %%
text = "It was naïve 🙂!"
ids = tok.encode(text)
stream = list(tok.stream_decode(ids))
for i, now in zip(ids, stream, strict=False):
    print(f"{i:>5} {tok.token_bytes(i)!s:<16} alone {tok.decode([i])!r:<8} streamed {now!r}")
assert "".join(stream) == "</s>" + text == tok.decode(ids)
assert "�" in "".join(tok.decode([i]) for i in ids)
assert b"".join(tok.token_bytes(i) for i in ids[1:]).decode() == text

# %% [markdown]
# ## Positions, and an offset of 2
#
# Attention weighs keys by what they hold, not by where they stand; only the causal mask tells it a little about order. So a token's position is
# looked up in a table of its own, learned like the token table, and added. The table has two rows more than there are positions: position $p$ reads
# row $p + 2$. In fairseq, the pad's id, 1, was also the row for padding, and real positions came after it. Row 0 is never read; row 1 is what pads
# read; a checkpoint stores both. Left: rows 0 and 1 are short, for training had no use for them, and so is the last; the longest is row 2, position
# 0, where `</s>` stands. Right: nobody told the model that position 7 is near position 8; it learned some of that from text. (The single spikes there
# are not explained here.)

# %%
real = positions[2:] - positions[2:].mean(0)  # (512, D), what tells positions apart
real /= np.linalg.norm(real, axis=1, keepdims=True)
apart = np.arange(1, 400)
likeness = real @ real.T  # (512, 512)
cosine = [np.diag(likeness, d).mean() for d in apart]
fig, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
axes[0].plot(np.linalg.norm(positions, axis=1), ".", markersize=3)
axes[0].set(title="length of each row of embed_positions", xlabel="row", ylabel="length")
axes[1].plot(apart, cosine)
axes[1].set(title="likeness of two positions", xlabel="how far apart, tokens", ylabel="mean cosine")
assert positions.shape == (cfg.max_position_embeddings + 2, cfg.hidden_size)
assert np.linalg.norm(positions[:2], axis=1).max() < np.linalg.norm(positions[2:34], axis=1).min()
assert np.mean(cosine[:16]) > 0.15 > 0 > np.mean(cosine[240:272])  # near places are alike

# %% [markdown]
# `make_layout` is where the model decides the position of each token. Without padding, positions count up from 0, or from the number of tokens in the
# cache.

# %%
show(model.make_layout)

# %%
layout = model.make_layout(cfg, np.array([ids]))
x = model.embeddings(lm.params, np.array([ids]), layout, ops, model.no_tap)  # (1, T, D)
E = lm.params["embed_tokens"]["weight"]
assert np.array_equal(layout.positions, [np.arange(len(ids))])
assert np.array_equal(x[0], E[ids] + positions[2 : 2 + len(ids)])
forgotten = E[ids] + positions[: len(ids)]  # without the offset: plausible numbers, wrong model
assert np.abs(forgotten - x[0]).max() > 0.01

# %% [markdown]
# ## Padding
#
# Rows of a batch have one length, texts do not. The rest is filled with `<pad>`, on the left or on the right, and `attention_mask` says what is
# text: 1 for a token, 0 for a pad. Two things follow from it: no query sees a pad, and positions count *real* tokens only, so that pads on the left
# move nothing:
#
# $$\text{position} = \mathrm{cumsum}(\text{mask}) \cdot \text{mask} - 1$$
#
# At a pad this is $-1$, which reads row $-1 + 2 = 1$.

# %%
texts = ["The old man", "In the morning she went down to the sea"]
for side in ("left", "right"):
    batch = tok(texts, padding=True, padding_side=side)
    layout = model.make_layout(cfg, batch["input_ids"], batch["attention_mask"])
    print(f"{side}: ids {batch['input_ids'][0]}, positions {layout.positions[0]}")
    x = model.embeddings(lm.params, batch["input_ids"], layout, ops, model.no_tap)
    pads = batch["attention_mask"] == 0
    assert np.allclose(x[pads], E[1] + positions[1])  # pads read row 1
    assert (layout.positions[pads] == -1).all()

# %% [markdown]
# The test of a batch: every row's output is the one it has alone. In a batch the same sums are done in another order, so equality is up to rounding,
# which is why float64 is used here.

# %%
exact = OPTForCausalLM.from_pretrained(MODEL, dtype="float64")
alone = [exact(np.array([tok.encode(text)])).logits[0] for text in texts]  # (T, V) each
for side in ("left", "right"):
    batch = tok(texts, padding=True, padding_side=side)
    logits = exact(**batch).logits
    for b, wanted in enumerate(alone):
        found = logits[b][batch["attention_mask"][b] == 1]
        assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()
print("both rows, padded on either side, equal the rows alone")

# %% [markdown]
# ### Exercise 2: positions
#
# From a mask, the position of every token: $-1$ at pads, and 0, 1, 2 … at real tokens, wherever pads stand. The starter counts columns.


# %%
def positions_of(mask):
    """mask: (B, T)  ->  (B, T)"""
    return model.make_layout(cfg, np.zeros_like(mask), mask).positions


def my_positions(mask):
    return np.broadcast_to(np.arange(mask.shape[1]), mask.shape)


masks = [[1, 1, 1, 1, 1]], [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], [[0, 1, 1, 0, 1]]
check(my_positions, positions_of, *((np.array(mask),) for mask in masks))

# %% [markdown]
# ## What goes wrong without a mask
#
# Leave the mask out, and pads are tokens like any others: they are seen, and they push the text to later positions. Even one does harm.

# %%
row = tok.encode("The old man sat by the")
wanted = ops.softmax(exact(np.array([row])).logits[0, -1])
fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
pads, distances = [0, 1, 2, 4, 8, 16], []
for n in pads:
    ids = np.array([[1] * n + row])
    distances.append(np.abs(ops.softmax(exact(ids).logits[0, -1]) - wanted).sum() / 2)
    masked = exact(ids, attention_mask=(ids != 1).astype(int))
    assert np.abs(ops.softmax(masked.logits[0, -1]) - wanted).max() < 1e-12
ax.plot(pads, distances, "o-", label="without a mask")
ax.plot(pads, [0] * len(pads), "o-", label="with a mask")
ax.set(xlabel="pads on the left", ylabel="half the sum of |ΔP|")
ax.set_title("how far the prediction moves")
ax.legend()
assert distances[0] < 1e-12
assert min(distances[1:]) > 0.05

# %% [markdown]
# `generate` continues at the end of a row, so prompts are usually padded on the left. This package's takes rows padded on the right as well: their
# tokens are moved first (Hugging Face continues after the pads, and gives such rows other positions).

# %%
said = []
for side in ("left", "right"):
    batch = tok(texts, padding=True, padding_side=side)
    out = lm.generate(**batch, max_new_tokens=8)
    said.append(tok.batch_decode(out[:, batch["input_ids"].shape[1] :]))
print(said[0])
single = [lm.generate([tok.encode(text)], max_new_tokens=8)[0, -8:] for text in texts]
assert said[0] == said[1] == tok.batch_decode(single)

# %% [markdown]
# ## Past the last position
#
# There is no row for position 512 of this model (2048 of the published ones). A longer text is an error and not silently cut: what the model should
# see is for you to decide. `generate` can drop the start of the prompt (`overflow="truncate_left"`), or read the last tokens that fit anew for each
# token (`overflow="slide"`); scoring works in windows.

# %%
long = np.full((1, cfg.max_position_embeddings + 1), 300)
try:
    lm(long)
    refused = ""
except ValueError as error:
    refused = str(error)
print(refused)
assert "max_position_embeddings=512" in refused
out = lm.generate(long[:, :512], max_new_tokens=2, overflow="truncate_left")
assert out.shape == (1, 514)  # the prompt is returned whole, but its start was not read
assert lm(long[:, :512], logits_to_keep=1).logits.shape == (1, 1, cfg.vocab_size)

# %% [markdown]
# So ids, mask and positions are all that a model is told about a text. What it has learned is in its checkpoint: next, those bytes are read by hand
# ([notebook 3](03_a_checkpoint_by_hand.ipynb)).
