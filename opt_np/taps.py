"""Names for every activation inside the model, and two ways to use them: cache the values, or replace them.

A point is a named activation, and a tap a function that the model calls at every point. A point is named by the path of the HF module whose output
it is; those without a module have their own names: resid_pre (a block's input), resid_mid (after attention was added), resid_post (after fc2 was
added), attn_scores, attn_weights, attn_output. TransformerLens's names work too: "blocks.3.attn.hook_z" is
"model.decoder.layers.3.self_attn.attn_output".

    logits, cache = run_with_cache(model, ids)                                            # every point, by either name
    run_with_hooks(model, ids, [("blocks.3.hook_attn_out", lambda x, name: 0 * x)])       # without layer 3's attention

In both norm orders resid_mid = resid_pre + self_attn. In pre-norm models resid_post = resid_mid + fc2, the block's output. Post-norm models
(opt-350m) normalise after each sum: resid_post = self_attn_layer_norm(resid_mid) + fc2, and the block's output is final_layer_norm(resid_post).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from opt_np.arrays import host
from opt_np.config import OPTConfig
from opt_np.model import Tap
from opt_np.ops import LAYER_NORM_EPS

DECODER, LAYER = "model.decoder", "model.decoder.layers.{i}"
ATTENTION = ("q_proj", "k_proj", "v_proj", "attn_scores", "attn_weights", "attn_output")
# TransformerLens's names inside a block. Under them, q, k and v are (B, T, H, Dh).
BLOCK_ALIASES = {
    "hook_resid_pre": "resid_pre", "attn.hook_q": "self_attn.q_proj", "attn.hook_k": "self_attn.k_proj", "attn.hook_v": "self_attn.v_proj",
    "attn.hook_attn_scores": "self_attn.attn_scores", "attn.hook_pattern": "self_attn.attn_weights", "attn.hook_z": "self_attn.attn_output",
    "hook_attn_out": "self_attn", "hook_resid_mid": "resid_mid", "mlp.hook_pre": "fc1", "mlp.hook_post": "activation_fn", "hook_mlp_out": "fc2",
    "hook_resid_post": "resid_post", "ln1.hook_normalized": "self_attn_layer_norm", "ln2.hook_normalized": "final_layer_norm",
}  # fmt: skip
BY_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
# Names that a Cache computes from other points: the LayerNorms' denominators, and each head's part of the attention's output.
DERIVED = re.compile(r"blocks\.(\d+)\.(ln1\.hook_scale|ln2\.hook_scale|attn\.hook_result)|ln_final\.hook_scale")

Which = str | tuple | Callable[[str], bool]  # a point's name, HF's or TransformerLens's, its short form ("pattern", 3), or a filter on names
Hook = Callable[[Any, str], Any]  # (value, name) -> the value to continue with, or None for the given one, which the hook may have changed in place


def names(cfg: OPTConfig) -> list[str]:
    """Every point of the language model, in the order in which they are computed."""
    projected = [f"{DECODER}.project_in"] if cfg.has_projections else []
    found = [f"{DECODER}.embed_tokens", *projected, f"{DECODER}.embed_positions"]
    attention = [*(f"self_attn.{name}" for name in ATTENTION), "self_attn", "resid_mid"]
    branch = ["fc1", "activation_fn", "fc2", "resid_post"]
    if cfg.do_layer_norm_before:
        block = ["resid_pre", "self_attn_layer_norm", *attention, "final_layer_norm", *branch]
    else:
        block = ["resid_pre", *attention, "self_attn_layer_norm", *branch, "final_layer_norm"]
    for i in range(cfg.num_hidden_layers):
        here = LAYER.format(i=i)
        found += [*(f"{here}.{name}" for name in block), here]
    found += [f"{DECODER}.final_layer_norm"] if cfg.has_final_layer_norm else []
    return [*found, *([f"{DECODER}.project_out"] if cfg.has_projections else []), "lm_head"]


def aliases(cfg: OPTConfig) -> dict[str, str]:
    """TransformerLens's names, each with the point it refers to."""
    embedded = f"{DECODER}.project_in" if cfg.has_projections else f"{DECODER}.embed_tokens"
    found = {"hook_embed": embedded, "hook_pos_embed": f"{DECODER}.embed_positions"}
    for i in range(cfg.num_hidden_layers):
        found |= {f"blocks.{i}.{alias}": f"{LAYER.format(i=i)}.{name}" for alias, name in BLOCK_ALIASES.items()}
        if not cfg.do_layer_norm_before:
            found[f"blocks.{i}.hook_normalized_resid_post"] = LAYER.format(i=i)
    return found | ({"ln_final.hook_normalized": f"{DECODER}.final_layer_norm"} if cfg.has_final_layer_norm else {})


def point(name: str, cfg: OPTConfig) -> str:
    """The point that a name refers to, HF's or TransformerLens's. Raises a ValueError that lists the closest names."""
    here, other = names(cfg), aliases(cfg)
    if derived(name):
        raise ValueError(f"{name} is made from other points when it is looked up in a cache; it cannot be replaced")
    name = name if name in here or name in other else f"hook_{name}" if f"hook_{name}" in other else name  # "embed" as in TransformerLens
    if name in here or name in other:
        return other.get(name, name)
    near = difflib.get_close_matches(name, [*here, *other], n=3, cutoff=0)
    raise ValueError(f"{name!r} is no point of this model; near it are {', '.join(near)} (taps.names lists all)")


def run_with_cache(model: Any, input_ids: Any, names_filter: Which | Iterable[Which] | None = None, **inputs: Any) -> tuple[Any, Cache]:
    """The logits, and the values at all points, or at those that names_filter selects: a name, several, or a filter. **inputs go to the model.

    input_ids: (B, T)  ->  (B, T, V), values by name

    Values are copies. Raises ValueError for a name or a filter that matches no point. Source: TransformerLens's run_with_cache.
    """
    found = Cache(model)
    which = [] if names_filter is None else [names_filter] if isinstance(names_filter, str | tuple) or callable(names_filter) else list(names_filter)
    kept = {path for one in which for path in found.sources(one)}

    def tap(name: str, value: Any) -> Any:
        if not which or name in kept:
            found[name] = copied(value)
        return value

    check_head(model)
    return model(input_ids, tap=tap, **inputs).logits, found


def run_with_hooks(model: Any, input_ids: Any, fwd_hooks: Iterable[tuple[Which, Hook]], **inputs: Any) -> Any:
    """The logits of a pass with hooks, which see, and may replace, intermediate values; given as pairs of a name, or a filter on names, and a hook.

    input_ids: (B, T)  ->  (B, T, V)

    hook(value, name) returns the value to continue with, or None for the one it was given, which it may change in place. Several hooks at one point
    run in order. Raises ValueError for a name that matches no point, and a value of another shape or dtype. Source: TransformerLens's run_with_hooks.
    """
    if "labels" in inputs:
        raise ValueError("run_with_hooks returns logits; for the loss, call model(ids, labels=ids, tap=taps.hooked(hooks, model.config)).loss")
    check_head(model)
    return model(input_ids, tap=hooked(fwd_hooks, model.config), **inputs).logits


def check_head(model: Any) -> None:
    """Raises ValueError for a class without a language-model head."""
    if model.head != "lm_head":
        raise ValueError(f"{type(model).__name__} gives no logits of tokens; use OPTForCausalLM, or pass tap=taps.hooked(…) to the model's call")


def hooked(hooks: Iterable[tuple[Which, Hook]], cfg: OPTConfig) -> Tap:
    """The tap that runs these hooks, to pass to a model's call or to trace.record. Raises ValueError as run_with_hooks does."""
    hooks = list(hooks.items()) if isinstance(hooks, dict) else list(hooks)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1]) for pair in hooks):
        raise ValueError('hooks are a list of pairs, a name and a function: [("blocks.3.attn.hook_z", function)]')
    placed = [(meant(which, cfg), hook) for which, hook in hooks]

    def tap(path: str, value: Any) -> Any:
        for here, hook in placed:
            if path in here:
                value = edited(value, here[path], hook, cfg)
        return value

    return tap


def edited(value: Any, name: str, hook: Hook, cfg: OPTConfig) -> Any:
    """The value that a hook returns or leaves; raises ValueError for another shape or dtype."""
    given = seen_as(name, copied(value), cfg)
    result = hook(given, name)
    result = given if result is None else result
    if tuple(getattr(result, "shape", ())) != tuple(given.shape) or result.dtype != given.dtype:
        had = f"{result.dtype}{tuple(result.shape)}" if hasattr(result, "shape") else type(result).__name__
        raise ValueError(f"the hook at {name} returned {had}; the value there is {given.dtype}{tuple(given.shape)}")
    return result.reshape(value.shape)


def meant(which: Which, cfg: OPTConfig) -> dict[str, str]:
    """The points that a name or a filter selects, each with the name that matched: the one that its hook is given.

    Raises ValueError if there is none.
    """
    if not callable(which):
        name = full_name(which, cfg.num_hidden_layers)
        return {point(name, cfg): name}
    found = {path: alias for alias, path in aliases(cfg).items() if which(alias)} | {path: path for path in names(cfg) if which(path)}
    if not found:
        raise ValueError("the filter is true for no point's name, neither HF's nor TransformerLens's (taps.names and taps.aliases list them)")
    return found


def seen_as(name: str, value: Any, cfg: OPTConfig) -> Any:
    """A value in its name's shape: TransformerLens's q, k and v are split into heads.  value: (B, T, D)  ->  (B, T, H, Dh) for these"""
    return value.reshape(*value.shape[:-1], cfg.num_attention_heads, cfg.head_dim) if name.endswith(BY_HEADS) else value


def copied(value: Any) -> Any:
    """A copy of a NumPy array or a torch tensor."""
    return value.clone() if hasattr(value, "clone") else value.copy()


class Cache(dict):
    """Values by the paths of their points; TransformerLens's names, and its short form cache["pattern", 3], find them too.

    lens.residual_pieces and lens.attribution do what TransformerLens's decompose_resid and logit_attrs do.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.cfg = model, model.config

    def __missing__(self, name: Any) -> Any:
        name = full_name(name, self.cfg.num_hidden_layers)
        (source,) = self.sources(name)
        if source not in self.keys():
            raise KeyError(f"{name} needs {source}, which was not kept; ask for it: run_with_cache(model, ids, names_filter=[…, {name!r}])")
        return self.derive(name, source) if derived(name) else seen_as(name, self[source], self.cfg)

    def __contains__(self, name: object) -> bool:
        try:
            return super().__contains__(name) or all(super(Cache, self).__contains__(path) for path in self.sources(name))
        except ValueError:
            return False

    def get(self, name: Any, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (this is get)

    def sources(self, which: Any) -> list[str]:
        """The points that have to be cached for `which` to be looked up."""
        name = which if callable(which) else full_name(which, self.cfg.num_hidden_layers)
        if not derived(name):
            return list(meant(name, self.cfg))
        if name.endswith("attn.hook_result"):
            return [point(name.replace("result", "z"), self.cfg)]
        return [self.norm_input(name)]

    def derive(self, name: str, source: str) -> Any:
        """hook_scale: (B, T, 1), what a LayerNorm divides by; hook_result: (B, T, H, D), what each head adds to the stream, without the bias."""
        x = host(self[source])
        if not name.endswith("hook_result"):
            return np.sqrt(x.var(-1, keepdims=True) + LAYER_NORM_EPS)
        out_proj = self.model.params["layers"][int(re.findall(r"\d+", name)[0])]["self_attn"]["out_proj"]
        return np.stack([part for _, part in head_results(x, out_proj, self.model.ops)], axis=2)

    def norm_input(self, name: str) -> str:
        """The point that a LayerNorm reads, from the name of its scale. Raises ValueError for a layer that does not exist."""
        pre, found = self.cfg.do_layer_norm_before, DERIVED.fullmatch(name)
        if found is None or found[1] is None:
            return point(f"blocks.{self.cfg.num_hidden_layers - 1}.hook_resid_post", self.cfg)
        first, second = ("pre", "mid") if pre else ("mid", "post")
        return point(f"blocks.{found[1]}.hook_resid_{first if '.ln1.' in name else second}", self.cfg)

    def __reduce__(self) -> tuple:
        """Copied or pickled, it becomes a plain dict of values by their paths."""
        return dict, (dict(self),)


def derived(name: Any) -> bool:
    """Whether a name's value is computed from other points."""
    return isinstance(name, str) and DERIVED.fullmatch(name) is not None


def full_name(name: Any, layers: int) -> str:
    """("pattern", 3) -> "blocks.3.attn.hook_pattern"; ("scale", -1, "ln1") -> that of the last layer; strings stay as they are.

    Raises ValueError for anything else.
    """
    if isinstance(name, str):
        return name
    if not isinstance(name, tuple) or len(name) not in (2, 3) or not isinstance(name[1], int | np.integer):
        raise ValueError(f'{name!r} is no name of a point: a path, a name of TransformerLens, or its short form, as ("pattern", 3)')
    short, i, *inner = name
    i = i + layers if i < 0 else i
    inside = inner or [part for part, shorts in (("attn", ("q", "k", "v", "z", "pattern", "attn_scores", "result")), ("mlp", ("pre", "post")))
                       if short in shorts]  # fmt: skip
    return ".".join(["blocks", str(i), *inside, f"hook_{short}"])


def head_results(z: np.ndarray, out_proj: dict, ops: Any) -> Iterator[tuple[int, np.ndarray]]:
    """What each head adds to the stream, without out_proj's bias: out_proj of its output, with the other heads' outputs set to 0.

    z: (B, T, H, Dh)  ->  H times (B, T, D)
    """
    matrix = {name: a for name, a in out_proj.items() if name != "bias"}
    for head in range(z.shape[2]):
        alone = np.zeros_like(z)
        alone[:, :, head] = z[:, :, head]
        yield head, host(ops.linear(alone.reshape(*z.shape[:2], -1), **matrix))
