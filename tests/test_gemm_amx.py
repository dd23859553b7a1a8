"""Products and attention with Intel's AMX tiles: on processors that have them, and everywhere by an emulation that follows the manual."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from opt_fast import gemm, gemm_amx, gemm_parts

ROOT = Path(__file__).resolve().parents[1]

EMULATED = """
import importlib.util, sys
import opt_fast
spec = importlib.util.spec_from_file_location("opt_fast.gemm_amx", folder + "/gemm_amx.py")
sys.modules["opt_fast.gemm_amx"] = opt_fast.gemm_amx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(opt_fast.gemm_amx)
"""

PROGRAM = """
import pickle, sys
sys.path.insert(0, root + "/tests")
import ml_dtypes, numba, numpy as np, rounded_attention, small
from types import SimpleNamespace
from opt_fast import attention_bf16, attention_cpu, attention_parts, gemm, gemm_amx, gemm_amx_int4, gemm_int, gemm_parts
from opt_fast import machine_cpu, ops_cpu, program_cpu
from opt_fast.engine import Engine
from opt_fast.gemm_amx import GROUP, PackedTiles
from opt_fast.gemm_amx_int4 import PackedNibbles
from opt_np import OPTForCausalLM, model, ops, quantize
from opt_np.kv_cache import KVCache
assert gemm_amx.UNIT == unit, gemm_amx.UNIT
assert "tiles of bfloat16 and int8 (AMX)" in ops_cpu.description()
bfloat16, rng, found = ml_dtypes.bfloat16, np.random.default_rng(0), {}
gemm_amx.X_BYTES, gemm_amx.DEPTH = 60 << 10, gemm.BLOCK_K  # small blocks of rows, and of k: the emulation is slow

many, wide = 2 * GROUP + 37, 16 * gemm_amx.CHUNK + 5
cases = ((1, 1, 1, False), (8, 50, 21, True), (3, 17, 70, False), (20, 400, 33, False), (many, 70, wide, True), (many, 800, 21, False))
for M, I, O, turned in cases:
    x, weight, bias = rng.normal(size=(M, I)).astype(np.float32), rng.normal(size=(O, I)).astype(bfloat16), rng.normal(size=O).astype(np.float32)
    x[0] *= 1000
    given = np.asfortranarray(x) if turned else x
    leaf = quantize.quantize_matrix(weight.astype(np.float32), "int8")
    uneven = dict(leaf, columns=np.exp(rng.normal(size=I)).astype(np.float32))
    for name, parts in (("bfloat16", {"weight": np.asfortranarray(weight) if turned else weight}), ("int8", leaf), ("uneven", uneven)):
        packed = pickle.loads(pickle.dumps(PackedTiles(**parts)))
        assert (packed.shape, packed.size, packed.panels.nbytes % 1024) == ((O, I), O * I, 0)
        assert packed.dtype == (bfloat16 if name == "bfloat16" else np.float32) and packed.kind == ("" if name == "bfloat16" else "int8")
        whole = np.asarray(packed)
        ids = np.array([[0, O - 1, O // 2]])
        assert packed.rows(ids).dtype == np.float32 and (packed.rows(ids) == whole[ids].astype(np.float32)).all()
        y = gemm.matmul(given, packed, bias, "relu" if M == 20 else None)
        if name == "bfloat16":
            assert whole.dtype == bfloat16 and (whole == weight).all()
            rounded, wide = x.astype(bfloat16).astype(float), weight.astype(float)
            expected = rounded @ wide.T + bias
            allowed = (np.abs(rounded) @ np.abs(wide).T + np.abs(bias)) * np.finfo(np.float32).eps * 40
            assert (np.abs(y - (np.maximum(expected, 0) if M == 20 else expected)) <= allowed).all()
        else:  # the same bits as by any other instructions
            plain = gemm_int.PackedIntegers(**parts)
            assert (whole == np.asarray(plain)).all()
            assert (y == gemm.matmul(np.ascontiguousarray(x), plain, bias, "relu" if M == 20 else None)).all(), np.abs(y).max()
        for rows in ([0], [M - 1], list(range(M // 2, M)), [M - 1, 0, M // 2]):
            assert (gemm.matmul(given[rows], packed, bias, "relu" if M == 20 else None) == y[rows]).all()
        numba.set_num_threads(1)
        assert (gemm.matmul(given, packed, bias, "relu" if M == 20 else None) == y).all()
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        found[f"{M} {I} {O} {name}"] = y

# int4: the same bits as with one row, which is by other instructions; the last group and panel may be short, and a group is half a tile or whole
gemm_amx_int4.ENOUGH = 32
for M, I, O, size in ((16, 20, 5, 32), (37, 420, 130, 64), (many, 70, 200, 32), (20, 800, 66, 32), (7, 836, 400, 64), (8, 448, 330, 32)):
    x, bias = rng.normal(size=(M, I)).astype(np.float32), rng.normal(size=O).astype(np.float32)
    x[0] *= 1000
    leaf = quantize.quantize_matrix(rng.normal(size=(O, I)).astype(np.float32), "int4", size)
    if M == 20:
        leaf["columns"] = np.exp(rng.normal(size=I)).astype(np.float32)
    plain, packed = gemm_int.PackedIntegers(**leaf), pickle.loads(pickle.dumps(PackedNibbles(**leaf)))
    kernel, _, tasks = packed.call(*gemm.flat(x), bias, None, 0, M)
    assert packed.group == size and kernel is not plain.call(*gemm.flat(x), bias, None, 0, M)[0]
    y = gemm.matmul(x, packed, bias, "relu" if M == 37 else None)
    assert (y == gemm.matmul(x, plain, bias, "relu" if M == 37 else None)).all()
    for rows in ([0], [M - 1], list(range(1, M))):
        assert (gemm.matmul(x[rows], packed, bias, "relu" if M == 37 else None) == y[rows]).all()
    numba.set_num_threads(1)
    assert (gemm.matmul(x, packed, bias, "relu" if M == 37 else None) == y).all()
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    x[3, I // 2] = np.nan
    y[3] = np.nan if M != 37 else gemm.matmul(x, plain, bias, "relu")[3]
    np.testing.assert_array_equal(gemm.matmul(x, packed, bias, "relu" if M == 37 else None), y)
    found[f"{M} {I} {O} int4"] = y

# float32, and weights in float16: as right as products in float32, in tiles of three parts and of two; with few rows, with many, and where blocks,
# rows, strips and tiles are not whole
gemm_parts.MOST_ROWS, gemm_parts.ENOUGH, gemm_parts.FEW_ROWS = 96, 64, 72
for M, I, O, turned in ((1, 1, 1, False), (1, 100, 50, True), (5, 64, 33, False), (16, 400, 20, True), (17, 33, 32, False), (45, 100, 70, True),
                        (70, 420, 66, True), (100, 420, 66, True), (250, 40, 70, False), (3, 0, 5, False)):
    x, weights, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((M, I), (O, I), O))
    x[0] *= 1000
    given, function = np.asfortranarray(x) if turned else x, "relu" if M in (70, 100) else None
    for weight in (weights, weights.astype(np.float16)):
        packed = pickle.loads(pickle.dumps(gemm_parts.pack(np.asfortranarray(weight) if turned else weight)))
        assert (packed.shape, packed.dtype, packed.nbytes) == ((O, I), weight.dtype, -(-O // 16) * 16 * I * weight.itemsize)
        ids = np.array([[0, O - 1, O // 2]])
        assert (np.asarray(packed) == weight).all() and packed.rows(ids).dtype == np.float32 and (packed.rows(ids) == weight[ids]).all()
        y = gemm.matmul(given, packed, bias, function)
        expected = x.astype(float) @ weight.T.astype(float) + bias
        allowed = (np.abs(x).astype(float) @ np.abs(weight).T.astype(float) + np.abs(bias)) * np.finfo(np.float32).eps * 4
        assert (np.abs(y - (np.maximum(expected, 0) if function else expected)) <= allowed).all(), (M, I, O)
        for rows in ([0], [M - 1], list(range(M // 2, M)), [M - 1, 0, M // 2]):
            assert (gemm.matmul(given[rows], packed, bias, function) == y[rows]).all()
        assert (gemm.matmul(given, gemm_parts.pack(weight[:1]), bias[:1], function) == y[:, :1]).all()  # nor do other columns matter
        numba.set_num_threads(1)
        assert (gemm.matmul(given, packed, bias, function) == y).all()
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        found[f"{M} {I} {O} {weight.dtype}"] = y
weight = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 32)
weight = weight[np.isfinite(weight).all(1)]  # every float16 there is: in two parts to the last bit
assert (gemm.matmul(np.eye(32, dtype=np.float32), gemm_parts.pack(weight)) == weight.T).all()
for size in (1e-30, 1e-36, 1e-38, 3e38):  # parts that are no normal numbers, and the largest there are
    x, weight = (rng.random((20, 40)) * size).astype(np.float32), rng.random((33, 40)).astype(np.float32) / 40
    expected = x.astype(float) @ weight.T.astype(float)
    np.testing.assert_allclose(gemm.matmul(x, gemm_parts.pack(weight)), expected, rtol=1e-6, atol=1e-36)
    np.testing.assert_allclose(gemm.matmul(weight[:20], gemm_parts.pack(x)), weight[:20].astype(float) @ x.T, rtol=1e-6, atol=1e-36)
x = np.ones((40, 70), np.float32)
x[1, 65], x[33, 2] = np.nan, np.inf
for rows in (slice(0, 3), slice(0, 40)):
    y = gemm.matmul(x[rows], gemm_parts.pack(np.ones((5, 70), np.float32)))
    assert np.isnan(y[1]).all() and (len(y) == 3 or np.isnan(y[33]).all()) and (np.delete(y, [1, 33][: 1 + (len(y) > 3)], 0) == 70).all()

# subnormal numbers are 0 to a row that is alone, as they are to tiles
for size in (1e-19, 1e-38):
    x, weight, bias = (size * rng.normal(size=shape).astype(np.float32) for shape in ((3, 70), (40, 70), 40))
    for packed in (PackedTiles(weight.astype(bfloat16)), gemm_parts.pack(weight), gemm_parts.pack(rng.normal(size=(40, 70)).astype(np.float16))):
        y = gemm.matmul(x, packed, bias)
        assert all((gemm.matmul(x[i : i + 1], packed, bias) == y[i]).all() for i in range(3)), (size, packed)

# what is not a number stays in its row
for broken in (np.inf, -np.inf, np.nan):
    x = np.ones((3, 70), np.float32)
    x[1, 65] = broken
    y = gemm.matmul(x, PackedTiles(np.ones((5, 70), bfloat16)))
    np.testing.assert_array_equal(y, np.float32([[70] * 5, [broken] * 5, [70] * 5]))
    y = gemm.matmul(x, PackedTiles(np.ones((5, 70), np.int8), np.ones(5, np.float32)))
    assert np.isnan(y[1]).all() and np.allclose(y[[0, 2]], 70, rtol=1e-4)
assert gemm.matmul(np.ones((0, 70), np.float32), PackedTiles(np.ones((5, 70), bfloat16))).shape == (0, 5)

found |= rounded_attention.checked(real=unit == "AMX")
found |= rounded_attention.checked(unit == "AMX", attention_parts.IN_PARTS, "attention by parts")
assert (attention_parts.IN_FLOAT32, attention_parts.IN_FLOAT32_BWD) == (attention_parts.IN_PARTS, attention_parts.IN_PARTS_BWD)

# its gradients: no further from the exact ones than NumPy's in float32
for T, S, Dh, hides in ((1, 1, 16, False), (37, 37, 20, False), (130, 300, 48, True), (100, 100, 80, False)):
    q, k, v, dO = (rng.normal(size=(1, n, 2, Dh)).astype(np.float32) for n in (T, S, S, T))
    layout, scale = SimpleNamespace(visible=rng.random((1, S)) < 0.6 if hides else None), Dh**-0.5
    O, L = ops_cpu.attention_lse(q, k, v, scale, layout)
    wide = [a.astype(float) for a in (q, k, v)]
    exact = ops.attention_bwd(dO.astype(float), *wide, *ops.attention_lse(*wide, scale, layout), scale, layout)
    numpys = ops.attention_bwd(dO, q, k, v, *ops.attention_lse(q, k, v, scale, layout), scale, layout)
    if hides:  # what is hidden may be anything
        k, v = (np.where(layout.visible[..., None, None], a, np.nan) for a in (k, v))
    ours = ops_cpu.attention_bwd(dO, q, k, v, O, L, scale, layout)
    for name, a, b, c in zip("qkv", ours, numpys, exact, strict=True):
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max() + 1e-6, (T, S, Dh, name)
        found[f"gradient {T} {S} {Dh} {name}"] = a

# a model: the same bits in a batch, step by step, and in the engine
cfg = small.config(num_hidden_layers=1, max_position_embeddings=300)
params, ids = small.params(cfg), small.ids(cfg, 2, 23)
mask = np.ones_like(ids)
mask[0, :7] = 0
kinds = {"bfloat16": PackedTiles, "int8": PackedTiles, "int4": PackedNibbles, "float32": gemm_parts.PackedParts, "float16": gemm_parts.PackedParts}
for dtype, kind in kinds.items():
    tree = small.cast(params, dtype) if "float" in dtype else quantize.quantized(params, cfg, dtype)[0]
    packed = ops_cpu.pack(tree)
    assert type(packed["layers"][0]["fc1"]["weight"]) is kind is type(packed["embed_tokens"]["weight"])
    logits = model.forward(packed, ids, cfg, attention_mask=mask, ops=ops_cpu)
    exact = model.forward(small.cast(tree, np.float32) if "float" in dtype else tree, ids, cfg, attention_mask=mask)
    assert np.abs(logits - exact)[mask == 1].max() < (2e-2 if dtype == "bfloat16" else 1e-3) * np.abs(exact).max()
    for row, seen, ours in zip(ids, mask, logits):
        assert (model.forward(packed, row[seen == 1][None], cfg, ops=ops_cpu)[0] == ours[seen == 1]).all()
    hidden = [model.last_hidden_state(packed, ids, cfg, attention_mask=mask, ops=ops_cpu, padding=padding)[mask == 1] for padding in (False, True)]
    assert (hidden[0] == hidden[1]).all()
    cache = KVCache()
    parts = [model.forward(packed, ids[:, a:b], cfg, cache=cache, attention_mask=mask[:, :b], ops=ops_cpu) for a, b in ((0, 17), (17, 22), (22, 23))]
    assert cache.program is not None
    assert (np.concatenate(parts, axis=1)[mask == 1] == logits[mask == 1]).all()
    assert (model.forward(tree, ids, cfg, attention_mask=mask, ops=ops_cpu)[mask == 1] == logits[mask == 1]).all()  # packed at each use
    lm, long = OPTForCausalLM(tree, cfg, backend="cpu"), small.ids(cfg, 1, 140)
    engine = Engine(lm)
    stored, way = (np.float32, attention_parts.IN_PARTS) if dtype in ("float32", "float16") else (np.uint16, attention_bf16.IN_BFLOAT16)
    assert engine.pool.dtype == stored and machine_cpu.Machine(packed, cfg, engine.pool).way is way
    handles = [engine.submit(long, max_new_tokens=4), engine.submit(ids[1:, :9], max_new_tokens=3)]
    assert (engine.result(handles[0]) == lm.generate(long, max_new_tokens=4)).all()
    assert (engine.result(handles[1]) == lm.generate(ids[1:, :9], max_new_tokens=3)).all()
    found[dtype] = logits
    lm.generate(long[:, :40], max_new_tokens=2)
    machine = lm.params.idle[0]
    assert not any(small.writes_without_a_task(p) for p in (*machine.programs.values(), *machine.reading.values()))
    if dtype in ("int4", "float32", "float16"):
        continue
    # as a list of kernels, where products read what is rounded already and add to the stream: more than one block of k, and parts of one
    wide = {"hidden_size": 400, "num_attention_heads": 10, "ffn_dim": 810}
    for changes in (wide, {"hidden_size": 40, "do_layer_norm_before": False, "activation_function": "gelu"}):
        other = small.config(**{"num_hidden_layers": 2, "max_position_embeddings": 300, **changes})
        tree = small.params(other)
        tree = small.cast(tree, bfloat16) if dtype == "bfloat16" else quantize.quantized(tree, other, "int8")[0]
        lm, packed = OPTForCausalLM(tree, other, backend="cpu"), ops_cpu.pack(tree)
        assert program_cpu.in_tiles(packed["layers"]) == (bfloat16 if dtype == "bfloat16" else np.int8)
        steps = list(lm.stream(long, max_new_tokens=2))
        for n, step in enumerate(steps):
            text = np.concatenate([long, *(step.ids[:, None] for step in steps[:n])], axis=1)
            assert (step.logits[0] == model.forward(packed, text, other, ops=ops_cpu)[0, -1]).all(), (dtype, changes, n)
        (machine,) = lm.params.idle
        assert machine.programs and not any(small.writes_without_a_task(p) for p in (*machine.programs.values(), *machine.reading.values()))
np.savez(folder + "/" + (unit or "none") + ".npz", **found)
"""


def run(unit, folder):
    """The program above in a process of its own, with this unit; the numbers that it computed."""
    variables = f"root, folder, unit = {str(ROOT)!r}, {str(folder)!r}, {unit!r}\n"
    emulated, environment = EMULATED if unit == gemm.EMULATED else "", {**os.environ, "PYTHONPATH": str(ROOT)}
    if emulated:
        environment["NUMBA_CACHE_DIR"] = str(folder / "cache")
        source = (ROOT / "opt_fast" / "gemm_amx.py").read_text(encoding="utf-8")
        assert source.count("UNIT = unit()") == 1
        (folder / "gemm_amx.py").write_text(source.replace("UNIT = unit()", f"UNIT = {unit!r}"), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", variables + emulated + PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(folder / f"{unit}.npz") as found:
        return dict(found)


def test_products_and_attention_in_tiles(tmp_path):
    """Right for every shape, and the same bits however the work is cut; where the processor has tiles, they give the bits of the manual."""
    emulated = run(gemm.EMULATED, tmp_path)
    if gemm_amx.UNIT:
        real = run("AMX", tmp_path)
        assert real.keys() == emulated.keys()
        for name, numbers in real.items():
            np.testing.assert_array_equal(numbers, emulated[name], err_msg=name)


TILED = "+avx512f,+avx512bw,+avx512vnni,+avx512bf16,+amx-tile,+amx-bf16,+amx-int8"


@pytest.mark.parametrize(("features", "tile", "system", "allowed", "found"), [
    (TILED, "pairs", "linux", True, "AMX"),
    (TILED, "pairs", "linux", False, ""),
    (TILED, "pairs", "darwin", True, ""),
    (TILED, "plain", "linux", True, ""),
    (TILED.replace("+amx-int8", "-amx-int8"), "pairs", "linux", True, ""),
], ids=["there", "refused by the system", "another system", "compiled for less", "no int8"])  # fmt: skip
def test_tiles_are_used_where_the_processor_has_them_and_the_system_allows_it(features, tile, system, allowed, found, monkeypatch):
    codegen = SimpleNamespace(magic_tuple=lambda: ("x86_64-unknown-linux-gnu", "sapphirerapids", features))
    asked = []
    monkeypatch.setattr(gemm_amx, "cpu_target", SimpleNamespace(target_context=SimpleNamespace(codegen=lambda: codegen)))
    monkeypatch.setattr(gemm_amx, "TILE", gemm.TILE._replace(pairs=gemm.DPBF16 if tile == "pairs" else ""))
    monkeypatch.setattr(gemm_amx.sys, "platform", system)
    monkeypatch.setattr(gemm_amx.ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *numbers: asked.append(numbers) or (0 if allowed else -1)))
    assert gemm_amx.unit() == found
    assert asked in ([], [(158, 0x1023, 18)])


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("M", [17, 47, 96, 255, 256, 300, 1024, 5000])
def test_parts_are_work_for_every_thread(threads, M, monkeypatch):
    monkeypatch.setattr(gemm_parts, "get_num_threads", lambda: threads)
    rows, blocks, parts = gemm_parts.shares(M, 192)
    assert (blocks - 1) * rows < M <= blocks * rows
    assert rows % gemm_parts.DEEP == 0
    assert rows <= gemm_parts.MOST_ROWS
    assert blocks * parts >= min(threads, 96)
    busy = [0] * threads
    for task in range(blocks * parts):
        height, part = min(rows, M - task % blocks * rows), task // blocks
        busy[busy.index(min(busy))] += height * (96 * (part + 1) // parts - 96 * part // parts)
    assert max(busy) <= 2 * M * 96 / threads + 2 * rows


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("M", [1, 47, 96, 192, 400, 1024, 2600, 5000])
def test_there_is_work_for_every_thread(threads, M, monkeypatch):
    monkeypatch.setattr(gemm_amx, "get_num_threads", lambda: threads)
    packed = gemm_amx.PackedTiles(np.zeros((3072, 768), np.int8), np.ones(3072, np.float32))
    _, arguments, tasks = packed.call(np.zeros(0, np.float32), 768, 1, np.zeros(3072, np.float32), None, 0, M)
    rows, blocks, parts = arguments[12:15]
    assert tasks == blocks * parts >= threads
    assert (blocks - 1) * rows < M <= blocks * rows
    assert rows % gemm_amx.GROUP == 0
    assert rows <= gemm_amx.rows_at_once(768)
    busy = [0] * threads
    for block in range(blocks):
        busy[busy.index(min(busy))] += min(rows, M - block * rows)
    assert parts > 1 or max(busy) <= 1.1 * M / threads + gemm_amx.GROUP
    if packed.writes_rounded(M):  # then a task has all of a row's strips, a block of k of the next product at a time
        _, arguments, tasks = packed.call(
            np.zeros(0, np.float32), 768, 1, np.zeros(3072, np.float32), None, gemm_amx.Rounded(M, 3072, packed.stored), M
        )
        assert tasks == arguments[13]
        assert arguments[14:16] == [1, gemm.BLOCK_K // gemm_amx.SIDE]
