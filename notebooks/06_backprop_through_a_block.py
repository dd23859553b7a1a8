# %% [markdown]
# # Backpropagation through a block
#
# Training asks one question of every weight: if you grow a little, does the loss grow or fall, and how fast? The answers, the **gradients**, come
# from the chain rule, applied from the loss back to the embeddings. This notebook derives it for each operation of OPT on paper, shows the few lines
# that compute it, and checks it against two witnesses: finite differences of the loss itself, and torch.

# %%
import matplotlib.pyplot as plt
import numpy as np
from learn import MODEL, check, show

from opt_np import OPTConfig, OPTForCausalLM, OPTTokenizer, grad, init, model, ops, optim
from opt_np.tree import flatten, map_leaves

rng = np.random.default_rng(0)
B, T, D, H, F, V = 2, 5, 12, 3, 16, 11

# %% [markdown]
# ## How to check a gradient
#
# Write $dy$ for $\partial\,\mathrm{loss} / \partial y$: an array of $y$'s shape. A **backward function** takes $dy$ and returns $dx$. The first
# witness needs no calculus: change one element of $x$ by $\pm\varepsilon$ and look at the loss,
#
# $$\frac{\partial\,\mathrm{loss}}{\partial x_i} \approx \frac{\mathrm{loss}(x + \varepsilon e_i) - \mathrm{loss}(x - \varepsilon e_i)}{2\varepsilon}$$
#
# The error is of the order $\varepsilon^2$, and rounding adds $10^{-16} / \varepsilon$: with $\varepsilon = 10^{-5}$ and float64 some ten digits
# are right. As a loss for any function take $\sum dy \odot f(x)$ with a fixed random $dy$: its gradient by $y$ is $dy$.


# %%
def differences(loss, x, eps=1e-5):
    """The gradient of loss() by x, one number at a time; x is moved in place and put back."""
    dx = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + eps
        up = loss()
        x[i] = old - eps
        dx[i] = (up - loss()) / (2 * eps)
        x[i] = old
    return dx


def close(a, b, digits=8):
    return np.abs(a - b).max() < 10.0**-digits * np.abs(b).max()


x = rng.normal(size=4)
assert close(differences(lambda: (x**3).sum(), x), 3 * x**2)

# %% [markdown]
# The second witness is torch, which applies the chain rule by itself.


# %%
def autograd(f, dy, *arrays):
    """torch's gradients of sum(dy * f(*arrays)), one for each array."""
    import torch

    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    f(torch, *tensors).backward(torch.tensor(dy))
    return [t.grad.numpy() for t in tensors]


(dx,) = autograd(lambda torch, x: x**3, np.ones(4), x)
assert close(dx, 3 * x**2)

# %% [markdown]
# ## Linear
#
# $y = x W^\top + b$, or $y_{no} = \sum_i x_{ni} W_{oi} + b_o$. An element $x_{ni}$ enters every $y_{no}$ of its row, with the factor $W_{oi}$; a
# weight $W_{oi}$ enters the column $y_{no}$ of every row, with the factor $x_{ni}$; $b_o$ the same with the factor 1. So
#
# $$dx_{ni} = \sum_o dy_{no} W_{oi}, \qquad dW_{oi} = \sum_n dy_{no} x_{ni}, \qquad db_o = \sum_n dy_{no}$$
#
# $$dx = dy\,W, \qquad dW = dy^\top x, \qquad db = \textstyle\sum_n dy_n$$

# %%
show(grad.linear_fwd, grad.linear_bwd)

# %%
x, dy = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, F))
p = {"weight": rng.normal(size=(F, D)), "bias": rng.normal(size=F)}
y, saved = grad.linear_fwd(x, p)
dx, dp = grad.linear_bwd(dy, saved)
theirs = autograd(lambda torch, x, w, b: torch.nn.functional.linear(x, w, b), dy, x, *p.values())
for mine, torchs, array in zip((dx, *dp.values()), theirs, (x, *p.values()), strict=True):
    assert close(mine, differences(lambda: (dy * ops.linear(x, **p)).sum(), array))
    assert close(mine, torchs, digits=13)
assert np.allclose(dp["weight"], np.einsum("bto,bti->oi", dy, x))  # the formula, letter by letter

# %% [markdown]
# ## LayerNorm
#
# $\hat x = (x - \bar x)\,r$ with $r = (\mathrm{var} + \epsilon)^{-1/2}$, and $y = \hat x \odot w + b$. For weight and bias as before:
# $dw = \sum_n dy_n \odot \hat x_n$, $db = \sum_n dy_n$; and $d\hat x = dy \odot w$. Then for one row of $D$ numbers:
#
# 1. $x_i$ enters $\hat x_i$ directly, with the factor $r$; the mean, with $1/D$; and $r$, through the variance, since
#    $\partial\,\mathrm{var} / \partial x_i = 2 (x_i - \bar x) / D$.
# 2. So $\partial r / \partial x_i = -\tfrac12 r^3 \cdot 2 (x_i - \bar x) / D = -r^2 \hat x_i / D$.
# 3. $\partial \hat x_j / \partial x_i = r (\delta_{ij} - 1/D) + (x_j - \bar x)\,\partial r / \partial x_i = r\,(\delta_{ij} - 1/D - \hat x_j \hat x_i / D)$.
# 4. Summed with $d\hat x_j$: $\;dx = r\,\big(d\hat x - \mathrm{mean}(d\hat x) - \hat x\;\mathrm{mean}(d\hat x \odot \hat x)\big)$.
#
# In words: LayerNorm discards the mean and the scale of $x$, so the components that would only change these are removed from the gradient.

# %%
show(ops.layer_norm_bwd)

# %%
x, dy = 3 * rng.normal(size=(B, T, D)) + 1, rng.normal(size=(B, T, D))
p = {"weight": rng.normal(size=D), "bias": rng.normal(size=D)}
dx, dweight, dbias = ops.layer_norm_bwd(dy, x, p["weight"])
arrays = (x, p["weight"], p["bias"])
theirs = autograd(lambda torch, x, w, b: torch.nn.functional.layer_norm(x, (D,), w, b), dy, *arrays)
for mine, torchs, array in zip((dx, dweight, dbias), theirs, arrays, strict=True):
    assert close(mine, differences(lambda: (dy * ops.layer_norm(x, **p)).sum(), array))
    assert close(mine, torchs, digits=13)
assert np.abs(dx.mean(-1)).max() < 1e-12  # nothing along the mean
along = (dx * (x - x.mean(-1, keepdims=True))).sum(-1)
assert np.abs(along).max() < 1e-4  # next to nothing along the size; what is left is epsilon's

# %% [markdown]
# ### Exercise 1: LayerNorm, backwards
#
# Without weight and bias: from `dy` and `x`, of shape $(\ldots, D)$, the formula of line 4. $\epsilon$ is $10^{-5}$. (The package's answer is above.)


# %%
def layer_norm_dx(dy, x):
    """dy: (*N, D);  x: (*N, D)  ->  (*N, D)"""
    return ops.layer_norm_bwd(dy, x)[0]


def my_layer_norm_dx(dy, x):
    r = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return r * dy  # as if mean and variance were fixed


check(my_layer_norm_dx, spec=layer_norm_dx)

# %% [markdown]
# ## The mlp
#
# $a = h W_1^\top + b_1$, $\;u = \max(a, 0)$, $\;y = u W_2^\top + b_2$. Twice linear, and between them the kink: where $a > 0$ the gradient passes,
# where $a < 0$ nothing moves the loss. ($a = 0$ has no derivative; it is taken as 0.) Galactica's gelu is $x\,\Phi(x)$, so by the product rule
# $\Phi(x) + x\,\varphi(x)$, with the normal distribution function $\Phi$ and its density $\varphi$. (Galactica is Meta's OPT for science.)

# %%
show(ops.activation_bwd, grad.mlp_bwd)

# %%
h, dy = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, D))
fc1 = {"weight": rng.normal(size=(F, D)), "bias": rng.normal(size=F)}
fc2 = {"weight": rng.normal(size=(D, F)), "bias": rng.normal(size=D)}
for function in ("relu", "gelu"):
    found = grad.mlp_bwd(dy, grad.mlp_fwd(h, fc1, fc2, function)[1])

    def in_torch(torch, h, w1, b1, w2, b2, function=function):
        act = getattr(torch.nn.functional, function)
        return act(h @ w1.T + b1) @ w2.T + b2

    arrays = (h, *fc1.values(), *fc2.values())
    mine = (found[0], *found[1].values(), *found[2].values())
    for gradient, torchs, array in zip(mine, autograd(in_torch, dy, *arrays), arrays, strict=True):
        moved = differences(lambda f=function: (dy * ops.mlp(h, fc1, fc2, f)).sum(), array)
        assert close(gradient, moved)
        assert close(gradient, torchs, digits=12)

# %% [markdown]
# ## Softmax and attention
#
# For one query: $s_j = c\,q \cdot k_j$ with $c = 1/\sqrt{d}$, $\;P = \mathrm{softmax}(s)$, $\;O = \sum_j P_j v_j$.
#
# 1. $O$ is linear in $v$ and in $P$: $\;dv_j = P_j\,dO$, summed over the queries, and $dP_j = dO \cdot v_j$.
# 2. $P_j = e^{s_j} / \sum_l e^{s_l}$, so $\partial P_j / \partial s_i = P_j (\delta_{ij} - P_i)$, and
#    $\;ds_i = \sum_j dP_j P_j (\delta_{ij} - P_i) = P_i \big(dP_i - \sum_j P_j dP_j\big)$.
# 3. The sum needs no weights: $\sum_j P_j\,dP_j = \sum_j P_j\,dO \cdot v_j = dO \cdot O$. FlashAttention depends on this (notebook 9).
# 4. $s$ is linear in $q$ and in $k$: $\;dq = c \sum_i ds_i k_i$, $\;dk_i = c\,ds_i\,q$, summed over the queries.
#
# A hidden key has $P_i = 0$, so $ds_i = 0$: the future gets no gradient, and no code is needed for it.
#
# In the code, `L` is $\log \sum_j e^{s_j}$ of each query, saved by the forward pass, so that $P = e^{s - L}$ can be recomputed. Where dropout appears
# (zeroing numbers at random in training), it is off here.

# %%
show(ops.attention_bwd)

# %%
Dh = D // H
q, k, v, dO = rng.normal(size=(4, B, T, H, Dh))
layout = model.make_layout(OPTConfig(), np.zeros((B, T), int))
found = grad.attention_bwd(dO, grad.attention_fwd(q, k, v, Dh**-0.5, layout, 0, None)[1])


def in_torch(torch, q, k, v):
    heads_first = [a.transpose(1, 2) for a in (q, k, v)]  # (B, H, T, Dh)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*heads_first, is_causal=True).transpose(1, 2)


for mine, torchs, array in zip(found, autograd(in_torch, dO, q, k, v), (q, k, v), strict=True):
    assert close(mine, differences(lambda: (dO * ops.attention(q, k, v, Dh**-0.5)).sum(), array))
    assert close(mine, torchs, digits=12)

# %%
P = ops.attention_probs(q, k, Dh**-0.5)  # (B, H, T, S): the four lines again, written out
dP = np.einsum("bthd,bshd->bhts", dO, v)
ds = P * (dP - (P * dP).sum(-1, keepdims=True))
assert np.allclose(found[0], Dh**-0.5 * np.einsum("bhts,bshd->bthd", ds, k))
assert np.allclose(found[1], Dh**-0.5 * np.einsum("bhts,bthd->bshd", ds, q))
assert np.allclose(found[2], np.einsum("bhts,bthd->bshd", P, dO))
O = ops.attention(q, k, v, Dh**-0.5)
assert np.allclose((P * dP).sum(-1), np.einsum("bthd,bthd->bht", dO, O))
assert not np.triu(ds, 1).any()  # nothing flows to what was hidden

# %% [markdown]
# ## The loss
#
# Cross-entropy of one row of logits $z$ with the token $y$ that came: $-\log \mathrm{softmax}(z)_y = \log \sum_j e^{z_j} - z_y$. The first term's
# derivative by $z_i$ is $e^{z_i} / \sum_j e^{z_j} = P_i$, the second's is $1$ at $y$ alone:
#
# $$dz = P - \mathrm{onehot}(y)$$
#
# All learning starts here: push every token down by its probability, and the right one up by what it lacked. The elements of a row add up to 0.

# %%
show(ops.cross_entropy)

# %%
z, labels = rng.normal(size=(6, V)), rng.integers(0, V, 6)
loss, dz = ops.cross_entropy(z.copy(), labels)  # it writes over the logits


def in_torch(torch, z):
    return torch.nn.functional.cross_entropy(z, torch.tensor(labels), reduction="sum")


(theirs,) = autograd(in_torch, np.array(1.0), z)
assert close(dz, differences(lambda: ops.cross_entropy(z.copy(), labels)[0], z))
assert close(dz, theirs, digits=13)
assert np.allclose(dz, ops.softmax(z) - np.eye(V)[labels])
assert np.abs(dz.sum(-1)).max() < 1e-12

# %% [markdown]
# ## A whole block
#
# Backward is forward, read from the last line to the first. At each $x + f(\mathrm{LN}(x))$ the gradient takes both paths, and the results are added:
# the direct path is why deep stacks can be trained, since nothing on it can shrink the gradient.

# %%
show(grad.decoder_layer_bwd)

# %%
cfg = OPTConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, ffn_dim=F,
                num_attention_heads=H, max_position_embeddings=8)
fresh = init.init_params(cfg, dtype=np.float64)
params = map_leaves(lambda a: a + 0.3 * rng.normal(size=a.shape), fresh)  # no bias 0, no norm 1
block, x, dy = params["layers"][0], rng.normal(size=(B, T, D)), rng.normal(size=(B, T, D))


def forward():
    return (dy * model.decoder_layer(x, block, cfg, layout, ops, None, 0, model.no_tap)).sum()


dx, dp = grad.decoder_layer_bwd(dy, grad.decoder_layer_fwd(x, block, cfg, layout)[1])
moved = {name: differences(forward, weight) for name, weight in flatten(block).items()}
assert flatten(dp).keys() == moved.keys() and len(moved) == 16
assert close(dx, differences(forward, x), digits=7)
for name, gradient in flatten(dp).items():
    if name != "self_attn.k_proj.bias":
        assert close(gradient, moved[name], digits=7), name

# %% [markdown]
# One of the sixteen is special. The keys' bias adds the same number, $c\,q \cdot b$, to all scores of a query, and a softmax is not changed by that:
# the gradient is 0, up to rounding, whatever the data. OPT has this bias in every layer, and no data teaches it: what little it moves in training is
# rounding, which AdamW magnifies.

# %%
useless = {name: np.abs(gradient).max() for name, gradient in flatten(dp).items()}
assert useless["self_attn.k_proj.bias"] < 1e-12
assert min(size for name, size in useless.items() if name != "self_attn.k_proj.bias") > 1e-3

# %% [markdown]
# ## The tied table: two gradients in one
#
# `embed_tokens` is used twice, by tokens coming in and by logits going out, and a number that enters the loss in two ways collects both. At the head
# it is the weight of a linear map, $dE = dz^\top h$: *every* row learns, at every place. At the bottom it is a lookup, $x_n = E_{i_n}$, with $i_n$
# the id that goes in at place $n$: a row collects the $dx_n$ of the places where its token stands, and the pad's row (torch's `padding_idx`) collects
# nothing there.

# %%
show(grad.embed_bwd)

# %% [markdown]
# Labels are the ids themselves: `loss_and_grads` shifts them by one inside, so that place $n$ is judged by the token at $n + 1$. A label of -100 is
# not counted, and the loss is the mean over those that are.

# %%
ids = rng.integers(4, V, (B, T))
ids[1, -2:] = cfg.pad_token_id  # a padded row
mask, labels = (ids != 1).astype(int), np.where(ids == 1, -100, ids)
loss, grads = grad.loss_and_grads(params, ids, labels, cfg, mask)
dE = grads["embed_tokens"]["weight"]  # (V, D)

untied_cfg = OPTConfig.from_dict({**cfg.to_dict(), "tie_word_embeddings": False})
untied = {**params, "lm_head": {"weight": params["embed_tokens"]["weight"].copy()}}
loss_2, apart = grad.loss_and_grads(untied, ids, labels, untied_cfg, mask)
from_lookup, from_head = apart["embed_tokens"]["weight"], apart["lm_head"]["weight"]
for i in range(V):
    size = [np.linalg.norm(part[i]) for part in (from_lookup, from_head)]
    print(f"row {i:>2}, in the text {(ids == i).sum()}×: lookup {size[0]:.3f}, head {size[1]:.3f}")
assert np.isclose(loss, loss_2, rtol=1e-12)
assert np.allclose(dE, from_lookup + from_head, rtol=0, atol=1e-12)
absent = [i for i in range(V) if i not in ids[mask == 1]]
assert not from_lookup[absent].any()  # rows without a token, and the pad's
assert (np.linalg.norm(from_head, axis=1) > 0).all()  # as a wrong answer every row learns

# %% [markdown]
# And the whole model against differences of its loss, in every tensor: embeddings, two blocks, last LayerNorm.

# %%
for name, weight in flatten(params).items():
    if "k_proj.bias" in name:
        continue
    some = weight.reshape(-1)[:24]  # a view of the first few: each number costs two runs
    moved = differences(lambda: grad.loss_and_grads(params, ids, labels, cfg, mask)[0], some)
    assert np.allclose(flatten(grads)[name].reshape(-1)[:24], moved, rtol=0, atol=1e-8), name
print(f"{len(flatten(params))} tensors, {sum(a.size for a in flatten(params).values())} numbers")

# %% [markdown]
# ### Exercise 2: the lookup, backwards
#
# Add each `dx[n]` to row `ids[n]` of `dweight`, and return it. The starter looks right, and is right as long as no token comes twice: NumPy's
# `a[ids] += b` writes each row once. (`np.add.at` does not have this trap; the package's answer is above.)


# %%
def my_embed_bwd(dx, ids, dweight):
    """dx: (*N, D);  ids: (*N);  dweight: (V, D)  ->  (V, D)"""
    dweight[ids] += dx
    return dweight


check(my_embed_bwd, spec=grad.embed_bwd)

# %% [markdown]
# ## One step of AdamW
#
# With all gradients computed, each weight moves by at most about one learning rate against its gradient's sign: AdamW divides a running mean of
# gradients by the root of a running mean of their squares. For a weight $p$ with gradient $g$, in step $t$:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2$$
#
# $$p \leftarrow p - \eta\lambda\,p - \eta\;\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + 10^{-8}}$$
#
# $\eta$ is the learning rate, $\beta_1, \beta_2$ how much of their past the running means retain. The divisions by $1 - \beta^t$ correct for $m$ and
# $v$ starting at 0. Weight decay, $\lambda$, is for matrices only.

# %%
show(optim.adamw_step)

# %%
import torch

name, rates = "layers.0.fc1.weight", {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
p, m, v = flatten(params)[name].copy(), 0.0, 0.0
theirs = torch.nn.Parameter(torch.tensor(p))
ours, state = map_leaves(np.copy, params), optim.adamw_init(params)
torchs = torch.optim.AdamW([theirs], **rates)
for t in (1, 2, 3):
    loss, grads = grad.loss_and_grads(ours, ids, labels, cfg, mask)
    g = flatten(grads)[name]
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    p = p - 1e-2 * 0.1 * p - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    theirs.grad = torch.tensor(g)
    torchs.step()
    optim.adamw_step(ours, grads, state, **rates)
    print(f"step {t}: loss {loss:.4f}")
    assert np.allclose(flatten(ours)[name], p, rtol=0, atol=1e-14)
    assert np.allclose(flatten(ours)[name], theirs.detach().numpy(), rtol=0, atol=1e-14)
assert grad.loss_and_grads(ours, ids, labels, cfg, mask)[0] < loss

# %% [markdown]
# ## Gradients of a real model
#
# How large are the gradients, and where? The shipped model on one sentence, beside a fresh one of the same shape. The table shows the root mean
# square for each kind of matrix, so that matrix sizes do not matter:

# %%
lm, tok = OPTForCausalLM.from_pretrained(MODEL), OPTTokenizer.from_pretrained(MODEL)
text = "The old man sat by the fire, and the old woman sat by the window."
sentence = np.array([tok.encode(text)])
models = {"fresh": init.init_params(lm.config, seed=0), "trained": lm.params}
found = {name: grad.loss_and_grads(p, sentence, sentence, lm.config) for name, p in models.items()}
kinds = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
sizes = {}  # of each model: (kinds, L)
for name, (_, grads) in found.items():
    leaves = [[flatten(layer)[f"{kind}.weight"] for layer in grads["layers"]] for kind in kinds]
    sizes[name] = np.array([[np.sqrt(np.mean(g**2)) for g in line] for line in leaves])

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
for ax, name in zip(axes, sizes, strict=True):
    for kind, line in zip(kinds, sizes[name], strict=True):
        ax.semilogy(line, marker="o", label=kind)
    ax.set(xlabel="layer", title=f"{name}, loss {found[name][0]:.2f} nats a token")
axes[0].set_ylabel("gradient, root mean square")
axes[1].legend(fontsize=8)
assert np.isclose(found["fresh"][0], np.log(lm.config.vocab_size), atol=0.5)
span = {name: size.max() / size.min() for name, size in sizes.items()}
print(f"largest by smallest: fresh {span['fresh']:.0f}, trained {span['trained']:.0f}")
assert (sizes["fresh"][0] < 0.1 * sizes["fresh"][1]).all()  # queries by values, in every layer
assert span["fresh"] > 100 > 30 > span["trained"]

# %% [markdown]
# In a fresh model the queries hardly learn: $dq$ is a sum of $ds_i k_i$, and both the keys and the differences of $dO \cdot v_j$ that make $ds$ are
# small, while $dv_j = P_j\,dO$ has neither factor. So values learn first. In the trained one the kinds have come together. Training clips the norm
# over all tensors together, so that one odd batch cannot throw the model far:

# %%
_, grads = found["trained"]
norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in flatten(grads).values()))
before = optim.clip_by_global_norm(grads, 1.0)
after = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in flatten(grads).values()))
print(f"norm {before:.2f}, clipped to {after:.2f}")
assert np.isclose(norm, before, rtol=1e-4)
assert np.isclose(after, min(1.0, before), rtol=1e-4)

# %% [markdown]
# That is all of training but the data: forward, backward, a step. The tests compare the same gradients with HF's model for twelve variants. Next, the
# same few functions teach a tiny model something that one can watch it learn ([notebook 7](07_training_an_induction_head.ipynb)).
