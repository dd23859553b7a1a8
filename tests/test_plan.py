"""The plan: its parts are the model's own sizes, it reports what fits, and its command reports every mistake in one line."""

import re

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from opt_np import OPTForCausalLM, cli, costs, generate, plan, quantize, trace
from opt_np.config import SIZES, OPTConfig
from opt_np.kv_cache import KVCache
from opt_np.tree import flatten

WIDE = small.config(hidden_size=64, ffn_dim=128, vocab_size=320, num_attention_heads=4)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_weights_and_cache_are_what_the_model_holds(kind):
    params, cfg = small.params(WIDE), WIDE
    if kind:
        params, cfg = quantize.quantized(params, cfg, kind)
    m = plan.memory(WIDE, 2, 9, 8, kind=kind)
    assert m.weights == sum(a.nbytes for a in flatten(params).values())
    model = OPTForCausalLM(params, cfg)
    request = generate.prepare(model.params, small.ids(WIDE), cfg, max_new_tokens=8, min_new_tokens=8, ops=model.ops)
    list(generate.read(generate.decode(request), request.reader))
    keys = request.reader.cache._layers
    assert m.cache == sum(k.nbytes + v.nbytes for k, v in keys)  # room for every token, made once
    assert m.peak == m.weights + max(m.loading, m.prompt_cache + m.working, m.cache) + m.slack


@given(batch=st.integers(1, 3), prompt=st.integers(1, 12), gen=st.integers(1, 12))
def test_flops_and_bytes_are_those_of_the_passes(batch, prompt, gen):
    """The closed form of all steps against every step's own count, while it runs."""
    model, cache = OPTForCausalLM(small.params(WIDE), WIDE), KVCache()
    ids = small.ids(WIDE, batch, prompt + gen)

    def counted(new):
        steps = trace.record(model, new, cache=cache, fused=True, values=False, logits_to_keep=1)
        sums = [c for c in costs.steps(WIDE, *new.shape, cache.length - new.shape[1]) if c.name.endswith(("resid_pre", "resid_mid", "resid_post"))]
        return np.array([sum(s.flops for s in (*steps, *sums)), sum(s.bytes for s in (*steps, *sums))])

    assert tuple(counted(ids[:, :prompt])) == plan.prefill(WIDE, batch, prompt)
    rest = sum((counted(ids[:, t : t + 1]) for t in range(prompt, prompt + gen - 1)), np.zeros(2, int))
    assert tuple(rest) == plan.decode(WIDE, batch, prompt, gen)


def test_time_is_that_of_the_slower_of_memory_and_arithmetic():
    assert plan.Work(flops=100, bytes=10).seconds(bandwidth=10, flops=10) == 10
    assert plan.Work(flops=100, bytes=10).seconds(bandwidth=0.5, flops=10) == 20


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_a_plan(size):
    cfg = OPTConfig.from_size(size)
    for backend in ("numpy", "cpu"):
        for kind in (None, "int8", "int4"):
            m = plan.memory(cfg, 1, 512, 128, kind=kind, backend=backend)
            assert m.peak > m.weights > 0
            assert m.cache == 640 * 2 * cfg.num_hidden_layers * cfg.hidden_size * 4
    assert plan.memory(cfg, 8, 512, 128).peak > plan.memory(cfg, 1, 512, 128).peak


def run(capsys, *words):
    status = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    return status, out, err


STATED = ("--bandwidth", "100", "--tflops", "2")


def test_the_command_says_what_is_needed(capsys):
    status, out, err = run(
        capsys, "--model", "opt-13b", "--batch", "8", "--prompt", "512", "--gen", "128", "--dtype", "int8", *STATED, "--memory", "30"
    )
    assert (status, err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    cfg = OPTConfig.from_size("13b")
    assert said["parameters"] == "12,853,473,280; 8 × (512 + 128) tokens, memory as of backend cpu"
    assert said["weights"] == f"{costs.weight_bytes(cfg, kind='int8') / 1e9:.3f} GB in int8"
    assert said["cache"].startswith("8.389 GB: 8 × 640 tokens, 1600 KiB each")
    assert said["peak"].endswith("of 30.0 GB: fits")
    rest = plan.decode(cfg, 8, 512, 128, kind="int8")
    each = rest.seconds(100e9, 2e12) / 127
    assert f"at least {each * 1e3:.3g} ms a step, at most {8 / each:.1f} tokens/s" in said["decode"]
    assert said["in"].endswith("at 100.0 GB/s and 2 TFLOP/s, as stated")


@pytest.mark.parametrize(("words", "said"), [
    (("--memory", "15"), "does not fit; read its layers anew"), (("--memory", "8"), "does not fit, even without its weights"),
    (("--device", "h200"), "of 141.0 GB: fits"), (("--gen", "1"), "to the first token"),
])  # fmt: skip
def test_it_says_what_to_do(capsys, words, said):
    status, out, _ = run(capsys, "--model", "13b", "--batch", "8", "--dtype", "int8", *STATED, *words)
    assert status == 0
    assert said in out
    assert ("decode" in out) == ("--gen" not in words)


def test_a_folder_is_planned_by_its_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16}')
    status, out, err = run(capsys, "--model", str(tmp_path), *STATED)
    assert (status, err) == (0, "")
    assert re.match(r"parameters +154,865,664", out)


@pytest.mark.parametrize(("words", "said"), [
    (("--model", "opt-9b"), "opt-9b"), (("--model", "125m", "--batch", "0"), "batch is 0; it is from 1 to 1000000"),
    (("--model", "125m", "--prompt", "2000", "--gen", "50"), "this model's 2048 positions; the last new token needs none: ask for at most 49"),
    (("--model", "125m", "--batch", "9" * 400), "batch is"), (("--model", "125m", "--dtype", "float16", "--backend", "numpy"), "not 'float16'"),
    (("--model", "125m", "--bandwidth", "-1"), "--bandwidth is -1; it must be above 0"), (("--model", "125m", "--memory", "nan"), "--memory is nan"),
])  # fmt: skip
def test_mistakes_are_told_in_a_line(capsys, words, said, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *STATED, *words)
    assert (status, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_prompt_that_nobody_named_fits_the_context(capsys):
    status, out, _ = run(capsys, "--model", str(cli.SHIPPED), *STATED)
    assert status == 0
    assert "(385 + 128) tokens" in out  # of 512 positions; the last token needs none


def test_what_can_be_generated_can_be_planned(capsys):
    assert run(capsys, "--model", "125m", "--prompt", "2000", "--gen", "49", *STATED)[0] == 0


@pytest.mark.parametrize("group", [32, 64])
def test_a_quantised_folder_is_planned_as_it_is(capsys, tmp_path, group):
    small.folder(tmp_path / "float", WIDE)
    assert cli.main(["quantize", str(tmp_path / "float"), str(tmp_path / "int4"), "--kind", "int4", "--group-size", str(group)]) == 0
    capsys.readouterr()
    model = OPTForCausalLM.from_pretrained(tmp_path / "int4")
    assert costs.weight_bytes(model.config, kind="int4") == sum(a.nbytes for a in flatten(model.params).values())
    steps = trace.record(model, small.ids(WIDE))
    assert [s.weights for s in steps] == [c.weights for c in costs.steps(model.config, 2, 9, kind="int4")]
    assert " GB in int4" in run(capsys, "--model", str(tmp_path / "int4"), "--prompt", "9", "--gen", "2", *STATED)[1]


def test_sixteen_bits_on_a_device_are_moved_as_such():
    """No more than weights, keys, values and a little: what is said to take at least so long must be possible in it."""
    cfg = OPTConfig.from_size("13b")
    moved = plan.decode(cfg, 64, 2000, 2, "float16", number=2).bytes
    least = costs.weight_bytes(cfg, "float16") + costs.cache_bytes(cfg, 64, 2001, 2)
    assert least < moved < 1.02 * least


def test_a_device_has_a_peak_for_each_dtype(capsys):
    for dtype, peak in (("float16", "989"), ("float32", "67"), ("int8", "67")):
        assert f"at 4800.0 GB/s and {peak} TFLOP/s, as stated" in run(capsys, "--model", "125m", "--device", "h200", "--dtype", dtype)[1]


def test_without_stated_speeds_this_machine_is_measured(capsys, monkeypatch):
    from opt_fast import limits

    monkeypatch.setattr(limits, "measure", lambda threads: {"bandwidth": 20e9, "matmul": 0.5e12})
    assert run(capsys, "--model", "125m")[1].splitlines()[-1].endswith("at 20.0 GB/s and 0.5 TFLOP/s, as measured here, just now")
    out = run(capsys, "--model", "125m", "--bandwidth", "50")[1]
    assert out.splitlines()[-1].endswith("at 50.0 GB/s and 0.5 TFLOP/s, as stated and measured here, just now")
