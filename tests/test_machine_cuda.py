"""Decoding over pages with backend="cuda": the tokens equal NumPy's. On torch's CPU tensors there are no graphs, but the Python code is the same."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch

from opt_fast import machine_cuda, nvrtc, ops_cuda
from opt_fast.engine import Engine, Params, Reader
from opt_fast.paged_cache import PAGE
from opt_fast.program_cuda import Program
from opt_np import OPTForCausalLM
from opt_np import generate as decoding
from opt_np.config import parameter_shapes
from opt_np.reader import Reading
from opt_np.tree import map_leaves, unflatten

CFG = small.config(max_position_embeddings=5 * PAGE - 10)
POST_NORM = small.config(max_position_embeddings=2 * PAGE, do_layer_norm_before=False, word_embed_proj_dim=8)
NO_EOS = {"eos_token_id": []}
WAYS = ({}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2, "top_k": 5}, {"repetition_penalty": 1.3}, {"num_beams": 2},
        {"penalty_alpha": 0.5, "top_k": 3})  # fmt: skip


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request, monkeypatch):
    """Where the backend puts parameters."""
    monkeypatch.setattr(ops_cuda, "device", lambda: torch.device(request.param))
    if request.param == "cpu":
        monkeypatch.setattr(nvrtc, "missing", lambda: "")


def talkative(cfg):
    """Parameters with which the model does not repeat one token."""
    rng = np.random.default_rng(0)
    return unflatten(
        {name: rng.normal(0, 0.02 if name.endswith("bias") else 0.7, shape).astype(np.float32) for name, shape in parameter_shapes(cfg).items()}
    )


def both(cfg=CFG, params=None):
    params = talkative(cfg) if params is None else params
    return OPTForCausalLM(params, cfg, backend="cuda"), OPTForCausalLM(params, cfg, backend="numpy")


def prompt(length, seed=0, cfg=CFG):
    return np.random.default_rng([seed, length]).integers(4, cfg.vocab_size, (1, length))


def counted(monkeypatch, name):
    """How often a program does something."""
    calls, method = [], getattr(Program, name)
    monkeypatch.setattr(Program, name, lambda *arguments: (calls.append(1), method(*arguments))[1])
    return calls


# ---- many requests -----------------------------------------------------------------------------------------------------------------------


def requests(n, cfg):
    rng, common = np.random.default_rng(0), prompt(PAGE + 20)
    for i in range(n):
        ids = prompt(int(rng.choice([1, 5, 30, PAGE])), seed=i)
        ids = np.concatenate([common[:, : int(rng.integers(PAGE + 20))], ids], axis=1) if i % 3 == 0 else ids
        new = min(int(rng.integers(1, 20) if i % 4 else 70), cfg.max_position_embeddings - ids.shape[1])
        yield ids, {"max_new_tokens": new, "seed": i, "eos_token_id": list(range(4, 30)) if i % 4 == 1 else [], **WAYS[i % len(WAYS)]}


def test_many_requests_find_the_tokens_that_numpy_finds_and_leave_no_page_behind():
    ours, numpys = both()
    e = Engine(ours, pages=14, max_batch=5, chunk=2 * PAGE)
    assert str(e.pool.keys.dtype) == "torch.float32"
    asked = [(e.submit(ids, **options), ids, options) for ids, options in requests(30, CFG)]
    for handle, _, _ in asked[::6]:
        e.step()
        e.cancel(handle)
    while e.step():
        e.pool.check(row for handle in (*e.running, *e.waiting) for row in handle.reader.rows)
    e.pool.check()
    assert e.pool.available == len(e.pool.counts)
    assert sum(handle.cancelled for handle, _, _ in asked) >= 4
    for handle, ids, options in asked:
        if not handle.cancelled:
            np.testing.assert_array_equal(e.result(handle), numpys.generate(ids, **options))
            if "num_beams" not in options:
                for a, b in zip(handle, numpys.stream(ids, **options), strict=True):
                    np.testing.assert_allclose([a.logprobs, a.entropies], [b.logprobs, b.entropies], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("cfg", [CFG, POST_NORM], ids=["pre-norm", "post-norm"])
def test_generate_finds_what_numpy_finds(cfg, options):
    """Prompts of different lengths, and past the end of a page."""
    ours, numpys = both(cfg)
    ids, mask = np.concatenate([prompt(PAGE - 3, seed, cfg) for seed in range(3)]), np.arange(PAGE - 3) >= [[0], [7], [50]]
    found, expected = (lm.generate(ids, mask, max_new_tokens=9, seed=3, **options, **NO_EOS) for lm in (ours, numpys))
    np.testing.assert_array_equal(found, expected)


def test_the_last_block_goes_on_with_the_tokens_asked_for_alone(monkeypatch):
    seen, before = [], ops_cuda.mlp
    ours, _ = both()
    monkeypatch.setattr(ops_cuda, "mlp", lambda h, *rest: seen.append(len(h)) or before(h, *rest))
    ours.generate(np.concatenate([prompt(30), prompt(30, seed=1)]), max_new_tokens=1)
    assert seen == [60] * (CFG.num_hidden_layers - 1) + [2]
    seen.clear()
    ours.generate(prompt(31), max_new_tokens=1, penalty_alpha=0.5, top_k=2)
    assert seen[: CFG.num_hidden_layers] == [31] * CFG.num_hidden_layers


def test_past_the_context_all_is_read_again():
    ours, numpys = both(POST_NORM)
    ids = prompt(2 * PAGE - 4, cfg=POST_NORM)
    options = {"max_new_tokens": 9, "overflow": "slide", **NO_EOS}
    np.testing.assert_array_equal(ours.generate(ids, **options), numpys.generate(ids, **options))


def test_what_stood_in_a_page_before_is_never_seen():
    ours, numpys = both()
    machine = ops_cuda.machine(ours.params, CFG, 3)
    machine.pool.keys.fill_(torch.nan)
    machine.pool.values.fill_(torch.nan)
    reader, ids = Reader(machine, 0), prompt(PAGE + 3)
    for end in (PAGE - 2, PAGE - 1, PAGE, PAGE + 1):
        logits = np.asarray(reader(Reading(ids[:, :end], np.ones((1, end), np.int64)))[1])
        np.testing.assert_allclose(logits, numpys(ids[:, :end]).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    ours, numpys = both(params=small.cast(talkative(CFG), dtype))[0], both()[1]
    assert str(ops_cuda.machine(ours.params, CFG, 1).pool.keys.dtype) == f"torch.{dtype}"
    ids = prompt(9)
    steps = list(ours.stream(ids, max_new_tokens=4, **NO_EOS))
    text = np.concatenate([ids, [[int(step.ids[0]) for step in steps]]], axis=1)
    expected = numpys(text[:, :-1]).logits[0, 8:]
    close = 0.02 if dtype == "float16" else 0.15
    assert np.abs(np.concatenate([np.asarray(step.logits) for step in steps]) - expected).max() < close * np.abs(expected).max()


# ---- ahead of Python ---------------------------------------------------------------------------------------------------------------------


def test_greedy_search_only_says_where_it_begins_and_which_page_is_next(monkeypatch):
    """All other tokens are computed before Python needs them."""
    ours, numpys = both()
    put, start, ids = counted(monkeypatch, "put"), counted(monkeypatch, "start"), prompt(5)
    found = ours.generate(ids, max_new_tokens=2 * PAGE, **NO_EOS)
    assert len(set(found[0].tolist())) > 10
    np.testing.assert_array_equal(found, numpys.generate(ids, max_new_tokens=2 * PAGE, **NO_EOS))
    assert len(put) == 1 + 2  # the first token, and the first of each new page, which nobody had reserved before
    assert len(start) <= 2 * PAGE  # one more than were asked for, at most


def test_who_draws_tokens_by_lot_is_not_answered_ahead(monkeypatch):
    start, options = counted(monkeypatch, "start"), {"do_sample": True, "temperature": 5.0, "max_new_tokens": 30, "seed": 1, **NO_EOS}
    ours, numpys = both()
    np.testing.assert_array_equal(ours.generate(prompt(5), **options), numpys.generate(prompt(5), **options))
    assert len(start) <= 30 + 3


def test_what_was_begun_is_dropped_when_something_else_is_asked_for():
    """Rows that continue with other tokens, fork, come in another order, or are read from their beginning again."""
    ours, numpys = both()
    machine = ops_cuda.machine(ours.params, CFG, 20)
    reader, text = Reader(machine, 0), np.concatenate([prompt(6), prompt(6, seed=1)])

    def read(ids):
        logits = np.asarray(reader(Reading(ids, np.ones_like(ids)))[1])
        np.testing.assert_allclose(logits, numpys(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
        return np.concatenate([ids, logits.argmax(-1)[:, None]], axis=1)

    text = read(read(read(text)))
    assert machine.programs[2, 1].next.scores  # the next is under way
    text[0, -1] = (text[0, -1] + 1) % CFG.vocab_size
    text = read(read(text))
    reader.reorder(np.array([1, 0]))
    text = read(text[::-1])
    reader.reorder(np.array([1, 1]))
    text[0] = text[1]
    text = read(read(text))
    reader.release()
    text = read(text)
    other = Reader(machine, 0)
    ids = prompt(1, seed=9)
    other(Reading(ids, np.ones_like(ids)))
    text = read(read(text))
    held = [row.fork() for row in reader.rows]  # what is under way has been written to pages that are no longer the rows' own
    before = [row.pages for row in held]
    text = read(read(read(text)))
    assert [row.pages for row in reader.rows] != before


# ---- what stays with a model -------------------------------------------------------------------------------------------------------------


def test_a_program_serves_again_until_parameters_or_config_are_others_or_pages_lie_elsewhere():
    ours, numpys = both()
    ids = prompt(5)
    ours.generate(ids, max_new_tokens=3, **NO_EOS)
    (machine,) = ours.params.idle
    programs = dict(machine.programs)
    assert programs
    ours.generate(ids, max_new_tokens=4, **NO_EOS)
    assert ours.params.idle == [machine]
    assert machine.programs == programs
    assert machine.pool.available == len(machine.pool.counts)
    ours.generate(ids, max_new_tokens=3 * PAGE, **NO_EOS)  # more pages than there were
    assert all(p.keys is machine.pool.keys for p in machine.programs.values() if p not in programs.values())
    ours.params["layers"][0]["fc1"]["weight"] = ours.params["layers"][0]["fc1"]["weight"] * 2
    numpys.params["layers"][0]["fc1"]["weight"] = numpys.params["layers"][0]["fc1"]["weight"] * 2
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=5, **NO_EOS), numpys.generate(ids, max_new_tokens=5, **NO_EOS))
    assert machine not in ours.params.idle
    (machine,) = ours.params.idle
    ours.config = numpys.config = replace(ours.config, num_attention_heads=ours.config.num_attention_heads // 2)
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=5, **NO_EOS), numpys.generate(ids, max_new_tokens=5, **NO_EOS))
    assert machine not in ours.params.idle


def test_many_pages_do_not_stay(monkeypatch):
    ours, _ = both()
    monkeypatch.setattr(machine_cuda, "KEPT", 100)
    ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    assert ours.params.idle == []


def test_a_model_that_nobody_has_any_more_is_gone_with_its_machine():
    ours, _ = both()
    ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    seen, machine = [], ours.params.idle[0]
    weakref.finalize(machine, seen.append, 1)
    gc.disable()
    try:
        del machine, ours
        assert seen == [1]
    finally:
        gc.enable()


def test_two_threads_do_not_share_a_machine():
    ours, numpys = both()
    found = {}

    def work(i):
        found[i] = ours.generate(prompt(5 + i), max_new_tokens=40, **NO_EOS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    for i in range(4):
        np.testing.assert_array_equal(found[i], numpys.generate(prompt(5 + i), max_new_tokens=40, **NO_EOS))
    assert len(ours.params.idle) == 1


def test_training_changes_what_is_said_next():
    """Parameters change in place, and no key computed before is seen."""
    ours, numpys = both()
    ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    with torch.no_grad():
        map_leaves(lambda leaf: leaf.mul_(1.1), ours.params)
    map_leaves(lambda leaf: np.multiply(leaf, np.float32(1.1), out=leaf), numpys.params)
    np.testing.assert_array_equal(ours.generate(prompt(5), max_new_tokens=5, **NO_EOS), numpys.generate(prompt(5), max_new_tokens=5, **NO_EOS))


# ---- whatever else a caller does ---------------------------------------------------------------------------------------------------------


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "autocast": lambda: torch.autocast(ops_cuda.device().type, torch.bfloat16)}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_of_the_caller_change_nothing(mode):
    """Not even where a stream of tokens that was started inside one continues outside."""
    ours, numpys = both()
    expected = numpys.generate(prompt(5), max_new_tokens=9, **NO_EOS)
    with mode():
        np.testing.assert_array_equal(ours.generate(prompt(5), max_new_tokens=9, **NO_EOS), expected)
        steps = ours.stream(prompt(5), max_new_tokens=9, **NO_EOS)
        found = [next(steps).ids for _ in range(3)]
    found += [step.ids for step in steps]
    np.testing.assert_array_equal(np.stack(found, 1), expected[:, 5:])
    np.testing.assert_array_equal(ours.generate(prompt(5), max_new_tokens=9, **NO_EOS), expected)


def test_a_model_is_copied_without_its_machines():
    ours, numpys = both()
    ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    assert ours.params.idle
    for params in (copy.deepcopy(ours.params), pickle.loads(pickle.dumps(ours.params))):
        assert type(params) is Params
        assert params.idle == []
        found = decoding.generate(params, prompt(5), CFG, ops=ops_cuda, max_new_tokens=4, **NO_EOS)
        np.testing.assert_array_equal(found, numpys.generate(prompt(5), max_new_tokens=4, **NO_EOS))


def test_layers_that_come_and_go_are_read_plainly(tmp_path):
    numpys = both()[1]
    numpys.save_pretrained(tmp_path)
    ours = OPTForCausalLM.from_pretrained(tmp_path, backend="cuda", stream_layers=True)
    np.testing.assert_array_equal(ours.generate(prompt(5), max_new_tokens=4, **NO_EOS), numpys.generate(prompt(5), max_new_tokens=4, **NO_EOS))
    with pytest.raises(ValueError, match="have no pages on a GPU: load the model without stream_layers"):
        Engine(ours)


def test_a_machine_whose_pass_was_broken_off_serves_nobody_else(monkeypatch):
    ours, numpys = both()
    ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    (machine,) = ours.params.idle
    with monkeypatch.context() as patch:
        patch.setattr(Program, "start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ours.generate(prompt(5), max_new_tokens=3, **NO_EOS)
    gc.collect()
    assert ours.params.idle == []
    np.testing.assert_array_equal(ours.generate(prompt(5), max_new_tokens=5, **NO_EOS), numpys.generate(prompt(5), max_new_tokens=5, **NO_EOS))
    assert ours.params.idle != [machine]


def test_a_capture_that_is_broken_off_leaves_no_graph(monkeypatch):
    """With a torch.cuda of empty stand-ins."""
    ours, _ = both()
    program = Program(ours.params, CFG, ops_cuda.machine(ours.params, CFG, 2).pool, 1, 2)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    for name in ("CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, object)
    calls, compute = [], Program.compute

    def broken(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        compute(self)

    monkeypatch.setattr(Program, "compute", broken)
    before = program.lengths.clone()
    with pytest.raises(KeyboardInterrupt):
        program.capture()
    assert program.graph is None
    assert program.lengths.equal(before)  # the first time counted nothing
    program.capture()
    assert program.graph is not None


def test_pages_that_have_moved_are_not_kept():
    ours, _ = both()
    machine = ops_cuda.machine(ours.params, CFG, 1)
    reader, ids = Reader(machine, 0), prompt(2 * PAGE)
    for end in range(PAGE - 3, PAGE + 3):
        reader(Reading(ids[:, :end], np.ones((1, end), np.int64)))
    assert [program.keys is machine.pool.keys for program in machine.programs.values()] == [True]


# ---- errors -----------------------------------------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_told():
    ours, _ = both(params=map_leaves(lambda a: a * np.float32(np.nan), talkative(CFG)))
    with pytest.raises(ValueError, match="row 0 has no token to choose"):
        ours.generate(prompt(3), max_new_tokens=4, **NO_EOS)


def test_keys_have_the_models_dtype_and_pages_an_end():
    ours, numpys = both()
    with pytest.raises(ValueError, match="dtype='float16': on a GPU keys and values have the model's dtype, float32"):
        Engine(ours, dtype="float16")
    assert Engine(ours, dtype="float32").pool.keys.dtype == torch.float32
    with pytest.raises(ValueError, match=r"backends 'cpu' and 'cuda', and this model's is opt_np\.ops"):
        Engine(numpys)


def test_a_gpu_that_is_too_small_is_told(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate")

    ours, _ = both()
    monkeypatch.setattr("opt_fast.paged_cache.enlarged", full)
    with pytest.raises(MemoryError, match="7 pages of 64 tokens do not fit on the GPU; ask for fewer"):
        Engine(SimpleNamespace(ops=ops_cuda, config=CFG, params=ours.params), pages=7)
