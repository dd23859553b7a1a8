"""Training on torch tensors: autograd through the model function, where opt_np/grad.py has backward functions written out. Names and meanings are
those of opt_np/grad.py and opt_np/optim.py, and a test compares the results.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from opt_fast.attention_cuda import first_derivatives_only, wide
from opt_np import grad
from opt_np.arrays import host
from opt_np.config import OPTConfig
from opt_np.model import id_array
from opt_np.optim import decays
from opt_np.tree import flatten, unflatten


class Random:
    """Random numbers on the parameters' device, with the interface of NumPy's generators: for dropout."""

    def __init__(self, seed: list[int], device: torch.device | None = None) -> None:
        from opt_fast import ops_cuda  # here, because it imports this module

        self.device = device or ops_cuda.device()
        self.generator = torch.Generator(self.device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))

    def random(self, shape: tuple[int, ...], _: Any = None) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, device=self.device)


def loss_and_grads(params: dict, input_ids: Any, labels: Any, cfg: OPTConfig, attention_mask: Any = None, head: grad.Head = grad.language_model_head,
                   num_items: int | None = None, rng: Any = None, ops: ModuleType | None = None) -> tuple[float, dict]:  # fmt: skip
    """As grad.loss_and_grads, by autograd.  input_ids: (B, T);  labels: (B, T);  attention_mask: (B, T)  ->  loss, grads

    Raises ValueError as it does.
    """
    from opt_fast import ops_cuda  # here, because it imports this module

    input_ids, labels = id_array(input_ids), host(labels)
    leaves = {name: leaf.detach().requires_grad_(leaf.is_floating_point()) for name, leaf in flatten(params).items()}  # the caller's are not changed
    params = unflatten(leaves)
    tokens = params["embed_tokens"]
    looked_up = tokens["weight"].view_as(tokens["weight"])
    if looked_up.requires_grad and cfg.pad_token_id is not None:
        # as torch's padding_idx: looking up a pad gives its row no gradient; its use in the head does
        looked_up.register_hook(lambda g: g.index_fill(0, torch.tensor([cfg.pad_token_id], device=g.device), 0))
    read = {**params, "embed_tokens": {**tokens, "weight": looked_up}}
    h, _ = grad.decoder_fwd(read, input_ids, cfg, attention_mask, rng, ops or ops_cuda)
    loss = HEADS[head](h, params, input_ids, labels, cfg, num_items)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return float(loss.detach()), unflatten(dict(zip(leaves, grads, strict=True)))


def whole(numbers: Any, device: torch.device) -> Tensor:
    """Ids or labels of any integer type as int64, with which torch indexes.  numbers: (*N)  ->  (*N)"""
    return torch.tensor(np.ascontiguousarray(numbers, np.int64), device=device)


# ---- losses ------------------------------------------------------------------------------------------------------------------------------


def shifted_cross_entropy(logits: Tensor, labels: np.ndarray, num_items: int | None = None) -> Tensor:
    """As grad.shifted_cross_entropy, in float32 at least; num_items as in grad.language_model_head.  logits: (B, T, V);  labels: (B, T)  ->  ()"""
    kept, wanted = grad.wanted_tokens(labels, tuple(logits.shape[:2]), logits.shape[2])
    return cross_entropy(logits[:, :-1][kept], wanted) / (num_items or len(wanted))


def cross_entropy(logits: Tensor, labels: np.ndarray) -> Tensor:
    """Sum over rows of -log softmax(logits)[label].  logits: (N, V);  labels: (N)  ->  ()"""
    return F.cross_entropy(wide(logits), whole(labels, logits.device), reduction="sum")


def classification_loss(logits: Tensor, labels: Any, problem_type: str | None) -> Tensor:
    """As grad.classification_loss.  logits: (B, L);  labels: (B) or (B, L)  ->  ()"""
    return through_host(logits, lambda known: grad.classification_loss(known, labels, problem_type))


def question_loss(logits: Tensor, positions: np.ndarray) -> Tensor:
    """As grad.question_loss.  logits: (B, T, 2);  positions: (B, 2)  ->  ()"""
    return through_host(logits, lambda known: grad.question_loss(known, positions))


def through_host(logits: Tensor, loss: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> Tensor:
    """A loss over a few logits, computed by NumPy on the host, as is its gradient."""
    return OnHost.apply(logits, loss)


class OnHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> Tensor:
        found, dlogits = loss(host(wide(logits)))
        ctx.dlogits = torch.as_tensor(dlogits, dtype=logits.dtype, device=logits.device)
        return torch.tensor(found, dtype=torch.float64, device=logits.device)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        first_derivatives_only()
        return ctx.dlogits * dloss.to(ctx.dlogits.dtype), None


def language_model_head(h: Tensor, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None) -> Tensor:
    weight = params.get("lm_head", params["embed_tokens"])["weight"]
    return shifted_cross_entropy(F.linear(h, weight), labels, num_items)


def classification_head(h: Tensor, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None) -> Tensor:
    at = np.arange(len(h)), grad.pooled_rows(input_ids, cfg.pad_token_id)
    loss = classification_loss(F.linear(h[at], **params["score"]), labels, cfg.extra.get("problem_type"))
    return loss * (len(h) / (num_items or len(h)))


def question_head(h: Tensor, params: dict, input_ids: np.ndarray, labels: np.ndarray, cfg: OPTConfig, num_items: int | None = None) -> Tensor:
    return question_loss(F.linear(h, **params["qa_outputs"]), labels) * (len(h) / (num_items or len(h)))


HEADS: dict[Any, Callable[..., Tensor]] = {
    grad.language_model_head: language_model_head, grad.classification_head: classification_head, grad.question_head: question_head,
}  # fmt: skip


# ---- the step ----------------------------------------------------------------------------------------------------------------------------


def clip_by_global_norm(grads: Any, max_norm: float) -> float:
    """As optim.clip_by_global_norm."""
    leaves = list(flatten(grads).values())
    norm = torch.nn.utils.get_total_norm(leaves)
    if (coefficient := max_norm / (float(norm) + 1e-6)) < 1:
        for g in leaves:
            g *= coefficient
    return float(norm)


@torch.no_grad()
def adamw_step(params: Any, grads: Any, state: dict[str, Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 0.0) -> None:  # fmt: skip
    """As optim.adamw_step, by torch's own."""
    trees = [flatten(tree) for tree in (params, grads, state["m"], state["v"])]
    for decayed in (True, False):
        names = [name for name in trees[0] if decays(name) == decayed]
        p, g, m, v = ([tree[name] for name in names] for tree in trees)
        steps = [torch.tensor(float(state["step"])) for _ in names]  # adamw adds 1
        adamw(p, g, m, v, [], steps, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay if decayed else 0.0, eps=eps,
              maximize=False)  # fmt: skip
    state["step"] += 1
