"""The README's verification table, measured: python tests/measure.py"""

import numpy as np
import torch
from reference import PADDINGS, SMALL, VARIANTS, batch, build, decoder_names, tensors, worst

from opt_np import grad, model
from opt_np.kv_cache import KVCache
from opt_np.tree import flatten


def forward(variant: str, padding: str) -> dict[str, float]:
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    theirs, ours = hf(*tensors(ids, mask), output_hidden_states=True), []
    logits = model.forward(params, ids, cfg, attention_mask=mask, hidden_states=ours)
    cache = KVCache()
    cached = [model.forward(params, ids[:, t : t + 1], cfg, cache, None if mask is None else mask[:, : t + 1]) for t in range(ids.shape[1])]
    hf32, _, params32 = build(variant, dtype="float32")
    errors = [
        np.sqrt(((a - logits) ** 2)[np.ones_like(ids) if mask is None else mask != 0].mean())
        for a in (model.forward(params32, ids, cfg, attention_mask=mask), hf32(*tensors(ids, mask)).logits.detach().numpy())
    ]
    return {
        "logits, float64: largest difference from HF / largest logit": worst(logits, theirs.logits, mask),
        "every hidden state, float64: the same": max(worst(a, b, mask) for a, b in zip(ours, theirs.hidden_states, strict=True)),
        "one token at a time from the cache / all at once, float64": worst(np.concatenate(cached, 1), logits, mask),
        "logits, float32: our error / torch's own, both against float64": errors[0] / errors[1],
    }


def backward(variant: str, padding: str) -> dict[str, float]:
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    labels = ids if mask is None else np.where(mask, ids, -100)
    hf.zero_grad()
    logits = hf(*tensors(ids, mask)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, cfg.vocab_size), torch.tensor(labels)[:, 1:].reshape(-1)).backward()
    theirs = decoder_names({name: p.grad.numpy() for name, p in hf.named_parameters()})
    _, grads = grad.loss_and_grads(params, ids, labels, cfg, attention_mask=mask)
    floor = 1e-6 * max(np.abs(g).max() for g in theirs.values())  # k_proj.bias: its true gradient is 0
    return {"gradients, float64: the worst tensor's relative difference from autograd": max(
        np.abs(g - theirs[name]).max() / max(np.abs(theirs[name]).max(), floor) for name, g in flatten(grads).items()
    )}  # fmt: skip


if __name__ == "__main__":
    results: dict[str, float] = {}
    for variant in VARIANTS:
        for padding in PADDINGS:
            for what, value in {**forward(variant, padding), **backward(variant, padding)}.items():
                results[what] = max(results.get(what, 0.0), value)
    shape = f"{SMALL['num_hidden_layers']} layers of {SMALL['hidden_size']} or so"
    print(f"worst over {len(VARIANTS)} variants and {len(PADDINGS)} kinds of padding, {shape}")
    for what, value in results.items():
        print(f"| {what} | {value:.1e} |" if value < 0.01 else f"| {what} | {value:.2f} |")
