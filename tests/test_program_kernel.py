"""kernels/program.cu without a GPU: operations and models run on the CPU, blocks concurrently (cuda_emulator.py); it compiles for each GPU."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import small
import torch
from cuda_emulator import Table, compile_for_cpu, why_not

from opt_fast import nvrtc
from opt_fast import program_cpp as cpp
from opt_fast.attention_cuda import plain
from opt_np import model, ops
from opt_np.config import OPTConfig

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() != "", reason=nvrtc.missing())
HALVES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90")
DEPTHS = {(64, 0): 3, (64, 1): 2, (80, 1): 4, (128, 0): 1}  # few compilations, in which all differ
LIMIT = 227 * 1024  # bytes of shared memory of a block on an H200


class Machine:
    """B rows with a paged cache, and a GPU of `grid` multiprocessors for them."""

    def __init__(self, B, Dh=64, bf16=0, grid=3, H=2, lengths=None, most=2, widest=2048):
        depth = DEPTHS[Dh, bf16]
        room = max(cpp.bytes_needed(B, Dh, depth, B * cpp.pitch(widest)), cpp.bytes_needed(B, Dh, depth, cpp.pitch(widest)))
        self.fit = cpp.Fit(B, Dh, bf16, grid, depth, room)
        self.B, self.H, self.half, self.rng = B, H, HALVES[bf16], np.random.default_rng([B, Dh, bf16])
        self.lengths = np.array([0] * B if lengths is None else lengths, np.int32)
        self.pages = (self.rng.permutation(B * most + 1)[: B * most].reshape(B, most)).astype(np.int32)  # one page is nobody's
        self.count = B * most + 1
        self.state = np.zeros(cpp.state_size(B, H), np.uint32)
        self.parts = np.full(cpp.parts_size(B, H, Dh, grid), np.nan, np.float32)
        self.kernel = compile_for_cpu(nvrtc.KERNELS / "program.cu", "program", self.fit.macros)

    def run(self, lines, begin=0, end=None, **how):
        """Runs lines, with arrays in place of addresses, in one launch."""
        rows = [*map(len, lines)]
        assert set(rows) == {cpp.WORDS}, rows
        end = len(lines) if end is None else end
        given = [Table(lines), begin, end, self.B, self.lengths, self.pages, self.pages.shape[1], self.state, self.parts]
        self.kernel(self.fit.grid, cpp.THREADS, self.fit.shared, *given, cooperative=end - begin > 1, **how)

    def halves(self, *shape, size=1.0):
        """A random array that the kernel must not write to."""
        return only_read((self.rng.normal(size=shape) * size).astype(self.half))

    def bytes(self, *shape):
        return only_read(self.rng.integers(-128, 128, shape).astype(np.int8))

    def factors(self, n):
        return only_read(self.rng.uniform(0.5, 2, n).astype(np.float32) / 100)

    def poison(self, *shape):
        """An array of NaN that the kernel has to fill."""
        return np.full(shape, np.nan, self.half)

    def of_rounded(self, h, W):
        """What the rounding of a product's rows makes of the `size` that `rounded` is given."""
        return 1e6 * float(ml_dtypes.finfo(self.half).eps) / 2 * np.sqrt((h * h) @ (W * W).T)

    def rounded(self, found, exact, size):
        """Whether numbers are right but for their last rounding; `size` is that of the sums' parts."""
        found = found.astype(np.float64)
        assert np.isfinite(found).all()
        allowed = float(ml_dtypes.finfo(self.half).eps) / 2 * np.abs(exact) + 4e-6 * size + 1e-6
        assert (np.abs(found - exact) <= allowed).all(), np.abs(found - exact).max()
        return True


def only_read(a):
    a.flags.writeable = False
    return a


def wide(a):
    return a.astype(np.float64)


def normal(x, weight=None, bias=None):
    """LayerNorm in float64."""
    x = wide(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + ops.LAYER_NORM_EPS)
    return x * (1 if weight is None else wide(weight)) + (0 if bias is None else wide(bias))


# ---- one operation -----------------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("what", ["both", "tokens", "positions", "int8"])
@pytest.mark.parametrize(("B", "W", "grid"), [(1, 8, 1), (3, 72, 3), (16, 40, 5)])
def test_embed(B, W, grid, what):
    lengths = [(5 * b) % 7 - 1 for b in range(1, B + 1)]  # some rows are not in use
    m = Machine(B, grid=grid, lengths=lengths)
    table, positions, factors = m.halves(11, W), m.halves(10, W), m.factors(11)
    ids, y = m.rng.integers(0, 11, B), m.poison(B, W)
    ids[m.lengths < 0] = 10**12  # nobody looks
    if what == "int8":
        table = m.bytes(11, W)
    given = {"table": table, "ids": ids} if what != "positions" else {}
    columns = only_read(np.exp2(m.rng.integers(-2, 3, W)).astype(np.float32))
    given |= {"scale": factors, "columns": columns} if what == "int8" else {}
    m.run([cpp.embed(y, W, positions=None if what == "tokens" else positions, **given)], seed=B)
    safe = np.where(m.lengths < 0, 0, ids)
    expected = wide(table)[safe] * (wide(factors)[safe, None] * columns if what == "int8" else 1) if given else 0.0
    expected = expected + (wide(positions)[np.maximum(m.lengths, 0) + 2] if what != "tokens" else 0)
    assert m.rounded(y, np.where(m.lengths[:, None] < 0, 0, expected), 1)


@needs_compiler
@pytest.mark.parametrize("bf16", HALVES)
@pytest.mark.parametrize(("B", "D", "grid"), [(1, 8, 3), (2, 72, 1), (3, 768, 5), (5, 1032, 3)])
def test_norm(B, D, grid, bf16):
    m = Machine(B, bf16=bf16, grid=grid)
    x, weight, bias, y, plain_y = m.halves(B, D), m.halves(D), m.halves(D), m.poison(B, D), m.poison(B, D)
    m.run([cpp.norm(y, D, x, weight, bias), cpp.norm(plain_y, D, x)], seed=D)
    assert m.rounded(y, normal(x, weight, bias), 10)
    assert m.rounded(plain_y, normal(x), 10)


@needs_compiler
def test_norm_of_what_lies_far_from_zero():
    """Rows with a mean so large that the mean of squares less the squared mean would lose the variance."""
    m = Machine(2)
    x = only_read((20000 + 16 * m.rng.integers(-2, 3, (2, 64))).astype(np.float16))
    y, h, z = m.poison(2, 64), m.poison(2, 64), m.poison(2, 8)
    m.run([cpp.norm(y, 64, x), cpp.linear(z, 8, x, 64, m.halves(8, 64), norm=(None, None), normed=h)])
    assert m.rounded(y, normal(x), 10)
    assert m.rounded(h, normal(x), 10)


FUNCTIONS = {None: lambda x: x, **{name: (lambda x, name=name: ops.activation(x, name)) for name in cpp.ACTIVATIONS[1:]}}
SHAPES = [(1, 40, 8, 1), (1, 768, 50, 3), (3, 72, 24, 5), (16, 1032, 50, 3), (17, 72, 50, 3), (40, 136, 24, 5), (16, 40, 24, 1), (1, 4104, 8, 3)]


def product(m, I, O, kind, source, seed, **how):
    """A LINEAR line with all that it may have, and what it is in float64."""
    B, rng = m.B, np.random.default_rng(seed)
    x, weight, factors = m.halves(B, I), m.bytes(O, I) if kind == "int8" else m.halves(O, I), m.factors(O)
    bias, residual = (m.halves(O) if rng.random() < 0.7 else None for _ in range(2))
    residual = None if residual is None else m.halves(B, O)
    function, given = list(FUNCTIONS)[seed % 4], {"scale": factors} if kind == "int8" else {}
    y = np.full((B, O), np.nan, np.float32) if kind == "float32" else m.poison(B, O)
    if residual is not None and kind == "plain":
        y = residual = residual.copy()  # y += …
    if kind == "float32":
        given["float32"] = True
    h, normed = wide(x), m.poison(B, I)
    if source == "norm":
        norm = m.halves(I), m.halves(I)
        given |= {"norm": norm, "normed": normed}
        h = normal(x, *norm)
    given["staged"] = source == "staged"
    if kind == "int8" and source != "where it is":
        given["columns"] = columns = only_read(np.exp2(rng.integers(-3, 4, I)).astype(np.float32))
        h = h * columns
    W = wide(weight) * (wide(factors)[:, None] if kind == "int8" else 1)
    exact = h @ W.T + (0 if bias is None else wide(bias))
    size = np.abs(h) @ np.abs(W.T) + (m.of_rounded(h, W) if source == "norm" else 0)
    exact = FUNCTIONS[function](exact) + (0 if residual is None else wide(residual))
    m.run([cpp.linear(y, O, x, I, weight, bias, residual=residual, activation=function, first=seed % m.fit.grid, **given)], seed=seed, **how)
    assert source != "norm" or m.rounded(normed, normal(x, *norm), 10)
    return y, exact, size


@needs_compiler
@pytest.mark.parametrize("source", ["where it is", "staged", "norm"])
@pytest.mark.parametrize("kind", ["plain", "float32", "int8"])
@pytest.mark.parametrize(("B", "I", "O", "grid"), SHAPES)
def test_linear(B, I, O, grid, kind, source):
    I = -(-I // 16) * 16 if kind == "int8" else I
    for seed in range(2 if B < 17 else 1):
        m = Machine(B, bf16=int(B > 32) if B > 16 else (B // 3 + seed) % 2, grid=grid)
        assert m.rounded(*product(m, I, O, kind, source, seed + B + I, early=bool(seed)))


@needs_compiler
def test_bytes_of_every_value_are_exact():
    for bf16 in HALVES:
        m = Machine(1, bf16=bf16)
        x, weight, y = m.halves(1, 16), np.zeros((256, 16), np.int8), np.zeros((1, 256), np.float32)
        weight[np.arange(256), np.arange(256) % 16] = np.arange(-128, 128)
        m.run([cpp.linear(y, 256, x, 16, weight, scale=np.ones(256, np.float32), float32=True)])
        assert (y[0] == np.arange(-128, 128) * np.resize(x[0].astype(np.float32), 256)).all()


@needs_compiler
@pytest.mark.parametrize("grid", [1, 3, 5])
def test_lines_share_blocks_and_rows_and_write_into_pages(grid):
    """q, k and v as in a layer, and outputs that start at a middle block: each block continues by itself where it need not wait."""
    lengths, D, O = [70, -1, 0, 63, 64], 72, 48
    m = Machine(5, grid=grid, lengths=lengths)
    x, norm, h = m.halves(5, D), (m.halves(D), None), m.poison(5, D)
    weights, biases = [m.halves(O, D) for _ in range(3)], [m.halves(O) for _ in range(3)]
    rows = normal(x, *norm)
    expected = [rows @ wide(W).T + wide(b) for W, b in zip(weights, biases, strict=True)]
    size = m.of_rounded(rows, wide(weights[0])).max()
    for seed in range(4):
        q, pools, h = m.poison(5, O), [m.poison(m.count, 64, O) for _ in range(2)], m.poison(5, D)
        given = {"norm": norm, "wait": False}
        lines = [cpp.linear(q, O, x, D, weights[0], biases[0], **given, normed=h)]
        lines += [cpp.linear(pool, O, x, D, W, b, paged=True, kept=True, first=6 * (i + 1) % grid, **given)
                  for i, (pool, W, b) in enumerate(zip(pools, weights[1:], biases[1:], strict=True))]  # fmt: skip
        m.run(lines, seed=seed, early=seed % 2 == 1)
        assert m.rounded(q, expected[0], size)
        assert m.rounded(h, rows, 10)
        for pool, exact in zip(pools, expected[1:], strict=True):
            for b, n in enumerate(lengths):
                assert n < 0 or m.rounded(pool[m.pages[b, n // 64], n % 64], exact[b], size)
            assert np.isfinite(pool).any(-1).sum() == 4  # and nowhere else
        before = [a.copy() for a in (q, *pools)]
        for i in range(3):  # a launch each: nothing is kept, and they do it again
            m.run(lines, i, i + 1, seed=seed)
        assert all(a.tobytes() == b.tobytes() for a, b in zip((q, *pools), before, strict=True))


def cached(m, H, Dh, lengths, size=1.0):
    """Keys and values (S, H, Dh) of each row, and pools that hold them, NaN elsewhere."""
    rows, pools = [], [m.poison(m.count, 64, H, Dh) for _ in range(2)]
    for b, n in enumerate(lengths):
        rows.append([m.halves(n + 1, H, Dh, size=size) for _ in range(2)])
        for pool, a in zip(pools, rows[-1], strict=True):
            for j in range(n + 1):
                pool[m.pages[b, j // 64], j % 64] = a[j]
    return rows, [only_read(pool) for pool in pools]


def attention_within_the_rule(m, O, q, rows, lengths, Dh):
    """FlashAttention's: at most twice the error of the plain formula in the low precision."""
    dtype = torch.float16 if m.half == np.float16 else torch.bfloat16
    for b, n in enumerate(lengths):
        if n < 0:
            assert (O[b] == 0).all()
            continue
        given = [torch.tensor(wide(a)[None]) for a in (q[b][None], *rows[b])]
        exact, _ = plain(*given, Dh**-0.5)
        scores = torch.einsum("bthd,bshd->bhts", given[0], given[1]).to(dtype).double() * Dh**-0.5
        low = torch.einsum("bhts,bshd->bthd", scores.to(dtype).double().softmax(-1).to(dtype).double(), given[2]).to(dtype).double()
        allowed = 2 * (low - exact).abs().max() + 2 * ((exact + 0.3).to(dtype).double() - 0.3 - exact).abs().max()
        assert np.isfinite(O[b]).all()
        assert np.abs(wide(O[b]) - exact.numpy()[0, 0]).max() <= allowed
    return True


@needs_compiler
@pytest.mark.parametrize(("Dh", "bf16"), [(64, 0), (64, 1), (80, 1), (128, 0)])
@pytest.mark.parametrize(("lengths", "H", "grid"), [
    ([0], 2, 1), ([63, -1, 64, 100], 1, 3), ([700], 1, 5), ([383, 5], 1, 5), ([640], 2, 5), ([130, 15, 16], 2, 5),
])  # fmt: skip
def test_attend(Dh, bf16, lengths, H, grid):
    m = Machine(len(lengths), Dh, bf16, grid, H, lengths, most=max(lengths) // 64 + 1)
    rows, (K, V) = cached(m, H, Dh, lengths)
    q, found = m.halves(len(lengths), H, Dh), []
    for seed in range(3):  # the counts are 0 again each time
        O = m.poison(len(lengths), H, Dh)
        m.run([cpp.attend(O, H, q, K, V, Dh**-0.5)], seed=seed, early=seed == 1)
        assert attention_within_the_rule(m, O, q, rows, lengths, Dh)
        found.append(O.tobytes())
        assert not m.state.any()
    assert len(set(found)) == 1  # in any order of blocks


@needs_compiler
def test_attend_huge_scores():
    m = Machine(1, bf16=1, grid=5, H=1, lengths=[400], most=7)  # beyond float16
    rows, (K, V) = cached(m, 1, 64, [400], size=60)
    q, O = m.halves(1, 1, 64, size=60), m.poison(1, 1, 64)
    m.run([cpp.attend(O, 1, q, K, V, 0.125)])
    assert attention_within_the_rule(m, O, q, rows, [400], 64)


# ---- whole models ------------------------------------------------------------------------------------------------------------------------


class Decoder:
    """A model's token as a table: as opt-350m, post-norm and with projections, or as the others."""

    def __init__(self, m, cfg, params, fused):
        self.m, self.cfg, self.lines, D = m, cfg, [], cfg.hidden_size
        self.ids, self.first, self.fused, self.params = np.zeros(m.B, np.int64), 0, fused, params
        self.x, self.s, self.h, self.q, self.O = (m.poison(m.B, D) for _ in range(5))
        self.ff, self.e = m.poison(m.B, cfg.ffn_dim), m.poison(m.B, cfg.word_embed_proj_dim)
        self.logits = np.full((m.B, cfg.vocab_size), np.nan, np.float32)
        self.pools = [[m.poison(m.count, 64, m.H, cfg.head_dim) for _ in range(2)] for _ in params["layers"]]
        self.begin(params)
        stream = {"x": self.x}
        for layer, pools in zip(params["layers"], self.pools, strict=True):
            stream = self.layer(layer, *pools, stream)
        self.end(params, stream)

    def begin(self, p):
        tokens, positions = {"table": p["embed_tokens"]["weight"], "ids": self.ids}, p["embed_positions"]["weight"]
        if "project_in" not in p:
            self.lines.append(cpp.embed(self.x, self.x.shape[1], **tokens, positions=positions))
            return
        self.lines += [cpp.embed(self.e, self.e.shape[1], **tokens), cpp.embed(self.s, self.s.shape[1], positions=positions)]
        self.linear(self.x, p["project_in"], {"x": self.e}, residual=self.s)

    def layer(self, p, K, V, stream):
        cfg, pre, attn = self.cfg, self.cfg.do_layer_norm_before, p["self_attn"]
        h = self.norm(self.x, p["self_attn_layer_norm"], self.h) if pre else stream
        self.linear(self.q, attn["q_proj"], h)
        again = {**h, "normed": None, "wait": False, "kept": self.fused, "paged": True}
        self.linear(K, attn["k_proj"], again)
        self.linear(V, attn["v_proj"], again)
        self.lines.append(cpp.attend(self.O, cfg.num_attention_heads, self.q, K, V, cfg.head_dim**-0.5))
        target = self.x if pre else self.s
        self.linear(target, attn["out_proj"], {"x": self.O}, residual=self.x)
        h = self.norm(self.x, p["final_layer_norm"], self.h) if pre else self.norm(self.s, p["self_attn_layer_norm"], self.x, True)
        self.linear(self.ff, p["fc1"], h, activation=cfg.activation_function)
        self.linear(target, p["fc2"], {"x": self.ff}, residual=self.x)
        return stream if pre else self.norm(self.s, p["final_layer_norm"], self.x, True)

    def end(self, p, stream):
        if self.cfg.has_final_layer_norm:
            stream = self.norm(self.x, p["final_layer_norm"], self.h)
        if "project_out" in p:
            self.linear(self.e, p["project_out"], stream)
            stream = {"x": self.e}
        self.linear(self.logits, p["embed_tokens"], stream, float32=True)

    def norm(self, x, p, target, needed=False):
        if self.fused:
            return {"x": x, "norm": (p["weight"], p["bias"]), "normed": target if needed else None}
        self.lines.append(cpp.norm(target, x.shape[1], x, p["weight"], p["bias"]))
        return {"x": target}

    def linear(self, y, p, source, **options):
        O, I = p["weight"].shape
        options = {"staged": self.fused, **source, **options}
        x = options.pop("x")
        self.first = self.first if not options.get("wait", True) else 0
        self.lines.append(cpp.linear(y, O, x, I, p["weight"], p.get("bias"), first=self.first % self.m.fit.grid, **options))
        self.first += -(-O // 8)


KINDS = {"pre-norm": {}, "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 40, "activation_function": "gelu"}}


def decoder(kind, m, fused):
    cfg = OPTConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, ffn_dim=264, max_position_embeddings=200, **KINDS[kind]
    )
    params = each(small.params(cfg), lambda a: only_read((a / (2 if a.ndim > 1 else 1)).astype(m.half)))
    return Decoder(m, cfg, params, fused)


def each(tree, change):
    """All leaves of a tree of parameters, changed."""
    if isinstance(tree, dict):
        return {name: each(branch, change) for name, branch in tree.items()}
    return [each(branch, change) for branch in tree] if isinstance(tree, list) else change(tree)


@needs_compiler
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_one_kernel(kind, fused):
    """Texts that grow, in one launch a token: model.forward's logits, and the bits of a launch for each line."""
    m = Machine(3, grid=3, lengths=[62, -1, 0], most=2)
    d = decoder(kind, m, fused)
    texts = [m.rng.integers(4, 50, n) for n in (66, 4, 4)]
    exact = [model.forward(each(d.params, wide), text[None], d.cfg)[0] for text in texts]
    size = max(np.abs(a).max() for a in exact)
    for layer, pools in enumerate(d.pools):
        for pool, name in zip(pools, ("k_proj", "v_proj"), strict=True):
            fill(pool, m, d, texts[0][:62], layer, name)
    for token in range(4):
        m.lengths[:] = [62 + token, -1, token]
        d.ids[:] = [texts[0][62 + token], 10**12, texts[2][token]]
        before = [a.copy() for pools in d.pools for a in pools]
        m.run(d.lines, seed=token, early=token == 1)
        for b, text in ((0, 0), (2, 2)):
            assert np.abs(d.logits[b] - exact[text][m.lengths[b]]).max() <= 0.003 * size
        assert np.isfinite(d.logits).all()
        after = [a.copy() for pools in d.pools for a in pools]
        for a, b in zip(before, after, strict=True):  # a token's key and value in each layer, and nothing else
            changed = (a.view(np.uint16) != b.view(np.uint16)).any((-1, -2))
            assert changed.sum() == 2
            assert all(changed[m.pages[row, m.lengths[row] // 64], m.lengths[row] % 64] for row in (0, 2))
        if token == 2:
            logits = d.logits.tobytes()
            for i in range(len(d.lines)):
                m.run(d.lines, i, i + 1, seed=i)
            assert d.logits.tobytes() == logits
            assert all(a.tobytes() == b.tobytes() for a, b in zip(after, (a for pools in d.pools for a in pools), strict=True))


def fill(pool, m, d, text, layer, name):
    """Row 0's keys, or values, of a text, as the reference has them."""
    kept = {}

    def tap(path, x):
        if path == f"model.decoder.layers.{layer}.self_attn.{name}":
            kept["x"] = x
        return x

    model.forward(each(d.params, wide), text[None], d.cfg, tap=tap)
    for j, row in enumerate(kept["x"][0]):
        pool[m.pages[0, j // 64], j % 64] = row.reshape(pool.shape[2:]).astype(m.half)


# ---- what surrounds it -------------------------------------------------------------------------------------------------------------------


def test_lines_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(ValueError, match="rows of 12 numbers; the kernel takes multiples of 8"):
        cpp.linear(1, 8, 1, 12, 1)
    with pytest.raises(ValueError, match="rows of 24 numbers; the kernel takes multiples of 16"):
        cpp.linear(1, 8, 1, 24, 1, scale=1)
    with pytest.raises(ValueError, match="activation is 'silu'"):
        cpp.linear(1, 8, 1, 16, 1, activation="silu")
    with pytest.raises(ValueError, match="there is no norm"):
        cpp.linear(1, 8, 1, 16, 1, normed=5)
    with pytest.raises(ValueError, match="65 rows and heads of 64"):
        cpp.fit(65, 64, 0, 132, LIMIT, (1024,))
    with pytest.raises(ValueError, match=r"heads of 128 need .* this GPU gives 101376"):
        cpp.fit(1, 128, 0, 84, 99 * 1024, (4096,))


@needs_compiler
def test_the_launch_hands_over_what_the_kernel_takes():
    m = Machine(3, most=2)
    named = {
        "lines": torch.zeros(4, cpp.WORDS),
        "lengths": torch.zeros(3),
        "pages": torch.zeros(3, 2),
        "state": torch.zeros(7),
        "parts": torch.zeros(9),
    }
    given = cpp.arguments(m.fit, *named.values(), 1, 4)
    at = {name: a.data_ptr() for name, a in named.items()}
    assert given == [at["lines"], 1, 4, 3, at["lengths"], at["pages"], 2, at["state"], at["parts"]]
    types = ["int64*" if i == 0 else "int32" if isinstance(x, np.int32) else "*" for i, x in enumerate(given)]
    assert [known if known in ("int64*", "int32") else known[-1] for known in m.kernel.types] == types


@needs_nvrtc
def test_a_cooperative_launch_is_asked_for(monkeypatch):
    import cuda.core

    asked = []
    known = dir(cuda.core.LaunchConfig)
    monkeypatch.setattr(cuda.core, "LaunchConfig", lambda **options: options)
    monkeypatch.setattr(cuda.core, "launch", lambda *given: asked.append(given))
    monkeypatch.setattr(nvrtc, "stream_of", lambda device, handle: handle)
    monkeypatch.setattr(nvrtc, "bound", SimpleNamespace(devices={0}))
    for cooperative in (False, True):
        nvrtc.launch("kernel", 0, 5, (3,), 256, 1000, 7, cooperative=cooperative)
        more = {"is_cooperative": True} if cooperative else {}
        assert asked[-1] == (5, {"grid": (3,), "block": 256, "shmem_size": 1000, **more}, "kernel", 7)
    assert asked[-1][1].keys() <= set(known)


@pytest.mark.parametrize("limit", [163 * 1024, LIMIT])
@pytest.mark.parametrize(("Dh", "width"), [(64, 768), (64, 1024), (80, 2560), (128, 4096), (128, 9216)])
@pytest.mark.parametrize("B", [1, 8, 16, 17, 64])
def test_what_fits(B, Dh, width, limit):
    fit = cpp.fit(B, Dh, 0, 132, limit, (width, 4 * width))
    assert cpp.bytes_needed(B, Dh, fit.depth, cpp.pitch(4 * width)) <= fit.shared <= limit
    assert B > 1 or limit < LIMIT or (fit.holds(4 * width) and fit.depth >= 4)
    assert not fit.holds(10**6)


@needs_nvrtc
@pytest.mark.parametrize(("Dh", "bf16", "B", "depth", "arch"), [
    *((128, 0, 64, 4, arch) for arch in TARGETS), (64, 0, 1, 8, "sm_90"), (128, 1, 1, 5, "sm_90"), (80, 1, 32, 5, "sm_80"),
])  # fmt: skip
def test_the_kernel_compiles_without_spills(Dh, bf16, B, depth, arch):
    _, report = nvrtc.compile("program.cu", arch, **cpp.Fit(B, Dh, bf16, 1, depth, 0).macros)
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "warning" not in report
