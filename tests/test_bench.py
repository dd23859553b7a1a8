"""opt-np bench: what is compared and told, on made-up numbers, and one small run of all that is installed. No time is judged."""

import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from opt_fast import bench, limits, peers
from opt_np import OPTConfig, cli
from opt_np.config import parameter_shapes

CEILINGS = {"bandwidth": 10e9, "matmul": 100e9}
TINY = peers.shape("tiny")


@pytest.fixture
def hasty(monkeypatch):
    """No limits, no repeats, no rest: a run takes no longer than its processes need to start."""
    monkeypatch.setattr(limits, "measure", lambda threads: CEILINGS)
    monkeypatch.setattr(bench, "BUDGET", 1e-9)
    monkeypatch.setattr(bench, "REST", 0)


def job(key: str) -> bench.Job:
    return next(job for job in bench.all_jobs(TINY) if job.key == key)


def run(*words: str) -> int:
    return cli.main(["bench", "cpu", "--size", "tiny", "--rounds", "1", "--threads", "1", *words])


# ---- what is compared --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "error", "agree"), [("float32", 9e-4, True), ("float32", 2e-3, False), ("16 bits", 2e-2, True), ("16 bits", 4e-2, False)]
)
def test_numbers_may_differ_by_a_share_of_the_largest(stored, error, agree):
    results = {"a float32": [np.ones(3), np.array([1.0, -100 * (1 + error)])], "b float32": [np.ones(3), np.array([1.0, -100.0])]}
    if agree:
        bench.check("prefill", stored, results)
    else:
        with pytest.raises(ValueError, match="a float32 and b float32 differ"):
            bench.check("prefill", stored, results)


def test_each_array_is_compared_by_its_own_largest():
    with pytest.raises(ValueError, match="differ"):
        bench.check("train", "float32", {"a": [np.array([1e6]), np.array([0.002])], "b": [np.array([1e6]), np.array([0.001])]})


def test_tokens_are_equal_or_not_and_in_16_bits_not_compared():
    results = {"a": [np.array([5, 70000])], "b": [np.array([5, 70001])]}
    with pytest.raises(ValueError, match="decode: a and b differ"):
        bench.check("decode", "float32", results)
    bench.check("decode", "16 bits", results)


@pytest.mark.parametrize(
    ("found", "agree"),
    [
        ([peers.UNTOLD, 2.0], True),
        ([peers.UNTOLD, 2.1], False),
        ([peers.UNTOLD, peers.UNTOLD], False),
        ([1.0, np.inf], False),
        ([np.nan, 2.0], False),
        ([1.0], False),
    ],
)
def test_what_an_engine_does_not_tell_is_not_compared_but_something_must_be(found, agree):
    results = {"a": [np.array(found)], "b": [np.array([1.0, 2.0])]}
    if agree:
        bench.check("prefill", "float32", results)
    else:
        with pytest.raises(ValueError, match="differ"):
            bench.check("prefill", "float32", results)


def test_centred_logits_equal_log_probabilities_but_for_the_size_of_the_vocabulary():
    logits = np.random.default_rng(0).normal(3, 5, 50)
    log_p = logits - np.logaddexp.reduce(logits)
    np.testing.assert_allclose(peers.centred(logits), log_p + np.log(50), atol=1e-5)


class Made:
    """A Worker that computes nothing; `numbers` by engine, and how often it was timed."""

    numbers: dict = {}  # noqa: RUF012
    timed = 0

    def __init__(self, kind, engine, dtype, setup):
        self.engine = engine

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self, name):
        return [np.array(Made.numbers[self.engine])]

    def time(self, name, seed):
        Made.timed += 1
        return 0.5


def test_a_mismatch_aborts_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(bench, "Worker", Made)
    monkeypatch.setattr(bench, "REST", 0)
    lanes, setup = [("hf", "float32"), ("numpy", "float32")], peers.Setup(TINY, "", "float32", 1)
    Made.timed, Made.numbers = 0, {"hf": [1.0, 2.0], "numpy": [1.0, 2.1]}
    with pytest.raises(ValueError, match="prefill: hf float32 and numpy float32 differ"):
        bench.measure([job("prefill")], lanes, setup, 3)
    assert Made.timed == 0
    Made.numbers["hf"] = [1.0, 2.1]
    assert bench.measure([job("prefill")], lanes, setup, 3) == {"prefill": {"hf float32": [0.5] * 3, "numpy float32": [0.5] * 3}}
    assert Made.timed == 6


# ---- who takes part ----------------------------------------------------------------------------------------------------------------------


def test_a_missing_engine_is_left_out_with_a_word(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "ctranslate2" else SimpleNamespace())
    assert [name for name in bench.ENGINES if bench.installed(name)] == ["opt_fast", "openvino", "hf", "numpy"]
    assert capsys.readouterr().err == "bench: ctranslate2 is left out: ctranslate2 cannot be imported; pip install 'opt-np[bench]' brings it\n"


def test_without_any_engine_there_is_nothing_to_do(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert run("--engines", "hf", "openvino") == 1
    assert "none of the engines is here" in capsys.readouterr().err


def test_lanes_begin_with_ours_and_end_with_the_reference():
    assert bench.lanes("attention", "float32", bench.ENGINES) == [(name, "float32") for name in ("opt_fast", "hf", "numpy")]
    assert [engine for engine, _ in bench.lanes("model", "float32", bench.ENGINES)] == list(bench.ENGINES)
    assert bench.lanes("model", "16 bits", ["opt_fast", "numpy"]) == [("opt_fast", "float16"), ("opt_fast", "bfloat16")]


def test_jobs_that_no_engine_can_do_are_left_out_with_a_word(capsys):
    chosen = bench.choose(bench.all_jobs(TINY), bench.JOBS, ["openvino"])
    assert [job.key for job in chosen] == ["decode", "prefill", "decode-16", "prefill-16"]
    assert "train left out: openvino cannot do that" in capsys.readouterr().err
    with pytest.raises(ValueError, match="openvino cannot do any of train"):
        bench.choose(bench.all_jobs(TINY), ["train"], ["openvino"])


def test_engines_without_room_in_memory_are_left_out_the_reference_first(monkeypatch, capsys):
    lanes, cfg = bench.lanes("model", "float32", bench.ENGINES), OPTConfig.from_size("1.3b")
    monkeypatch.setattr(bench, "free_memory", lambda: 20e9)
    assert bench.how_many_fit(job("decode"), lanes, cfg) == 3
    assert "decode: ctranslate2 float32, numpy float32 left out, as memory is short" in capsys.readouterr().err
    monkeypatch.setattr(bench, "free_memory", lambda: 2e9)
    with pytest.raises(ValueError, match="needs 6 GB of free memory for each engine, and 2 are free"):
        bench.how_many_fit(job("decode"), lanes, cfg)


# ---- what is told ------------------------------------------------------------------------------------------------------------------------


def test_costs_of_the_smallest_published_model():
    cfg = OPTConfig.from_size("125m")
    assert bench.weights_read(cfg) == 125_239_296 - 2050 * 768
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert bench.forward_flops(cfg, 1024, 1) == 2 * 1024 * matrices + 2 * 50272 * 768 + 12 * 2 * 1024 * 1024 * 768
    by_key = {job.key: job for job in bench.all_jobs(peers.shape("125m"))}
    assert by_key["attention-2048-80"].cost == 2 * 2048 * 2048 * 80 * 32
    assert by_key["attention-2048-80-backward"].cost == 3.5 * by_key["attention-2048-80"].cost
    assert by_key["decode"].cost == 2 * by_key["decode-16"].cost == 4 * 64 * bench.weights_read(cfg)


def made_up_result() -> dict:
    seconds = {
        "decode": {"opt_fast float32": [0.1, 0.2, 0.1], "hf float32": [0.2, 0.2, 0.3]},
        "decode-16": {"opt_fast float16": [0.1, 0.1, 0.1], "opt_fast bfloat16": [0.2, 0.2, 0.2], "hf bfloat16": [0.4, 0.4, 0.4]},
    }
    where = {"cpu": "a processor", "vectors": ["avx2"], "threads": 2}
    memory = {"hf float32": {"least": 100e6, "grown": 150e6, "peak": 160e6, "ratio": 1.5}}
    jobs = bench.summary([job("decode"), job("decode-16")], seconds, CEILINGS)
    return {"size": "tiny", "rounds": 3, "machine": where, "limits": CEILINGS, "jobs": jobs, "memory": memory}


def test_ratios_are_those_of_the_same_round_and_shares_those_of_the_limit():
    jobs = made_up_result()["jobs"]
    assert jobs["decode"]["ratio"] == {"opt_fast float32": {"hf float32": pytest.approx((2.0, 1.0, 3.0))}}
    assert {ours: by["hf bfloat16"][0] for ours, by in jobs["decode-16"]["ratio"].items()} == {"opt_fast float16": 4.0, "opt_fast bfloat16": 2.0}
    least = 4 * 8 * bench.weights_read(TINY.cfg) / 10e9
    assert jobs["decode"]["limit_seconds"] == pytest.approx(least)
    assert jobs["decode"]["percent_of_limit"]["hf float32"] == pytest.approx(100 * least / 0.2)


def test_without_ours_the_first_is_the_measure():
    found = bench.summary([job("decode")], {"decode": {"hf float32": [1.0], "numpy float32": [3.0]}}, CEILINGS)
    assert found["decode"]["ratio"] == {"hf float32": {"numpy float32": (3.0, 3.0, 3.0)}}


def test_the_table():
    lines = bench.table(made_up_result(), [job("decode"), job("decode-16")])
    assert lines[0] == "opt-tiny shape, random weights, 2 threads of a processor"
    (line,) = [line for line in lines if line.startswith("  hf float32") and "tokens/s" in line]
    assert line.split()[2:7] == ["40.0", "tokens/s", "(26.7", "to", "40.0)"]
    assert line.endswith("opt_fast float32 is 2.00 (1.00 to 3.00) x as fast")
    assert lines[-1].split() == ["hf", "float32", "150", "MB", "(peak", "160)", "1.50", "x"]
    assert any("no bfloat16 products" in line for line in lines)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    bench.draw(str(tmp_path / "ratios.svg"), made_up_result(), [job("decode"), job("decode-16")])
    assert "hf bfloat16 / opt_fast float16" in (tmp_path / "ratios.svg").read_text()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--size", "9b"], 2, "invalid choice: '9b'"),
        (["--jobs", "sleep"], 2, "invalid choice: 'sleep'"),
        (["--engines", "numpy", "abacus"], 2, "invalid choice: 'abacus'"),
        (["--rounds", "0"], 1, "--rounds is 0; it must be at least 1"),
        (["--threads", "-1"], 1, "--threads is -1; it must be at least 1"),
        (["--plot", "/nowhere/plot.png"], 1, "--plot /nowhere/plot.png: it needs"),
        (["--engines", "openvino", "--jobs", "train"], 1, "cannot do any of train"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, status, told, capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: SimpleNamespace())
    try:
        found = cli.main(["bench", "cpu", *words])
    except SystemExit as error:
        found = error.code
    *_, last = capsys.readouterr().err.splitlines()
    assert found == status
    assert told in last


# ---- processes ---------------------------------------------------------------------------------------------------------------------------


def test_limits_are_measured_in_processes_of_their_own():
    before = dict(os.environ)
    assert all(value > 1e6 for value in limits.measure(1, read=2**20, width=64).values())
    assert limits.alone(3, os.getenv, "OMP_NUM_THREADS") == "3"
    assert os.environ == before


def test_an_engine_that_fails_is_named(capfd):
    with pytest.raises(ValueError, match="numpy float32 stopped, at loading; its error is above"):
        bench.Worker("model", "numpy", "float32", peers.Setup(TINY, "/nowhere", "float32", 1))
    assert "/nowhere" in capfd.readouterr().err


def test_a_small_run_of_the_reference_alone(hasty, capsys):
    assert run("--engines", "numpy", "--jobs", "attention", "train", "memory") == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert list(result["jobs"]) == [job.key for job in bench.all_jobs(TINY) if job.kind in ("attention", "train")]
    assert all(len(found["seconds"]["numpy float32"]) == 1 for found in result["jobs"].values())
    assert result["limits"] == CEILINGS
    stored = 4 * sum(int(np.prod(shape)) for shape in parameter_shapes(TINY.cfg).values())
    assert result["memory"]["numpy float32"]["least"] > stored
    assert "numpy float32 is alone, and not checked" in err


def test_a_small_run_of_every_engine_that_is_here(hasty, capsys):
    """Where torch is here it ends with HF checked against the reference; with the extra `bench`, with all five."""
    engines = [name for name in bench.ENGINES if bench.installed(name)]
    if not find_spec("torch"):
        assert engines == ["opt_fast", "numpy"]
    assert run("--jobs", "decode", "prefill") == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    for key in ("decode", "prefill"):
        assert list(result["jobs"][key]["seconds"]) == [f"{name} float32" for name in engines]
        assert list(result["jobs"][key]["ratio"]["opt_fast float32"]) == [f"{name} float32" for name in engines[1:]]
    assert "numpy float32 agree; timing decode, prefill" in err


def test_a_small_run_in_16_bits(hasty, capsys):
    assert run("--engines", "opt_fast", "--jobs", "decode-16") == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out.splitlines()[-1])["jobs"]["decode-16"]["seconds"]) == ["opt_fast float16", "opt_fast bfloat16"]
    assert "opt_fast float16, opt_fast bfloat16 agree; timing decode-16" in err
