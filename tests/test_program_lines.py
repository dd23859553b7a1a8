"""OPT as lines of kernels/program.cu: run on the CPU by the emulator, they compute what model.py computes, for every variant, token after token."""

from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from cuda_emulator import Table, compile_for_cpu, why_not

from opt_fast import nvrtc, ops_cuda, program_cpp
from opt_fast.paged_cache import PAGE
from opt_fast.program_cuda import Program
from opt_fast.program_lines import Writer, buffers, takes
from opt_np import OPTConfig
from opt_np.config import parameter_shapes
from opt_np.quantize import quantized
from opt_np.tree import unflatten

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SHAPE = {"vocab_size": 50, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 176, "max_position_embeddings": 140}
VARIANTS = {
    "pre-norm": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 64},
    "pre-norm, projections, gelu": {"word_embed_proj_dim": 48, "activation_function": "gelu"},
    "no final norm, no biases": {"_remove_final_layer_norm": True, "enable_bias": False},
    "no affine, untied": {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False, "activation_function": "gelu_new"},
}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def parameters(cfg, dtype="float16", kind=None, device="cpu", uneven=False):
    rng, shapes = np.random.default_rng(0), parameter_shapes(cfg).items()
    found = unflatten({name: rng.normal("norm.weight" in name, 0.1, shape).astype(np.float32) for name, shape in shapes})
    if uneven:  # all matrices but one, so that q, k and v differ
        found["embed_tokens"]["weight"][:, 3] *= 10
        for i, layer in enumerate(found["layers"]):
            for name, p in [*layer["self_attn"].items(), ("fc1", layer["fc1"]), ("fc2", layer["fc2"])]:
                p["weight"][:, 5] *= 1 if (i, name) == (0, "k_proj") else 30
    found = small_halves(quantized(found, cfg, kind)[0], dtype) if kind else small.cast(found, dtype)
    return ops_cuda.pack_on(found, device)


def small_halves(node, dtype):
    """float32 leaves in 16 bits, but for int8's factors."""
    if isinstance(node, list):
        return [small_halves(item, dtype) for item in node]
    return {name: small_halves(leaf, dtype) if isinstance(leaf, dict | list) else leaf if name in ("scale", "columns") or leaf.dtype == np.int8
            else small.cast(leaf, dtype) for name, leaf in node.items()}  # fmt: skip


class Arrays:
    """The memory of tensors, as parts of one array for each storage: what the emulator copies, it copies once."""

    def __init__(self):
        self.whole = {}

    def __call__(self, t):
        t = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).detach()
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.whole:
            self.whole[storage.data_ptr()] = torch.empty(0, dtype=t.dtype).set_(storage).numpy()
        first = t.storage_offset()
        return self.whole[storage.data_ptr()][first : first + t.numel()].reshape(t.shape)


class Emulated:
    """A program whose lines the emulator runs."""

    def __init__(self, params, cfg, pool, B, grid=3, roomy=True):
        self.program = Program(params, cfg, pool, B, pool.most)
        Dh, H = cfg.head_dim, cfg.num_attention_heads
        room = B * program_cpp.pitch(cfg.ffn_dim) if roomy else program_cpp.pitch(cfg.ffn_dim)
        shared = program_cpp.bytes_needed(B, Dh, 2, room)
        self.fit = program_cpp.Fit(B, Dh, int(pool.keys.dtype == torch.bfloat16), grid, 2, shared if roomy else shared - 64)
        assert self.fit.holds(cfg.hidden_size) == roomy
        self.at, work = Arrays(), buffers(cfg, pool.keys, B)
        for a in work:
            a.fill_(torch.nan)
        self.writer = Writer(params, cfg, self.program, work, self.fit, self.at)
        self.state = np.zeros(program_cpp.state_size(B, H), np.uint32)
        self.parts = np.full(program_cpp.parts_size(B, H, Dh, grid), np.nan, np.float32)
        self.kernel = compile_for_cpu(nvrtc.KERNELS / "program.cu", "program", self.fit.macros)

    def launch(self, seed=0, **how):
        p, lines = self.program, self.writer.lines
        given = [Table(lines), 0, len(lines), len(p.ids), self.at(p.lengths), self.at(p.pages), p.pages.shape[1], self.state, self.parts]
        self.kernel(self.fit.grid, program_cpp.THREADS, self.fit.shared, *given, cooperative=True, seed=seed, **how)


def pool_of(cfg, count, dtype, seed=1, device="cpu"):
    """Pages full of numbers."""
    rng = np.random.default_rng(seed)
    shape = (cfg.num_hidden_layers, count, PAGE, cfg.num_attention_heads, cfg.head_dim)
    keys, values = (torch.from_numpy(rng.normal(size=shape)).to(device, HALVES[dtype]) for _ in range(2))
    return SimpleNamespace(keys=keys, values=values, most=-(-cfg.max_position_embeddings // PAGE))


def put(program, ids, lengths, pages):
    for target, source in ((program.ids, ids), (program.lengths, lengths), (program.pages, pages)):
        target.copy_(torch.tensor(source))


def compared(cfg, params, dtype, B=3, steps=2, seed=0, **how):
    """Checks that the lines and model.py compute the same, token by token, from the same pages."""
    lengths, pages = [5, PAGE - 1, 2 * PAGE + 3][:B], np.array([[0, 1, 2], [5, 4, 6], [8, 3, 7]])[:B]
    ours = Emulated(params, cfg, pool_of(cfg, 9, dtype), B, **how)
    exact = Program(wide(params), cfg, widened(pool_of(cfg, 9, dtype)), B, 3)
    theirs = Program(params, cfg, pool_of(cfg, 9, dtype), B, 3)
    for program in (ours.program, exact, theirs):
        put(program, [7, 8, 9][:B], lengths, pages)
    for step in range(steps):
        ours.launch(seed + step)
        for program in (exact, theirs):
            program.compute()
        for name in ("logits", "keys", "values"):
            found, plain, right = (getattr(program, name).double() for program in (ours.program, theirs, exact))
            size = right.abs().max()
            assert (found - right).abs().max() <= 3 * (plain - right).abs().max() + 1e-4 * size, (name, step)  # the largest of few
        for program in (ours.program, exact, theirs):  # all go on from the same tokens
            put(program, (exact.logits.argmax(-1)).tolist(), [n + step + 1 for n in lengths], pages)
    return True


def wide(tree):
    """Leaves in float64; int8 ones stay integers."""
    if isinstance(tree, dict):
        return {name: leaf if "scale" in tree and name in ("weight", "scale") else wide(leaf) for name, leaf in tree.items()}
    return [wide(item) for item in tree] if isinstance(tree, list) else tree.double()


def widened(pool):
    pool.keys, pool.values = pool.keys.double(), pool.values.double()
    return pool


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    cfg = OPTConfig(**SHAPE, **VARIANTS[name])
    params = parameters(cfg)
    assert takes(params, cfg, torch.float16, 3)
    assert compared(cfg, params, "float16")


@needs_compiler
@pytest.mark.parametrize("name", ["pre-norm", "opt-350m"])
@pytest.mark.parametrize("seed", [3, 4])
def test_norms_in_lines_of_their_own(name, seed):
    """Where shared memory does not hold all rows."""
    cfg = OPTConfig(**SHAPE, **VARIANTS[name])
    assert compared(cfg, parameters(cfg), "float16", seed=seed, roomy=False)


@needs_compiler
def test_bfloat16_and_another_number_of_blocks():
    cfg = OPTConfig(**SHAPE)
    assert compared(cfg, parameters(cfg, "bfloat16"), "bfloat16", B=2, grid=5)


@needs_compiler
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", ["pre-norm", "opt-350m"])
def test_int8(name, uneven):
    """Also where single columns are larger, as those of OPT from 6.7b on."""
    cfg = OPTConfig(**SHAPE, **VARIANTS[name])
    params = parameters(cfg, kind="int8", uneven=uneven)
    assert ("columns" in params["layers"][0]["fc1"]) == ("columns" in params["layers"][1]["self_attn"]["k_proj"]) == uneven
    assert takes(params, cfg, torch.float16, 3)
    assert compared(cfg, params, "float16", steps=1)


@needs_compiler
def test_uneven_columns_of_large_activations_stay_within_float16():
    cfg = OPTConfig(**SHAPE)
    params = parameters(cfg, kind="int8", uneven=True)
    assert params["layers"][0]["fc2"]["columns"][5] == 32
    params["layers"][0]["fc1"]["bias"][5] = 3000  # times 32 there is no such float16
    params["layers"][0]["fc2"]["scale"] *= 1e-3
    assert compared(cfg, params, "float16", steps=1)


@needs_compiler
def test_uneven_columns_want_room():
    cfg = OPTConfig(**SHAPE)
    with pytest.raises(program_cpp.TooLittle, match="rows of 128 numbers do not fit into shared memory"):
        Emulated(parameters(cfg, kind="int8", uneven=True), cfg, pool_of(cfg, 9, "float16"), 3, roomy=False)
    params = parameters(cfg, kind="int8", uneven=True)
    params["layers"][1]["fc1"]["columns"] *= 2.0**10
    assert not takes(params, cfg, torch.float16, 3)


def test_what_the_kernel_does_not_take():
    cfg = OPTConfig(**SHAPE)
    params = parameters(cfg)
    assert takes(params, cfg, torch.float16, 64)
    assert not takes(params, cfg, torch.float16, 65)
    assert not takes(params, cfg, torch.bfloat16, 1)  # other weights than it would read
    assert not takes(params, cfg, torch.float32, 1)
    for change in ({"hidden_size": 96, "num_attention_heads": 2}, {"ffn_dim": 100}, {"word_embed_proj_dim": 40}):
        other = OPTConfig(**{**SHAPE, **change})
        assert not takes(parameters(other), other, torch.float16, 1)
    assert not takes(parameters(cfg, kind="int4"), cfg, torch.float16, 1)

    def turned(a):
        return torch.stack([a, a], -1)[..., 0]

    def beside(a):
        return torch.cat([a, a])[1:][: len(a)]

    some = params["layers"][1]
    for p, name in ((some["fc1"], "weight"), (some["fc1"], "bias"), (some["final_layer_norm"], "weight"), (params["final_layer_norm"], "bias")):
        for other in (turned(p[name]), p[name].float(), *([beside(p[name])] if p[name].ndim == 1 else [])):
            before, p[name] = p[name], other
            assert not takes(params, cfg, torch.float16, 1)
            p[name] = before
    assert takes(params, cfg, torch.float16, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.large)])
@pytest.mark.parametrize("B", [1, 3, pytest.param(20, marks=pytest.mark.large)])
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_gpu_finds_what_torch_finds(name, kind, B, dtype):
    """Through a captured graph that is replayed, greedy, over the end of a page; with torch's operations for the lines, and in float64."""
    cfg = OPTConfig(**SHAPE, **VARIANTS[name])
    params, rng = parameters(cfg, dtype, kind, "cuda"), np.random.default_rng(2)
    lengths, pages = rng.integers(PAGE - 3, PAGE, B).tolist(), rng.permutation(3 * B).reshape(B, 3)
    programs = {}
    for which, tree in (("ours", params), ("torch", params), ("exact", wide(params))):
        pool = pool_of(cfg, 3 * B, dtype, device="cuda")
        programs[which] = Program(tree, cfg, widened(pool) if which == "exact" else pool, B, 3)
        put(programs[which], [7] * B, lengths, pages)
    assert programs["ours"].kernel
    programs["torch"].kernel = None
    for step in range(6):
        found, plain, right = (programs[which].start(B).logits.double() for which in ("ours", "torch", "exact"))
        rounding = torch.finfo(HALVES[dtype]).eps / 2
        assert (found - right).abs().max() <= 3 * (plain - right).abs().max() + rounding * right.abs().max(), step
        for program in programs.values():  # all go on from the same tokens
            program.ids.copy_(programs["exact"].ids)
