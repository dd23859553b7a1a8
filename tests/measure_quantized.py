"""What int8 and int4 cost in quality: python tests/measure_quantized.py TEXT [MODEL]

For the model (by default the shipped one) as it is, and with six channels made 60 times as large without changing its output: how far the logits are
from float32's, ‖difference‖ / ‖logits‖, and by how much perplexity grows, for each type of weights and each way of rounding the activations.
"""

import sys
from pathlib import Path

import numpy as np
from test_quantize import KINDS, outlier_channels

from opt_fast import ops_cpu
from opt_np import OPTForCausalLM, OPTTokenizer, grad, model, ops
from opt_np.cli import SHIPPED
from opt_np.quantize import quantized

ROWS, LENGTH = 20, 511


class Rounding:
    """opt_np.ops, with x rounded to so many bits before each product: one scale for each token, or for each block of its numbers."""

    def __init__(self, bits: int, block: int = 0) -> None:
        self.most, self.block = np.float32(2 ** (bits - 1) - 1), block

    def __getattr__(self, name):
        return getattr(ops, name)

    def linear(self, x, weight, *others, **leaves):
        block = self.block or x.shape[-1]
        parts = [x[..., k : k + block] for k in range(0, x.shape[-1], block)]
        scales = [np.maximum(np.abs(part).max(-1, keepdims=True), np.float32(1e-30)) / self.most for part in parts]
        return ops.linear(np.concatenate([np.rint(part / s) * s for part, s in zip(parts, scales, strict=True)], -1), weight, *others, **leaves)

    def mlp(self, h, fc1, fc2, function):
        return self.linear(ops.activation(self.linear(h, **fc1), function), **fc2)


SCHEMES = {
    "float32": ops,
    "16 bits, blocks of 384 (ours)": ops_cpu,
    "8 bits, blocks of 32": Rounding(8, 32),
    "8 bits, a token at a time": Rounding(8),
}


def main(text, folder=SHIPPED):
    lm, tokenizer = OPTForCausalLM.from_pretrained(folder), OPTTokenizer.from_pretrained(folder)
    tokens = tokenizer.encode(Path(text).read_text(encoding="utf-8"))[1 : ROWS * LENGTH + 1]
    ids = np.insert(np.reshape(tokens, (ROWS, LENGTH)), 0, 2, axis=1)
    print("| weights | x | logits | perplexity | logits, six large channels | perplexity |\n|---|---|---|---|---|---|")
    shapes = [lm.params, outlier_channels(lm.params)]
    exact = [measure(params, lm.config, ids, ops) for params in shapes]
    for kind in [None, *KINDS]:
        for scheme, backend in SCHEMES.items():
            if kind is None and backend in (ops, ops_cpu):
                continue
            cells = []
            for params, (logits, loss) in zip(shapes, exact, strict=True):
                tree = params if kind is None else quantized(params, lm.config, *kind)[0]
                ours, our_loss = measure(tree, lm.config, ids, backend)
                cells += [f"{np.linalg.norm(ours - logits) / np.linalg.norm(logits):.4f}", f"{100 * np.expm1(our_loss - loss):+.2f} %"]
            name = "float32" if kind is None else kind[0] + (f", groups of {kind[1]}" if kind[0] == "int4" else "")
            print(f"| {name} | {scheme} | " + " | ".join(cells) + " |", flush=True)


def measure(params, cfg, ids, backend):
    logits = model.forward(backend.pack(params), ids, cfg, ops=backend)
    return logits, float(grad.shifted_cross_entropy(logits, ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
