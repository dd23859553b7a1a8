"""opt-np bench attention: its checks of precision, timing and output, with made-up lanes (columns), a made-up GPU, and one small run on the CPU.

No timing is tested.
"""

import json
import re
import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opt_fast  # noqa: E402
from opt_fast import bench_attention as bench  # noqa: E402
from opt_fast.bench_attention import Case, Clock, Lane  # noqa: E402
from opt_np import cli, ops  # noqa: E402

CASE = Case("flash", "float32", 3, 20, 2, 8)


def right(q, k, v, scale):
    return bench.plain(q, k, v, scale)


def lane(call=right, refusal="", ours=True) -> Lane:
    return Lane(call, lambda q: refusal, ours)


def fails(error: Exception, warning: str = ""):
    def call(*_, **__):
        if warning:
            warnings.warn(warning, UserWarning, stacklevel=2)
        raise error

    return call


# ---- shapes ------------------------------------------------------------------------------------------------------------------------------


def test_the_grids():
    every = bench.cases("cuda", **bench.DEFAULTS["cuda"])
    flash = [case for case in every if case.grid == "flash" and case.dtype == "bfloat16"]
    assert {(case.Dh, case.H) for case in flash} == {(64, 32), (80, 25), (128, 16)}
    assert [case.S for case in flash if case.Dh == 80] == [512, 1024, 2048, 4096, 8192, 16384]
    assert {case.B * case.S for case in flash} == {16384}
    opt = [(case.grid, case.B, case.S, case.H, case.Dh) for case in every if case.grid != "flash" and case.dtype == "float16"]
    assert opt == [("opt-125m", 1, 2048, 12, 64), ("opt-350m", 1, 2048, 16, 64), ("opt-1.3b", 1, 2048, 32, 64), ("opt-2.7b", 1, 2048, 32, 80),
                   ("opt-6.7b", 1, 2048, 32, 128)]  # fmt: skip
    assert len({case.title for case in every}) == len(every)


def test_flops_are_counted_as_others_count_them():
    """NVIDIA's table for cuDNN on an H200 says 0.140125 ms, and 490.4 TFLOP/s."""
    assert Case("flash", "bfloat16", 1, 2048, 64, 128).flops / 0.140125e-3 / 1e12 == pytest.approx(490.4, abs=0.1)


def test_a_head_dimension_chooses_among_the_models():
    assert [case.grid for case in bench.cases("cuda", ["float16"], [80], [512], ["opt"])] == ["opt-2.7b"]
    with pytest.raises(ValueError, match="no model of the opt grid has heads of 96; they have 64, 80, 128"):
        bench.cases("cuda", ["float16"], [96], [512], ["opt"])


def test_lanes_are_asked_for_with_dashes_and_keep_their_order():
    every = {name: lane() for name in ("numba v1", "mma", "torch cudnn")}
    assert list(bench.choose(every, None)) == list(every)
    assert list(bench.choose(every, ["torch-cudnn", "numba-v1"])) == ["numba v1", "torch cudnn"]
    with pytest.raises(ValueError, match="--lanes cudnn: there is no such lane here; there are numba-v1, mma, torch-cudnn"):
        bench.choose(every, ["cudnn", "mma"])


def test_inputs_are_drawn_anew_for_each_seed_and_shape():
    q, k, v = bench.inputs(CASE, "cpu", 1)
    assert q.shape == (3, 20, 2, 8)
    assert q.dtype == torch.float32
    assert not torch.equal(q, k)
    assert torch.equal(v, bench.inputs(CASE, "cpu", 1)[2])
    assert not torch.equal(v, bench.inputs(CASE, "cpu", 2)[2])


# ---- the rule ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 20, 64])
def test_the_reference_is_attention(block, monkeypatch):
    monkeypatch.setattr(bench, "BLOCK", block)
    q, k, v = (t.double() for t in bench.inputs(CASE, "cpu", 0))
    np.testing.assert_allclose(bench.plain(q, k, v, 0.3), ops.attention(q.numpy(), k.numpy(), v.numpy(), 0.3), rtol=1e-12, atol=1e-13)


def test_what_is_allowed_grows_with_the_rounding_of_the_dtype():
    q, k, v = bench.inputs(CASE, "cpu", 0)
    allowed = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected, plain_error, noise = bench.reference(*(t.to(dtype) for t in (q, k, v)), 0.3)
        assert expected.dtype == torch.float64
        assert 0 < noise <= 4 * torch.finfo(dtype).eps * float(expected.abs().max() + 0.3)
        assert 0 < plain_error < 10 * torch.finfo(dtype).eps
        allowed[dtype] = 2 * plain_error + noise
    assert 1000 * allowed[torch.float32] < allowed[torch.float16] < allowed[torch.bfloat16]


def test_twice_the_error_of_the_formula_and_the_rounding_of_the_result_are_allowed():
    _, plain_error, noise = bench.reference(*(t[[0, 2]] for t in bench.inputs(CASE, "cpu", 1)), CASE.scale)
    assert bench.check(CASE, {"mine": lane()}, "cpu", 0)["errors"] == {"mine": {"error": plain_error, "allowed": 2 * plain_error + noise}}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lanes_of_torch_are_within_the_rule(dtype):
    case = Case("flash", dtype, 2, 130, 3, 64)
    found = bench.check(case, {name: bench.torch_lane(name) for name in bench.ON_CPU}, "cpu", 0)
    assert list(found["errors"]) == ["flash", "math"]
    assert all(0 < told["error"] <= told["allowed"] for told in found["errors"].values())
    assert not found["left_out"]


def not_causal(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.mT * scale, -1) @ v).transpose(1, 2)


def off_at(*place, by=1e-5):
    def call(*args):
        O = right(*args)
        O[place] += by
        return O

    return call


FLAWS = {
    "without a scale": lambda q, k, v, scale: right(q, k, v, 1.0),
    "not causal": not_causal,
    "v of another head": lambda q, k, v, scale: right(q, k, v.flip(2), scale),
    "one number in the last of the batch": off_at(-1, 7, 1, 3),
    "one number in the first of the batch": off_at(0, 19, 0, 0),
    "NaN anywhere": off_at(1, 3, 0, 2, by=torch.nan),
    "infinite": lambda *args: right(*args) / 0,
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_lane_is_named_with_both_numbers_and_ends_the_run(flaw):
    message = r"float32, B 3, S 20, 2 heads of 8: mine is off by \S+, and \d\.\d\de-0[67] is allowed, .*; nothing was timed"
    with pytest.raises(ValueError, match=message):
        bench.check(CASE, {"theirs": lane(), "mine": lane(FLAWS[flaw])}, "cpu", 0)


def test_what_is_checked_is_the_whole_batch_that_will_be_timed():
    shapes = []
    bench.check(CASE, {"mine": lane(lambda q, k, v, scale: shapes.append(q.shape) or right(q, k, v, scale))}, "cpu", 0)
    assert shapes == [(3, 20, 2, 8)]


def test_memory_is_poisoned_before_each_call(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "poison", lambda q: seen.append("poison"))
    call = lambda *args: seen.append("call") or right(*args)  # noqa: E731
    bench.check(CASE, {"a": lane(call), "b": lane(call)}, "cpu", 0)
    assert seen == ["poison", "call"] * 2


def test_the_poison_is_as_large_as_the_results(monkeypatch):
    made = []
    full, full_like = torch.full, torch.full_like
    monkeypatch.setattr(torch, "full", lambda *args, **options: made.append(full(*args, **options)) or made[-1])
    monkeypatch.setattr(torch, "full_like", lambda *args: made.append(full_like(*args)) or made[-1])
    q = torch.zeros(3, 20, 2, 8, dtype=torch.float16)
    bench.poison(q)
    assert [(t.shape, t.dtype) for t in made] == [((3, 20, 2, 8), torch.float16), ((3, 20, 2), torch.float32)]  # O and L
    assert all(t.isnan().all() for t in made)


# ---- the backward pass -------------------------------------------------------------------------------------------------------------------

PASSES = [Case("flash", "float32", 3, 20, 2, 8, work) for work in (bench.BACKWARD_PASS, bench.BOTH)]


def test_the_backward_grid_has_each_shape_twice_and_counts_five_products_more():
    every = bench.cases("cuda", ["float16"], [80], [512], ["opt"], backward=True)
    assert [(case.title, case.work) for case in every] == [
        ("opt-2.7b: float16, B 1, S 2048, 32 heads of 80, backward", "backward"),
        ("opt-2.7b: float16, B 1, S 2048, 32 heads of 80, forward and backward", "forward and backward")]  # fmt: skip
    forward = bench.cases("cuda", ["float16"], [80], [512], ["opt"])[0].flops
    assert [case.flops / forward for case in every] == [2.5, 3.5]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_reference_gradients_are_those_of_attention(block, monkeypatch):
    monkeypatch.setattr(bench, "BLOCK", block)
    tensors = [t.double() for t in bench.inputs(PASSES[0], "cpu", 0)]
    q, k, v, dO = (t.numpy() for t in tensors)
    O, L = ops.attention_lse(q, k, v, 0.3)
    for found, expected in zip(bench.plain_bwd(*tensors, 0.3), ops.attention_bwd(dO, q, k, v, O, L, 0.3), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def pair(forward=None, backward=None, refusal="", log=None):
    """As those of bench.BACKWARD, in torch's formula."""
    from opt_fast import attention_cuda

    def told(what, call):
        return lambda *args: (log.append(what) if log is not None else None, call(*args))[1]

    return SimpleNamespace(refuses=lambda q: refusal, forward=told("forward", forward or attention_cuda.plain),
                           backward=told("backward", backward or attention_cuda.plain_bwd))  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("work", [bench.BACKWARD_PASS, bench.BOTH])
def test_gradients_of_torch_and_of_ours_are_within_the_rule(dtype, work):
    lanes = {name: bench.through_autograd(bench.torch_lane(name)) for name in bench.ON_CPU} | {"mine": bench.pair_lane(pair())}
    found = bench.check(Case("flash", dtype, 2, 70, 2, 64, work), lanes, "cpu", 0)
    assert list(found["errors"]) == ["flash", "math", "mine"]
    assert all(0 < told["error"] <= told["allowed"] and told["of"] in ("dq", "dk", "dv") for told in found["errors"].values())


def test_thrice_the_error_of_the_formula_and_the_rounding_of_the_result_are_allowed():
    exact = bench.expected(PASSES[0], [t[[0, 2]] for t in bench.inputs(PASSES[0], "cpu", 1)])
    assert list(exact) == ["dq", "dk", "dv"]
    lanes = {"mine": bench.through_autograd(lane())}
    told = bench.check(PASSES[0], lanes, "cpu", 0)["errors"]["mine"]
    _, plain_error, noise = exact[told["of"]]
    assert told["allowed"] == 3 * plain_error + noise


@pytest.mark.parametrize("case", PASSES)
@pytest.mark.parametrize(("i", "of"), [(0, "dq"), (1, "dk"), (2, "dv")])
@pytest.mark.parametrize(("row", "by"), [(0, 1e-4), (-1, 1e-4), (1, torch.nan)])
def test_one_wrong_number_of_a_gradient_is_named_and_ends_the_run(case, i, of, row, by):
    from opt_fast import attention_cuda

    def off(*args):
        grads = attention_cuda.plain_bwd(*args)
        grads[i][row, 7, 1, 3] += by
        return grads

    message = rf"{case.work}: {of} of mine is off by \S+, and \S+ is allowed, thrice the .*; nothing was timed"
    with pytest.raises(ValueError, match=message):
        bench.check(case, {"mine": bench.pair_lane(pair(backward=off))}, "cpu", 0)


def test_alone_the_backward_pass_is_repeated_without_the_forward_pass():
    log = []
    alone, both = (bench.pair_lane(pair(log=log)).ready(case, bench.inputs(case, "cpu", 0)) for case in PASSES)
    alone()
    alone()
    assert log == ["forward", "backward", "backward"]
    log.clear()
    both()
    both()
    assert log == ["forward", "backward"] * 2


def test_torch_repeats_its_backward_pass_over_one_forward_pass():
    log = []
    counted = bench.through_autograd(lane(lambda *args: log.append("forward") or right(*args)))
    alone, both = (counted.ready(case, bench.inputs(case, "cpu", 0)) for case in PASSES)
    first, second, third = alone(), alone(), both()
    assert log == ["forward"] * 2
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_a_pair_is_refused_as_its_rung_and_goes_through_both_kernels(monkeypatch):
    from opt_fast import attention_cpp, attention_cuda, attention_numba

    q, k, v, dO = bench.inputs(PASSES[0], "cpu", 0)
    assert list(bench.BACKWARD) == list(bench.our_lanes(backward=True)) == ["numba v3", "mma", "sm90"]
    assert bench.BACKWARD["mma"].refuses(q) == attention_cuda.RUNGS["mma"].refuses(q) != ""
    kernels = ("numba v3", attention_numba, "v3_bwd"), ("mma", attention_cuda, "mma_bwd"), ("sm90", attention_cpp, "sm90_bwd")
    for name, module, kernel in kernels:
        seen = []
        monkeypatch.setitem(attention_cuda.RUNGS, name, lambda *args: ("O", "L", *args)[:2])
        monkeypatch.setattr(module, kernel, lambda *args, seen=seen: seen.extend(args) or ("dq", "dk", "dv"))
        lane_ = bench.our_lanes(backward=True)[name]
        assert lane_.ours
        assert lane_.call(q, k, v, dO, 0.3) == ("dq", "dk", "dv")
        assert all(a is b for a, b in zip(seen, (dO, q, k, v, "O", "L", 0.3), strict=True))


def test_gradients_find_poison_too(monkeypatch):
    made = []
    monkeypatch.setattr(bench, "poison", lambda q, results=1: made.append(results))
    bench.check(PASSES[0], {"mine": bench.pair_lane(pair())}, "cpu", 0)
    assert made == [4]  # O, dq, dk, dv


def test_a_small_run_of_the_backward_pass_on_the_cpu(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    words = (
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--lengths",
        "32",
        "64",
        "--lanes",
        "torch-flash",
        "torch-math",
        "--plot",
        str(tmp_path / "speed.svg"),
    )
    assert cli.main(["bench", "attention", "--backward", *words]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [(case["S"], case["work"]) for case in result["cases"]] == [(S, work) for S in (32, 64) for work in ("backward", "forward and backward")]
    assert all(list(case["seconds"]) == ["torch flash", "torch math"] for case in result["cases"])
    assert "4 B H S S D / 2, 2.5 times that for the backward pass and 3.5 times for both" in out
    assert "heads of 64, forward and backward\n" in out
    drawn = (tmp_path / "speed.svg").read_text()
    assert all(f"<!-- TFLOP/s, causal {work} -->" in drawn for work in ("backward", "forward and backward"))


# ---- who takes part ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (lane(refusal="has no head dimension 8"), "has no head dimension 8"),
        (lane(fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB"))), "out of memory"),
        (lane(fails(ImportError("No module named 'numba'"))), "No module named 'numba'; pip install 'opt-np[cuda]' brings it"),
        (lane(fails(RuntimeError("No kernel.\nstack")), ours=False), "No kernel"),
        (lane(fails(RuntimeError("No kernel."), "Expected Half (Triggered internally at x.cpp)"), ours=False), "No kernel. Expected Half"),
        (lane(fails(RuntimeError("No kernel."), "Flash attention kernel not used because:"), ours=False), "No kernel"),
        (lane(fails(RuntimeError("No kernel."), "CuDNN attention has been runtime disabled."), ours=False), "No kernel"),
    ],
)
def test_a_lane_that_cannot_is_left_out_with_its_reason(one, why):
    found = bench.check(CASE, {"mine": one, "theirs": lane()}, "cpu", 0)
    assert found["left_out"] == {"mine": why}
    assert list(found["errors"]) == ["theirs"]


def test_a_kernel_of_ours_that_breaks_is_no_refusal():
    with pytest.raises(RuntimeError, match="illegal address"):
        bench.check(CASE, {"mine": lane(fails(RuntimeError("illegal address")))}, "cpu", 0)


def test_a_reason_is_told_once(capsys):
    lanes, two = {"mine": lane(refusal="is tired"), "theirs": lane()}, [CASE, Case("flash", "float32", 1, 5, 1, 8)]
    assert [found["left_out"] for found in bench.check_all(two, lanes, "cpu", 0)] == [{"mine": "is tired"}] * 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"bench: mine is left out: is tired (from {CASE.title} on)"
    assert told[1:] == [f"bench: {case.title}: theirs within the rule" for case in two]


def test_without_any_lane_there_is_nothing_to_do():
    with pytest.raises(ValueError, match="no lane of mine can compute any of these shapes"):
        bench.check_all([CASE], {"mine": lane(refusal="is tired")}, "cpu", 0)


def test_math_takes_part_where_its_scores_have_room():
    q = torch.empty(4, 4096, 32, 64, device="meta")
    assert bench.torch_lane("math").refuses(q) == ""
    longer = torch.empty(2, 8192, 32, 64, device="meta")
    assert bench.torch_lane("math").refuses(longer) == "holds 17 GB of scores, and 10 GB are allowed"
    assert bench.torch_lane("flash").refuses(longer) == ""


def test_torch_is_given_views_and_the_backend_that_was_named(monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def look(q, k, v, is_causal, scale):
        seen.append((q.shape, q.stride(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return attention(q, k, v, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    q, k, v = bench.inputs(CASE, "cpu", 0)
    assert bench.torch_lane("flash").call(q, k, v, 0.3).shape == q.shape
    bench.torch_lane("math").call(q, k, v, 0.3)
    assert seen == [((3, 2, 20, 8), (320, 8, 16, 1), True, False), ((3, 2, 20, 8), (320, 8, 16, 1), False, True)]


def test_without_our_kernels_torch_stands_alone_with_a_word(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "opt_fast.attention_cuda", None)
    assert list(bench.all_lanes("cuda")) == ["torch cudnn", "torch flash", "torch efficient", "torch math"]
    assert "ours are left out: " in capsys.readouterr().err


# ---- a made-up GPU -----------------------------------------------------------------------------------------------------------------------


class Gpu:
    """Enough of torch.cuda for this command: its queue is a list, and time passes only in what is queued. Its memory is the host's.

    The host's clock is made up too: it goes on with the device, and by `aside`, for which the device knows nothing to do.
    """

    fill, now, aside = 50e-6, 0.0, 0.0

    def __init__(self):
        self.queue, self.moved = [], {}

    def work(self, what, seconds):
        self.queue.append(what)
        self.now += seconds

    def event(self, enable_timing):
        assert enable_timing
        one = SimpleNamespace(at=None)
        one.record = lambda: (self.queue.append("event"), setattr(one, "at", self.now))
        one.elapsed_time = lambda end: 1e3 * (end.at - one.at)
        return one


@pytest.fixture
def gpu(monkeypatch):
    one, empty, randn, generator = Gpu(), torch.empty, torch.randn, torch.Generator

    def on_host(make):
        return lambda *args, **options: make(*args, **{**options, "device": "cpu"})

    def buffers(*args, dtype=None, **options):
        if dtype != torch.int8:
            return on_host(empty)(*args, dtype=dtype, **options)
        return SimpleNamespace(bytes=args[0], zero_=lambda: one.work("fill", one.fill))

    cuda = {
        "is_available": lambda: True, "current_device": lambda: 0, "empty_cache": lambda: None, "Event": one.event,
        "synchronize": lambda: one.queue.append("wait"),
        "get_device_properties": lambda _: SimpleNamespace(name="A GPU", total_memory=1e9, multi_processor_count=4, L2_cache_size=1000, uuid="1-2"),
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: one.now + one.aside))
    monkeypatch.setattr(torch, "empty", buffers)
    monkeypatch.setattr(torch, "randn", on_host(randn))
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    for name, value in {"TOKENS": 64, "WIDTH": 32, "MATMUL": 16, "READ": 4096}.items():
        monkeypatch.setitem(getattr(bench, name), "cuda", value)
    return one


def test_between_two_events_stands_the_call_alone_and_the_host_waits_at_the_end(gpu):
    clock = Clock("cuda")
    assert clock.written.bytes == 4000  # four times the cache
    assert clock.times == 6  # of 50 µs: 300 µs in which the host is ahead
    gpu.queue.clear()
    assert clock.seconds(lambda: gpu.work("call", 3e-3), 3) == pytest.approx([3e-3] * 3)
    assert gpu.queue == [*(["fill"] * 6 + ["event", "call", "event"]) * 3, "wait"]


def test_work_that_events_do_not_see_is_found_out(gpu):
    clock = Clock("cuda")
    assert clock.estimate(lambda: gpu.work("call", 3e-3)) == pytest.approx(3e-3)
    stalls = iter((0.5, 0, 0.5, 0, 0, 0))  # the host may be busy with others, at times
    assert clock.estimate(lambda: setattr(gpu, "aside", gpu.aside + next(stalls)) or gpu.work("call", 3e-3)) == pytest.approx(3e-3)
    lanes = {"mine": lane(lambda *_: setattr(gpu, "aside", gpu.aside + 0.01))}
    with pytest.raises(ValueError, match=r"2 heads of 8: mine: events tell 0 ms, the host's clock 10 ms: does it run on torch's current stream"):
        bench.measure(CASE, lanes, {}, clock, 2, 0)


def timed(gpu, name, *seconds):
    """A lane whose calls take these seconds, one after the other."""
    left = list(seconds)
    return lane(lambda *_: gpu.work(name, left.pop(0) if len(left) > 1 else left[0]))


def test_rounds_take_turns_and_tell_medians(gpu, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 3)
    clock, warm = Clock("cuda"), (0.01,) * 2
    a = timed(gpu, "a", *warm, 1e-3, 5e-3, 2e-3, 7e-3, 8e-3, 9e-3)
    b = timed(gpu, "b", 0.09)
    gpu.queue.clear()
    assert bench.measure(CASE, {"a": a, "b": b}, {}, clock, 2, 0) == {"a": pytest.approx([2e-3, 8e-3]), "b": pytest.approx([0.09, 0.09])}
    calls = [what for what in gpu.queue if what in "ab"]
    assert calls == [*"aabb", *"aaabb", *"aaabb"]  # what b may take is up after two


@pytest.mark.parametrize(("seconds", "repeats"), [(1e-5, 20), (0.045, 4), (3.0, 1)])
def test_slow_lanes_are_repeated_less(gpu, seconds, repeats):
    clock = Clock("cuda")
    gpu.queue.clear()
    bench.measure(CASE, {"a": timed(gpu, "a", seconds)}, {}, clock, 1, 0)
    assert gpu.queue.count("a") == 2 + repeats  # two tell how long it takes


def test_a_lane_that_finds_no_memory_later_is_left_out_and_the_others_go_on(gpu, capsys):
    calls = []

    def full(*_):
        calls.append(1)
        gpu.work("full", 0.2)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    left_out = {}
    found = bench.measure(CASE, {"full": lane(full), "b": timed(gpu, "b", 0.2)}, left_out, Clock("cuda"), 3, 0)
    assert found == {"b": pytest.approx([0.2] * 3)}
    assert left_out == {"full": "out of memory"}
    assert f"bench: full is left out of {CASE.title}: out of memory" in capsys.readouterr().err


def test_the_limits_are_medians_of_a_product_and_of_what_is_read(gpu, monkeypatch):
    monkeypatch.setattr(torch, "matmul", lambda a, b: gpu.work("product", 2e-3 if a.dtype == torch.float16 else 4e-3))
    monkeypatch.setattr(torch.Tensor, "amax", lambda x: gpu.work("read", 1e-3))
    found = bench.measure_limits(["float16", "float32"], Clock("cuda"))
    assert found["matmul"] == {"float16": pytest.approx(2 * 16**3 / 2e-3), "float32": pytest.approx(2 * 16**3 / 4e-3)}
    assert found["bandwidth"] == pytest.approx(4096 / 1e-3)
    assert len(found["read_seconds"]) == bench.REPEATS


def test_nvidia_smi_is_asked_for_the_gpu_in_use_and_may_be_silent(gpu, monkeypatch):
    def answer(words, **options):
        assert "--id=GPU-1-2" in words
        return SimpleNamespace(stdout="575.1, 1980 MHz, 1990 MHz, 2619 MHz, 300.5 W, 700.0 W, 40\n")

    clock = Clock("cuda")
    monkeypatch.setattr(subprocess, "run", answer)
    assert bench.nvidia_smi(clock)["power.limit"] == "700.0 W"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices were found\n"))
    assert bench.nvidia_smi(clock) == {}
    for error in (FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 20)):
        monkeypatch.setattr(subprocess, "run", fails(error))
        assert bench.nvidia_smi(clock) == {}


class Rung:
    """As those of opt_fast.attention_cuda, on what the made-up GPU has: attention written out, in so many times the seconds of another."""

    def __init__(self, gpu, seconds, dtypes=("float16", "bfloat16", "float32")):
        self.gpu, self.seconds, self.dtypes = gpu, seconds, dtypes

    def __call__(self, q, k, v, scale):
        self.gpu.work("rung", self.seconds)
        return right(q, k, v, scale), None

    def refuses(self, q):
        return "" if str(q.dtype).removeprefix("torch.") in self.dtypes else f"computes in {self.dtypes[0]}, not {q.dtype}"


@pytest.fixture
def rungs(gpu, monkeypatch):
    module = ModuleType("opt_fast.attention_cuda")
    module.RUNGS = {"numba v1": Rung(gpu, 0.4, ("float16",)), "mma": Rung(gpu, 0.02)}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(opt_fast, "attention_cuda", module, raising=False)
    theirs = bench.torch_lane

    def torch_lane(name):
        one = theirs(name)
        return Lane(lambda *args: gpu.work("torch", 0.03) or one.call(*args), one.refuses)

    monkeypatch.setattr(bench, "torch_lane", torch_lane)
    monkeypatch.setattr(torch, "matmul", lambda a, b: gpu.work("product", 1e-3))
    monkeypatch.setattr(torch.Tensor, "amax", lambda x: gpu.work("read", 1e-3))


def test_a_run_that_is_stopped_keeps_what_it_has(rungs, monkeypatch, tmp_path):
    words, file = ("--lengths", "8", "16", "--head-dims", "8", "--grid", "flash", "--rounds", "2", "--dtypes", "float16"), tmp_path / "found.json"
    measure, calls = bench.measure, []

    def stopped(*given):
        if calls:
            raise KeyboardInterrupt
        calls.append(given)
        return measure(*given)

    monkeypatch.setattr(bench, "measure", stopped)
    assert cli.main(["bench", "attention", *words, "--json", str(file)]) == 130
    assert [case["S"] for case in json.loads(file.read_text())["cases"]] == [8]


def test_a_whole_run(rungs, capsys, tmp_path):
    """On the made-up GPU, with torch's kernels for the CPU: two of four backends are there."""
    words = ("--lengths", "8", "16", "--head-dims", "8", "--grid", "flash", "--rounds", "2", "--seed", "7", "--json", str(tmp_path / "found.json"))
    assert cli.main(["bench", "attention", *words]) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert (tmp_path / "found.json").read_text() == last + "\n"
    assert lines[0].startswith("attention on A GPU, CUDA ")
    products = "8.19e-06 TFLOP/s of float16, 8.19e-06 TFLOP/s of bfloat16"
    assert lines[1] == f"limits: 0.004096 GB/s read from memory; products of 16 x 16, {products}"
    assert (result["what"], result["seed"], result["rounds"], result["state_before"]) == ("attention", 7, 2, {})
    assert [(case["dtype"], case["B"], case["S"], case["H"], case["Dh"]) for case in result["cases"]] == [
        ("float16", 8, 8, 4, 8), ("float16", 4, 16, 4, 8), ("bfloat16", 8, 8, 4, 8), ("bfloat16", 4, 16, 4, 8)]  # fmt: skip
    half, other = result["cases"][1], result["cases"][3]
    assert half["seconds"] == {"numba v1": pytest.approx([0.4] * 2), "mma": pytest.approx([0.02] * 2), "torch flash": pytest.approx([0.03] * 2),
                               "torch math": pytest.approx([0.03] * 2)}  # fmt: skip
    assert half["ours"] == "mma"
    assert half["ratio"] == {name: pytest.approx([1.5] * 3) for name in ("torch flash", "torch math")}
    assert half["percent_of_matmul"]["mma"] == pytest.approx(100 * half["flops"] / 0.02 / (2 * 16**3 / 1e-3))
    assert list(half["left_out"]) == ["torch cudnn", "torch efficient"]
    assert other["left_out"]["numba v1"] == "computes in float16, not torch.bfloat16"
    assert list(other["errors"]) == ["mma", "torch flash", "torch math"]
    assert "bench: torch cudnn is left out: No viable backend" in err
    assert err.count("numba v1 is left out: computes in float16") == 1
    assert "  mma             " in out
    assert "mma is 1.50 (1.50 to 1.50) x as fast" in out


def test_a_whole_run_of_the_backward_pass(rungs, gpu, monkeypatch, capsys):
    def gradients(dO, q, k, v, O, L, scale):
        gpu.work("backward", 0.05)
        return bench.plain_bwd(q, k, v, dO, scale)

    rung = Rung(gpu, 0.02)
    monkeypatch.setattr(bench, "BACKWARD", {"mma": SimpleNamespace(refuses=rung.refuses, forward=rung, backward=gradients)})
    words = ("--dtypes", "float16", "--lengths", "8", "--head-dims", "8", "--grid", "flash", "--rounds", "2", "--seed", "7", "--lanes", "mma")
    assert cli.main(["bench", "attention", "--backward", *words]) == 0
    alone, both = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert alone["seconds"] == {"mma": pytest.approx([0.05] * 2)}
    assert both["seconds"] == {"mma": pytest.approx([0.07] * 2)}
    assert (alone["work"], both["work"]) == ("backward", "forward and backward")
    assert alone["tflops"]["mma"][0] == pytest.approx(2.5 * 4 * 8 * 4 * 8 * 8 * 8 / 2 / 0.05 / 1e12)
    last = len(gpu.queue) - gpu.queue[::-1].index("backward")
    before = gpu.queue[:last][-20:]
    assert before == [*["fill"] * 18, "event", "rung", "backward"][-20:]  # a head start of three times 300 µs


def test_a_wrong_lane_ends_the_run_before_anything_is_timed(rungs, gpu, monkeypatch, capsys):
    monkeypatch.setattr(Rung, "__call__", lambda self, q, k, v, scale: (1.1 * right(q, k, v, scale), None))
    gpu.queue.clear()
    assert cli.main(["bench", "attention", "--lengths", "8", "16", "--head-dims", "8", "--grid", "flash", "--lanes", "mma"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("opt-np: float16, B 8, S 8, 4 heads of 8: mma is off by ")
    assert "rung" not in gpu.queue


# ---- what is told ------------------------------------------------------------------------------------------------------------------------

SPEED = {"numba v1": 1.2, "numba v2": 6, "numba v3": 14, "mma": 330, "torch cudnn": 640, "torch flash": 335, "torch efficient": 250, "torch math": 30}


def made_up_result(dtypes=("float16", "bfloat16"), head_dims=(64, 80, 128), lengths=(512, 1024, 2048, 4096, 8192, 16384)) -> dict:
    """As a GPU might: speeds that grow with the length and the head."""
    rng, found, lanes = np.random.default_rng(0), [], {name: lane(ours=not name.startswith("torch")) for name in SPEED}
    for case in bench.cases("cuda", dtypes, head_dims, lengths, ("flash", "opt")):
        there = [name for name in SPEED if not (name == "torch math" and case.S > 4096)]
        rates = {name: SPEED[name] * 1e12 * case.S / (case.S + 700) * (case.Dh / 128) ** 0.5 * rng.normal(1, 0.02, 5) for name in there}
        seconds = {name: list(case.flops / rate) for name, rate in rates.items()}
        errors = {name: {"error": 1e-3, "allowed": 2e-3} for name in there}
        left_out = {name: "holds 17 GB of scores, and 10 GB are allowed" for name in SPEED if name not in there}
        found.append(bench.summary(case, seconds, lanes, 780e12) | {"errors": errors, "left_out": left_out})
    where = {"device": "cuda", "gpu": "NVIDIA H200", "cpu": "a processor", "versions": {"torch": "2.13.0", "cuda": "13.0", "cudnn": 91900}}
    state = {"driver_version": "575.1", "clocks.sm": "1980 MHz", "clocks.max.sm": "1990 MHz", "power.draw": "600 W", "power.limit": "700 W",
             "temperature.gpu": "50"}  # fmt: skip
    limits = {"width": 8192, "matmul": dict.fromkeys(dtypes, 780e12), "bandwidth": 4.3e12}
    return {"rounds": 5, "machine": where, "state_before": state, "limits": limits, "cases": found}


def test_ratios_are_those_of_the_same_round_against_our_best():
    lanes = {"numba v3": lane(), "mma": lane(), "torch flash": lane(ours=False)}
    seconds = {"numba v3": [4.0, 4.0, 0.1], "mma": [1.0, 2.0, 1.0], "torch flash": [2.0, 2.0, 3.0]}
    found = bench.summary(CASE, seconds, lanes, 1e3)
    assert found["ours"] == "mma"  # by the median
    assert found["ratio"] == {"torch flash": (2.0, 1.0, 3.0)}
    assert found["tflops"]["mma"] == pytest.approx([CASE.flops / 1e12, CASE.flops / 2e12, CASE.flops / 1e12])
    assert found["percent_of_matmul"]["torch flash"] == pytest.approx(100 * CASE.flops / 2 / 1e3)
    assert json.loads(json.dumps(found))["S"] == 20


def test_without_ours_there_are_no_ratios():
    found = bench.summary(CASE, {"torch flash": [1.0]}, {"torch flash": lane(ours=False)}, 1e3)
    assert (found["ours"], found["ratio"]) == (None, {})
    assert bench.summary(CASE, {}, {}, 1e3)["tflops"] == {}


def test_the_table():
    result = made_up_result()
    lines = bench.table(result)
    assert lines[:3] == [
        "attention on NVIDIA H200, driver 575.1, CUDA 13.0, torch 2.13.0, cuDNN 91900",
        "after the products 1980 MHz of 1990 MHz, 600 W of 700 W, 50 °C",
        "limits: 4300 GB/s read from memory; products of 8192 x 8192, 780 TFLOP/s of float16, 780 TFLOP/s of bfloat16",
    ]
    start = lines.index("opt-2.7b: bfloat16, B 1, S 2048, 32 heads of 80")
    found = {line[2:17].strip(): line for line in lines[start + 1 : start + 9]}
    assert list(found) == list(SPEED)
    case = next(case for case in result["cases"] if (case["grid"], case["dtype"]) == ("opt-2.7b", "bfloat16"))
    median, low, high = case["tflops"]["torch cudnn"]
    assert found["torch cudnn"].split()[2:7] == [f"{median:.2f}", "TFLOP/s", f"({low:.2f}", "to", f"{high:.2f})"]
    assert f"{100 * median / 780:.0f} %  mma is {case['ratio']['torch cudnn'][0]:.2f} (" in found["torch cudnn"]
    assert found["torch cudnn"].endswith(") x as fast")
    assert found["mma"].endswith(" %")
    assert "  torch math      left out: holds 17 GB of scores, and 10 GB are allowed" in lines
    result["state_before"] = {}
    assert bench.table(result)[0] == "attention on NVIDIA H200, CUDA 13.0, torch 2.13.0, cuDNN 91900"


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    bench.draw(str(tmp_path / "speed.svg"), made_up_result())
    drawn = (tmp_path / "speed.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in [*SPEED, "product of matrices", "NVIDIA H200", "bfloat16, heads of 80", "16k", "512"])


def test_the_plot_of_lanes_that_are_alike_begins_at_zero(tmp_path):
    pytest.importorskip("matplotlib")
    result = made_up_result(("bfloat16",), (64,))
    bench.draw(str(tmp_path / "ladder.svg"), result)
    for case in result["cases"]:
        case["tflops"] = {name: told for name, told in case["tflops"].items() if name in ("mma", "torch cudnn")}
    bench.draw(str(tmp_path / "two.svg"), result)
    zero = {file.stem: "<!-- 0 -->" in file.read_text() for file in tmp_path.iterdir()}
    assert zero == {"ladder": False, "two": True}


def test_the_opt_grid_alone_is_no_plot(tmp_path, capsys):
    result = made_up_result()
    result["cases"] = [case for case in result["cases"] if case["grid"] != "flash"]
    bench.draw(str(tmp_path / "speed.svg"), result)
    assert not list(tmp_path.iterdir())
    assert "nothing to draw: the plot shows the flash grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 1, r"opt-np: torch \S+, built for .*, finds no GPU; --device cpu tries this command on small shapes"),
        (["--device", "tpu"], 2, "invalid choice: 'tpu'"),
        (["--dtypes", "float64"], 2, "invalid choice: 'float64'"),
        (["--device", "cpu", "--rounds", "0"], 1, "--rounds is 0; it must be at least 1"),
        (["--device", "cpu", "--lengths", "64", "-1"], 1, "--lengths is -1; it must be at least 1"),
        (["--device", "cpu", "--lanes", "flash"], 1, r"--lanes flash: there is no such lane here; there are .*torch-flash, torch-math"),
        (["--device", "cpu", "--plot", "/nowhere/plot.png"], 1, "--plot /nowhere/plot.png: it needs"),
        (["--device", "cpu", "--json", "/nowhere/found.json"], 1, "--json /nowhere/found.json: /nowhere is no folder"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, status, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        found = cli.main(["bench", "attention", *words])
    except SystemExit as error:
        found = error.code
    *_, last = capsys.readouterr().err.splitlines()
    assert found == status
    assert re.search(told, last)


def test_both_benchmarks_have_their_help(capsys):
    for words, options in ((["cpu"], {"--size"}), (["attention"], {"--head-dims"}), ([], {"--size", "--head-dims"})):
        with pytest.raises(SystemExit):
            cli.main(["bench", *words, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: opt-np bench {' '.join(words)}".rstrip())
        assert {option for option in ("--size", "--head-dims") if f"  {option}" in out} == options


def test_a_small_run_on_the_cpu(capsys, tmp_path):
    assert cli.main(["bench", "attention", "--device", "cpu", "--rounds", "1", "--lanes", "torch-flash", "torch-math"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [(case["dtype"], case["S"]) for case in result["cases"]] == [("float32", 64), ("float32", 128)]
    assert all(list(case["seconds"]) == ["torch flash", "torch math"] for case in result["cases"])
    assert all(seconds > 0 for case in result["cases"] for times in case["seconds"].values() for seconds in times)
    assert "on a CPU, to try this command: no result" in out
    assert f"{1e3 * result['cases'][0]['tflops']['torch math'][0]:.2f} GFLOP/s (" in out
    assert [line.partition(",")[0] for line in err.splitlines()[-2:]] == ["bench: timing float32"] * 2
