"""opt-np bench decode: its checks, timing and output, on tiny models on the CPU. No timing is tested."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from opt_fast import bench_decode, bench_hf  # noqa: E402
from opt_fast.engine import Params  # noqa: E402
from opt_np import OPTConfig, cli  # noqa: E402
from opt_np.quantize import quantized  # noqa: E402
from opt_np.tree import flatten, map_leaves  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return bench_hf.build("350m", "cpu", 1)


@pytest.fixture
def ids(model):
    return bench_hf.tokens(model, 2, 9, "cpu", 1)


def run(*words):
    return cli.main(["bench", "decode", "--device", "cpu", "--seed", "1", "--rounds", "2", *words])


def test_a_small_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_decode, "QUERIES", (1, 3))
    assert run("--batches", "2", "--contexts", "5", "--new", "6", "--json", str(tmp_path / "found.json")) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert (tmp_path / "found.json").read_text() == last + "\n"
    assert list(result) == ["what", "seed", "machine", "state", "rounds", "options", "limits", "checks", "models", "attention"]
    assert result["options"] == {"sizes": ["350m"], "batches": [2], "contexts": [5], "new": 6}
    assert {*result["checks"]["350m"]} == {*bench_decode.LANES}
    assert all(0 < one["error"] <= one["allowed"] for one in result["checks"]["350m"].values())
    (row,) = result["models"]
    assert [*row["lanes"]] == [*bench_decode.LANES]
    assert all(len(lane["seconds"]) == 2 and lane["percent_of_bandwidth"] > 0 for lane in row["lanes"].values())
    ours, eager = (np.array(row["lanes"][lane]["seconds"]) for lane in ("ours", "hf eager"))
    assert row["lanes"]["hf eager"]["ours"] == pytest.approx([np.median(eager / ours), min(eager / ours), max(eager / ours)])
    assert [*result["attention"][0]["seconds"]] == ["ours, 1", "torch-flash", "torch-math", "ours, 3"]
    assert "opt-350m's shape, batch 2, after 5 tokens" in lines
    assert "to try this command, no result" in lines[0]
    assert "opt-350m: hf eager," in err


def test_only_what_is_asked_for(capsys):
    assert run("--parts", "models", "--lanes", "ours", "hf sdpa", "--batches", "1", "--contexts", "3", "--new", "5") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["attention"] == []
    assert [*result["models"][0]["lanes"]] == ["ours", "hf sdpa"]
    assert {*result["checks"]["350m"]} == {"hf eager", "ours", "hf sdpa"}  # eager says what float16 is off


def test_a_lane_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    right = bench_decode.our_params
    monkeypatch.setattr(bench_decode, "our_params", lambda model: Params(map_leaves(lambda a: a * 1.05, right(model))))
    assert run("--lanes", "ours", "--parts", "models") == 1
    out, err = capsys.readouterr()
    assert not out
    assert "opt-350m: the logits of ours are off by" in err.splitlines()[-1]
    monkeypatch.setattr(bench_decode, "by_torch", lambda *_: torch.zeros(2, 1, 2, 64))
    assert run("--parts", "attention") == 1
    assert "attention of torch-flash is off by 1.0e+00 of the largest" in capsys.readouterr().err


def test_lanes_of_hf_that_cannot_run_are_left_out(monkeypatch, capsys):
    before = bench_decode.hf

    def hf(model, lane, *args, **options):
        if lane == "hf static":
            raise RuntimeError("no compiler\nand more")
        return before(model, lane, *args, **options)

    monkeypatch.setattr(bench_decode, "hf", hf)
    assert run("--lanes", "ours", "hf static", "--parts", "models", "--batches", "1", "--new", "5") == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["models"][0]["left_out"] == {"hf static": "no compiler"}
    assert "  hf static  left out: no compiler" in out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError("9 pages of 64 tokens do not fit")])
def test_a_lane_without_memory_is_told_and_the_others_go_on(error, ids):
    said = ([0.0, 1.0, 2.0, 4.0, 6.0], None, None)
    calls = {"first": lambda *_: said, "second": lambda *_: (_ for _ in ()).throw(error)}
    taken, failed = bench_decode.take_turns(calls, ids, 5, 3, "cpu")
    assert taken == {"first": [2.0] * 3}
    assert [*failed] == ["second"]
    with pytest.raises(ValueError, match="wrong"):
        bench_decode.take_turns({"ours": lambda *_: (_ for _ in ()).throw(ValueError("wrong"))}, ids, 5, 3, "cpu")


def test_between_leaves_out_the_first_tokens():
    assert bench_decode.between([0.0, 9.0, 10.0, 11.0, 12.5]) == pytest.approx(1.25)


def test_long_calls_get_fewer_tokens(ids, monkeypatch):
    counts = []

    def slow(_, new):
        counts.append(new)
        return [float(i) for i in range(new)], None, None

    bench_decode.take_turns({"ours": slow}, ids, 50, 1, "cpu")
    assert counts == [50, bench_decode.FIRST + 2, bench_decode.FIRST + 2]


def test_int8_is_what_quantize_makes(model):
    params = bench_decode.our_params(model)
    assert flatten(params)["layers.0.fc1.weight"].data_ptr() == model.model.decoder.layers[0].fc1.weight.data_ptr()
    cfg = OPTConfig.from_dict(model.config.to_dict())
    arrays = map_leaves(lambda a: a.float().numpy(), params)
    theirs, ours = flatten(quantized(dict(arrays), cfg, "int8")[0]), flatten(bench_decode.in_int8(params))
    assert {name for name in theirs if not name.endswith("columns")} == {*ours}
    assert theirs["layers.0.fc1.weight"].dtype == np.int8
    for name, a in ours.items():
        if name.removesuffix("weight").removesuffix("scale") + "columns" not in theirs:
            np.testing.assert_allclose(a.numpy(), theirs[name], atol=1 if name.endswith("weight") else 0, rtol=1e-3)
    whole, half = (bench_decode.read_bytes(tree) for tree in (bench_decode.in_int8(params), params))
    assert half == sum(2 * a.size for name, a in flatten(arrays).items() if not name.startswith("embed_positions"))
    assert 0.5 < whole / half < 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new", "4"], "--new is 4; it must be at least 5"),
        (["--batches", "0"], "--batches is 0; it must be at least 1"),
        (["--contexts", "2040"], "--contexts 2040 and --new 12: OPT has 2048 positions"),
        (["--sizes", "3b"], "3b"),
        (["--json", "/nowhere/found.json"], "--json /nowhere/found.json: /nowhere is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, capsys):
    assert run(*words) == 1
    assert message in capsys.readouterr().err


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "decode"]) == 1
    assert "finds no GPU; --device cpu tries this command" in capsys.readouterr().err


def test_hf_has_lanes_of_its_own(ids):
    seen = []

    def generate(*_, generation_config, **__):
        seen.append(generation_config.cache_implementation)
        return SimpleNamespace(sequences=ids)

    for lane in ("hf eager", "hf sdpa", "hf static"):
        bench_decode.hf(SimpleNamespace(set_attn_implementation=seen.append, generate=generate), lane, ids, 5)
    assert seen == ["eager", None, "sdpa", None, "sdpa", "static"]
