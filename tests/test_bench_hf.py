"""opt-np bench hf-tables: its checks, timing and output, on tiny models, with a made-up GPU, and one small run on the CPU. No timing is tested."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from opt_fast import attention_cuda, bench_hf, hf  # noqa: E402
from opt_np import cli  # noqa: E402


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No call more than there must be."""
    monkeypatch.setattr(bench_hf, "WARM_BUDGET", 0)
    monkeypatch.setitem(bench_hf.NEW_TOKENS, "cpu", 2)
    hf.register()


@pytest.fixture(scope="module")
def model():
    return bench_hf.build("350m", "cpu", 1)


def run(*words: str) -> int:
    return cli.main(["bench", "hf-tables", "--device", "cpu", "--seed", "1", "--steps", "1", *words])


# ---- the whole command -------------------------------------------------------------------------------------------------------------------


def test_a_small_run_of_every_table(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = ("--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "forward.svg"))
    assert run("--batches", "2", "1", "--lengths", "5", "9", *files) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert (tmp_path / "found.json").read_text() == last + "\n"
    assert list(result) == ["what", "seed", "dtype", "machine", "new_tokens", "options", "checks", "tables"]
    assert result["options"] == {"batches": [2, 1], "lengths": [5, 9], "steps": 1}
    shapes = {table: [(row["model"], row["batch"], row["length"]) for row in found] for table, found in result["tables"].items()}
    every = [("350m", B, T) for B in (2, 1) for T in (5, 9)]
    assert shapes == {"training": every, "inference": every, "diagrams": [(size, 2, T) for size in ("350m", "2.7b") for T in (5, 9)]}
    checked = {
        "training": ["logits", *(f"gradients of {name}_proj" for name in "qkv")],
        "inference": ["logits", "cached logits"],
        "diagrams": ["logits"],
    }
    for table, found in result["checks"].items():
        for columns in found.values():
            assert list(columns) == ["eager", "sdpa", "ours"]
            assert all(list(told) == checked[table] for told in columns.values())
            assert all(0 < one["error"] <= one["allowed"] for told in columns.values() for one in told.values())
    assert all(list(row["speedup"]) == ["sdpa", "ours"] and not row["saving"] for found in result["tables"].values() for row in found)
    heads = [line for line in lines if line.startswith("###")]
    assert heads == ["### Training, opt-350m", "### Inference, opt-350m, 2 new tokens, the prompt's pass included", "### Forward pass, opt-350m",
                     "### Forward pass, opt-2.7b"]  # fmt: skip
    assert "to try this command, no result" in lines[0]
    assert "peak mem" not in out
    assert "bench: inference, opt-350m: eager, sdpa, ours agree: logits, cached logits" in err
    drawn = (tmp_path / "forward.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("eager", "sdpa", "ours", "opt-2.7b's shape, batch 2", "tokens in a row", "5", "9"))


def test_each_column_runs_with_the_attention_that_it_names(model):
    """Ours sees no call of the others, and is called in every layer of its own; one kernel of torch's is on at a time."""
    seen = []
    for device in ("cpu", "cuda"):
        for name in bench_hf.COLUMNS[device]:
            with bench_hf.attention(model, device, name):
                flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
                seen.append((name, model.config._attn_implementation, flags))
    every, cudnn, flash = (True, True, True), (False, True, False), (True, False, False)
    ends = [("eager", "eager", every), ("ours", "opt_fast", every)]
    assert seen[:3] == [ends[0], ("sdpa", "sdpa", every), ends[1]]
    assert seen[3:] == [ends[0], ("sdpa cudnn", "sdpa", cudnn), ("sdpa flash", "sdpa", flash), ends[1]]


def test_models_have_the_published_shapes_on_a_gpu():
    small, large = (bench_hf.shape(size, "cuda") for size in ("350m", "2.7b"))
    assert (small["hidden_size"], small["num_hidden_layers"], small["word_embed_proj_dim"], small["do_layer_norm_before"]) == (1024, 24, 512, False)
    assert (large["hidden_size"], large["num_attention_heads"], large["dropout"]) == (2560, 32, 0.1)


# ---- the check ---------------------------------------------------------------------------------------------------------------------------


def scaled(q, k, v, scale, seen=None):
    return attention_cuda.plain(q, k, v, 0.9 * scale, seen)


def not_causal(q, k, v, scale, seen=None):
    O, L = attention_cuda.plain(q, k, v, scale, seen)
    return O + 0.05 * v.mean(1, keepdim=True) if q.shape[1] > 1 else O, L


def wrong_when_decoding(q, k, v, scale, seen=None):
    O, L = attention_cuda.plain(q, k, v, scale, seen)
    return (1.1 * O if q.shape[1] == 1 else O), L


def nan(q, k, v, scale, seen=None):
    O, L = attention_cuda.plain(q, k, v, scale, seen)
    O[-1, -1] = torch.nan
    return O, L


def bwd_without(i):
    def backward(*args):
        grads = list(attention_cuda.plain_bwd(*args))
        grads[i] = 0.8 * grads[i]
        return tuple(grads)

    return backward


FLAWS = [
    ("diagrams", "compute", scaled, "logits"),
    ("diagrams", "compute", not_causal, "logits"),
    ("diagrams", "compute", nan, "logits"),
    ("inference", "compute", wrong_when_decoding, "cached logits"),
    ("training", "compute_bwd", bwd_without(0), "gradients of q_proj"),
    ("training", "compute_bwd", bwd_without(1), "gradients of k_proj"),
    ("training", "compute_bwd", bwd_without(2), "gradients of v_proj"),
]


@pytest.mark.parametrize(("table", "pass_", "flaw", "what"), FLAWS)
def test_a_wrong_column_ends_the_run_before_its_table_is_timed(table, pass_, flaw, what, monkeypatch, capsys):
    monkeypatch.setattr(attention_cuda, pass_, flaw)
    monkeypatch.setattr(bench_hf, "seconds", lambda *_: pytest.fail("it was timed"))
    assert run("--tables", table) == 1
    out, err = capsys.readouterr()
    assert out == ""
    message = rf"opt-np: opt-350m: {what} of ours are off by \S+ of the largest, and \S+ is allowed, 3 times what eager is off in float16"
    assert re.match(message, err.splitlines()[-1])


def test_a_column_that_fails_in_the_check_is_not_timed(model, monkeypatch):
    monkeypatch.setitem(bench_hf.COLUMNS, "cpu", bench_hf.COLUMNS["cpu"] | {"sdpa": ("sdpa", "CUDNN_ATTENTION")})
    errors, left_out = bench_hf.check("diagrams", "350m", model, "cpu", 1)
    assert list(errors) == ["eager", "ours"]
    assert left_out["sdpa"].startswith("No viable backend")
    called, measure = [], bench_hf.measure
    monkeypatch.setattr(bench_hf, "measure", lambda calls, *args: called.extend(calls) or measure(calls, *args))
    (row,) = bench_hf.rows("diagrams", "350m", model, {"sdpa": "tired"}, "cpu", 1, [1], [4], 1)
    assert called == ["eager", "ours"]
    assert row["cells"]["sdpa"] == {"failed": "tired"}
    assert list(row["speedup"]) == ["ours"]


def test_a_kernel_of_ours_that_breaks_is_no_refusal(monkeypatch):
    def broken(*_):
        raise RuntimeError("illegal address")

    monkeypatch.setattr(attention_cuda, "compute", broken)
    with pytest.raises(RuntimeError, match="illegal address"):
        run("--tables", "diagrams")


# ---- what is timed -----------------------------------------------------------------------------------------------------------------------


def test_training_makes_new_gradients_of_the_sum_with_dropout(model):
    ids = bench_hf.tokens(model, 2, 6, "cpu", 0)
    weight = model.model.decoder.layers[0].self_attn.q_proj.weight
    bench_hf.train(model, ids)
    assert model.training
    first = weight.grad
    bench_hf.train(model, ids)
    assert weight.grad is not first
    assert not torch.equal(weight.grad, first)  # dropout
    head = model.lm_head.weight.grad
    assert head.shape == (512, 32)
    bench_hf.forward(model, ids)
    assert not model.training
    model.zero_grad()


def test_inference_adds_so_many_tokens_through_the_cache(model, monkeypatch):
    lengths = []
    model.model.decoder.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True)
    bench_hf.generate(model, bench_hf.tokens(model, 2, 6, "cpu", 0), 4)
    model.model.decoder._forward_pre_hooks.clear()
    assert lengths == [(2, 6), (2, 1), (2, 1), (2, 1)]


def test_a_prompt_without_room_for_new_tokens_is_left_out(model, monkeypatch, capsys):
    monkeypatch.setitem(bench_hf.NEW_TOKENS, "cpu", 2040)
    monkeypatch.setattr(bench_hf, "measure", lambda calls, *_: {name: {"failed": "OOM"} for name in calls})
    found = [*bench_hf.rows("inference", "350m", model, {}, "cpu", 1, [1], [8, 9], 1)]
    assert [row["length"] for row in found] == [8]
    assert "prompts of 9 are left out: 2040 tokens more, and OPT has 2048 positions" in capsys.readouterr().err


class Gpu:
    """Enough of torch.cuda: time and memory pass only in what is called."""

    def __init__(self, monkeypatch):
        self.now, self.memory, self.peak, self.log = 0.0, 1000, 0, []
        cuda = {
            "is_available": lambda: True, "current_device": lambda: 0, "empty_cache": lambda: None, "Event": self.event,
            "synchronize": lambda: self.log.append("wait"), "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.memory),
            "get_device_properties": lambda _: SimpleNamespace(name="A GPU", total_memory=1e9),
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(bench_hf, "where", lambda device: torch.device("cpu"))
        monkeypatch.setattr(bench_hf, "shape", lambda size, device, real=bench_hf.shape: real(size, "cpu"))
        for name in ("NEW_TOKENS", "CHECKED"):
            monkeypatch.setitem(getattr(bench_hf, name), "cuda", getattr(bench_hf, name)["cpu"])

    def event(self, enable_timing):
        assert enable_timing
        one = SimpleNamespace(at=None)
        one.record = lambda: (self.log.append("event"), setattr(one, "at", self.now))
        one.elapsed_time = lambda end: 1e3 * (end.at - one.at)
        return one

    def work(self, what, seconds, memory=0):
        self.log.append(what)
        self.now += seconds
        self.peak = max(self.peak, self.memory + memory)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_columns_take_turns_after_their_warm_up(gpu, model, monkeypatch):
    monkeypatch.setattr(bench_hf, "WARM_BUDGET", 2.5)
    monkeypatch.setattr(bench_hf, "BUDGET", 4.0)
    calls = {"eager": lambda: gpu.work("a", 1.0, 500), "ours": lambda: gpu.work("b", 0.01, 100)}
    found = bench_hf.measure(calls, model, "cuda", 5)
    assert [what for what in gpu.log if what in "ab"] == [*"aaa", *"b" * 10, *"ab" * 4, "b"]
    assert {name: len(cell["seconds"]) for name, cell in found.items()} == {"eager": 4, "ours": 5}
    assert found["ours"]["seconds"] == pytest.approx([0.01] * 5)
    assert (found["eager"]["peak"], found["ours"]["peak"]) == (1500, 1100)
    gpu.log.clear()
    bench_hf.seconds(calls["ours"], "cuda")
    assert gpu.log == ["wait", "event", "b", "event", "wait"]


def test_a_slow_column_counts_three_calls_at_least(gpu, model):
    found = bench_hf.measure({"eager": lambda: gpu.work("a", 100.0)}, model, "cuda", 9)
    assert len(found["eager"]["seconds"]) == bench_hf.MIN_STEPS


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_is_a_cell_and_the_others_go_on(gpu, model, late):
    count = []

    def full():
        count.append(1)
        gpu.work("full", 0.1)
        if len(count) > 2 * late:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    cells = bench_hf.measure({"eager": full, "ours": lambda: gpu.work("b", 0.1, 10)}, model, "cuda", 3)
    assert cells["eager"] == {"failed": "OOM"}
    assert len(cells["ours"]["seconds"]) == 3
    row = {"batch": 4, "length": 2048, **bench_hf.summary(cells, 1)}
    assert (row["speedup"], row["saving"]) == ({}, {})
    line = bench_hf.one_table("training", [row], ["eager", "ours"], True)[2]
    assert line.replace(" ", "") == "|4|2048|OOM|0.100|EagerOOM|OOM|0.001|EagerOOM|"


def test_a_whole_run_on_the_made_up_gpu(gpu, capsys, monkeypatch):
    """torch's kernels for the CPU stand in: flash is there, cuDNN is not."""
    speed = {"eager": 4.0, "sdpa": 2.0, "opt_fast": 1.0}
    peak = {"eager": 3e9, "sdpa": 2e9, "opt_fast": 1e9}
    monkeypatch.setattr(bench_hf, "forward", lambda model, ids: gpu.work("call", *(d[model.config._attn_implementation] for d in (speed, peak))))
    words = ("--tables", "diagrams", "--steps", "2", "--batches", "1", "8", "--lengths", "6")
    assert cli.main(["bench", "hf-tables", *words]) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert result["machine"]["gpu"] == "A GPU"
    assert " on A GPU" in lines[0]
    (row, _) = result["tables"]["diagrams"]
    assert row["batch"] == 8
    assert row["cells"]["sdpa cudnn"]["failed"].startswith("No viable backend")
    assert row["cells"]["ours"] == {"seconds": [pytest.approx(1.0)] * 2, "peak": 1000001000, "median": pytest.approx(1.0)}
    assert row["speedup"] == {"sdpa flash": pytest.approx(100), "ours": pytest.approx(300)}
    assert row["saving"] == {"sdpa flash": pytest.approx(50, abs=0.01), "ours": pytest.approx(200, abs=0.01)}
    at = lines.index("### Forward pass, opt-350m")
    cells = [word.strip() for word in lines[at + 4].split("|")[1:-1]]
    seconds = ["4000.000", "-", "2000.000", "1000.000", "-", "100.000", "300.000"]
    assert cells == ["8", "6", *seconds, "3000.001", "-", "2000.001", "1000.001", "-", "50.000", "200.000"]
    assert "bench: sdpa cudnn is left out of diagrams: No viable backend" in err


# ---- what is told ------------------------------------------------------------------------------------------------------------------------


def test_percentages_are_counted_as_hf_counts_them():
    """HF's row for batch 2 and 2048 tokens: 0.464 s, 0.067 s and 594 %; 30572 MB, 4751 MB and 543 %."""
    cells = {"eager": {"seconds": [0.464], "peak": 30572e6}, "ours": {"seconds": [0.0, 0.0669, 9.9], "peak": 4751e6}}
    found = bench_hf.summary(cells, 1)
    assert found["speedup"]["ours"] == pytest.approx(594, abs=1)
    assert found["saving"]["ours"] == pytest.approx(543, abs=1)
    assert bench_hf.summary(cells, 2)["cells"]["ours"]["median"] == pytest.approx(0.0669 / 2)


def test_the_table_is_markdown():
    cells = {"eager": {"seconds": [0.0464], "peak": 3e9}, "ours": {"seconds": [0.02], "peak": 1.5e9}}
    row = {"batch": 1, "length": 128, **bench_hf.summary(cells, 1)}
    lines = bench_hf.one_table("inference", [row, row], ["eager", "ours"], True)
    heads = ["batch_size", "seq_len", "Per token latency (eager - ms)", "Per token latency (ours - ms)", "Speedup ours (%)", "eager peak mem (MB)",
             "ours peak mem (MB)", "Mem saving ours (%)"]  # fmt: skip
    assert [word.strip() for word in lines[0].split("|")[1:-1]] == heads
    assert re.fullmatch(r"(\| -+: ){8}\|", lines[1])
    assert [word.strip() for word in lines[2].split("|")[1:-1]] == ["1", "128", "46.400", "20.000", "132.000", "3000.000", "1500.000", "100.000"]
    assert len({len(line) for line in lines}) == 1


def test_the_plot_needs_the_diagrams_and_leaves_out_what_failed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = {"machine": {"device": "cuda", "gpu": "NVIDIA H200"}, "tables": {"training": []}}
    bench_hf.draw(str(tmp_path / "none.svg"), result)
    assert not list(tmp_path.iterdir())
    assert "nothing to draw" in capsys.readouterr().err
    rng, found = np.random.default_rng(0), []
    for size in ("350m", "2.7b"):
        for T in (128, 256, 512, 1024, 2048):
            seconds = {
                name: list(rng.normal(times * (5e-3 + 1e-9 * T**2), 1e-4, 9)) for name, times in (("eager", 3), ("sdpa flash", 1.2), ("ours", 1))
            }
            cells = {name: {"seconds": told, "peak": 1} for name, told in seconds.items()} | {"sdpa cudnn": {"failed": "tired"}}
            if (size, T) == ("2.7b", 2048):
                cells["eager"] = {"failed": "OOM"}
            found.append({"model": size, "batch": 8, "length": T} | bench_hf.summary(cells, 1))
    bench_hf.draw(str(tmp_path / "forward.svg"), result | {"tables": {"diagrams": found}})
    drawn = (tmp_path / "forward.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("2048", "opt-350m's shape, batch 8", "sdpa flash", "ours"))


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--device", "cuda"], 1, r"opt-np: torch \S+, built for .*, finds no GPU; --device cpu tries this command"),
        (["--tables", "decoding"], 2, "invalid choice: 'decoding'"),
        (["--steps", "0"], 1, "--steps is 0; it must be at least 1"),
        (["--batches", "1", "0"], 1, "--batches is 0; it must be at least 1"),
        (["--lengths", "4096"], 1, "--lengths is 4096; OPT has 2048 positions"),
        (["--plot", "/nowhere/plot.png"], 1, "--plot /nowhere/plot.png: it needs"),
        (["--json", "/nowhere/found.json"], 1, "--json /nowhere/found.json: /nowhere is no folder"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, status, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        found = cli.main(["bench", "hf-tables", "--device", "cpu", *words])
    except SystemExit as error:
        found = error.code
    (*_, last) = capsys.readouterr().err.splitlines()
    assert found == status
    assert re.search(told, last)


def test_without_transformers_it_says_so(monkeypatch, capsys):
    real = bench_hf.find_spec
    monkeypatch.setattr(bench_hf, "find_spec", lambda name: None if name == "transformers" else real(name))
    assert run() == 1
    assert "transformers cannot be imported; pip install 'opt-np[bench]'" in capsys.readouterr().err
