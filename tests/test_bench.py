"""opt-np bench: its comparisons and its output, on made-up timings, and one small run of everything installed. No timing is tested."""

import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from opt_fast import bench, limits, peers
from opt_np import OPTConfig, checkpoint, cli
from opt_np.config import parameter_shapes
from opt_np.tree import flatten

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
    ("stored", "error", "agree"),
    [
        ("float32", 9e-4, True),
        ("float32", 2e-3, False),
        ("16 bits", 2e-2, True),
        ("16 bits", 4e-2, False),
        ("int8", 4e-2, True),
        ("int8", 6e-2, False),
        ("int4", 0.4, True),
        ("int4", 0.6, False),
    ],
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


def test_tokens_are_equal_or_not_and_in_fewer_bits_not_compared():
    results = {"a": [np.array([5, 70000])], "b": [np.array([5, 70001])]}
    for name in ("decode", "batch-8"):
        with pytest.raises(ValueError, match=f"{name}: a and b differ"):
            bench.check(name, "float32", results)
        for stored in ("16 bits", "int8", "int4"):
            bench.check(name, stored, results)


def test_an_engine_that_is_known_to_be_loose_may_differ_more():
    results = {"ctranslate2 int8": [np.array([1.3])], "numpy float32": [np.array([1.0])]}
    bench.check("step", "int8", results)
    bench.check("step", "int8", dict(reversed(results.items())))
    with pytest.raises(ValueError, match="opt_fast int8 and numpy float32 differ"):
        bench.check("step", "int8", {"opt_fast int8": [np.array([1.3])], **results})


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
    np.testing.assert_array_equal(peers.centred([[logits], [2 * logits]])[0, 0], peers.centred(logits))  # row by row


def test_prompts_that_are_alike_differ_only_in_their_ends():
    (B, P, T), ids = TINY.prefix, peers.Setup(TINY, "", "float32", 1).prompts_alike(0)
    assert ids.shape == (B, P + T)
    assert (ids[:, :P] == ids[0, :P]).all()
    assert not (ids[1:, P:] == ids[0, P:]).all()


class Made:
    """A Worker that computes nothing; `numbers` by engine, and how often it was timed."""

    numbers: dict = {}  # noqa: RUF012
    timed = 0
    checked: list = []  # noqa: RUF012

    def __init__(self, kind, engine, dtype, setup):
        self.engine = engine

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self, name):
        Made.checked.append(name)
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


def test_what_steps_compute_is_checked_for_as_many_rows_as_are_timed(monkeypatch):
    monkeypatch.setattr(bench, "Worker", Made)
    monkeypatch.setattr(bench, "REST", 0)
    Made.checked, Made.numbers = [], {"numpy": [1.0]}
    bench.measure([job("prefill-int8"), job("batch-3-int8")], [("numpy", "float32")], peers.Setup(TINY, "", "float32", 1), 1)
    assert sorted(Made.checked) == ["batch-3", "prefill", "step", "step-3"]


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
    assert bench.lanes("model", "int4", bench.ENGINES) == [("opt_fast", "int4"), ("openvino", "int4"), ("numpy", "float32")]


def test_the_reference_in_float32_does_not_stand_for_int8_alone():
    assert bench.lanes("model", "int8", ["numpy"]) == []
    assert bench.lanes("model", "int8", ["hf", "numpy"]) == []


def test_jobs_that_no_engine_can_do_are_left_out_with_a_word(capsys):
    chosen = bench.choose(bench.all_jobs(TINY), bench.JOBS, ["openvino"])
    every = [job.key for job in bench.all_jobs(TINY) if job.kind == "model"]
    assert [job.key for job in chosen] == every
    assert {"decode", "prefill-16", "batch-2", "batch-3-int8", "decode-int4", "prefix"} < set(every)
    assert "train left out: openvino cannot do that" in capsys.readouterr().err
    with pytest.raises(ValueError, match="openvino cannot do any of train"):
        bench.choose(bench.all_jobs(TINY), ["train"], ["openvino"])


def test_a_word_of_jobs_may_stand_for_several():
    chosen = bench.choose(bench.all_jobs(TINY), ["batch", "batch-int8", "decode-int4"], ["opt_fast"])
    assert [job.key for job in chosen] == ["batch-2", "batch-3", "batch-2-int8", "batch-3-int8", "decode-int4"]
    assert {job.asked_as for job in bench.all_jobs(TINY)} | {"memory"} == set(bench.JOBS)


def test_engines_without_room_in_memory_are_left_out_the_reference_first(monkeypatch, capsys):
    lanes, cfg = bench.lanes("model", "float32", bench.ENGINES), OPTConfig.from_size("1.3b")
    monkeypatch.setattr(bench, "free_memory", lambda: 20e9)
    assert bench.how_many_fit(job("decode"), lanes, cfg) == 3
    assert "decode: ctranslate2 float32, numpy float32 left out, as memory is short" in capsys.readouterr().err
    monkeypatch.setattr(bench, "free_memory", lambda: 2e9)
    with pytest.raises(ValueError, match="needs 6 GB of free memory for opt_fast float32, and 2 are free"):
        bench.how_many_fit(job("decode"), lanes, cfg)


def test_in_int8_a_model_fits_whose_float32_does_not(monkeypatch):
    lanes, cfg = bench.lanes("model", "int8", ["opt_fast", "numpy"]), OPTConfig.from_size("6.7b")
    monkeypatch.setattr(bench, "free_memory", lambda: 20e9)
    assert bench.how_many_fit(job("decode-int8"), lanes, cfg) == 1


# ---- what is told ------------------------------------------------------------------------------------------------------------------------


def test_costs_of_the_smallest_published_model():
    cfg = OPTConfig.from_size("125m")
    assert bench.weights_read(cfg) == 125_239_296 - 2050 * 768
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert bench.forward_flops(cfg, 1024, 1) == 2 * 1024 * matrices + 2 * 50272 * 768 + 12 * 2 * 1024 * 1024 * 768
    by_key = {job.key: job for job in bench.all_jobs(peers.shape("125m"))}
    assert by_key["attention-2048-80"].flops == 2 * 2048 * 2048 * 80 * 32
    assert by_key["attention-2048-80-backward"].flops == 3.5 * by_key["attention-2048-80"].flops
    read = {key: by_key[key].read for key in ("decode", "decode-16", "decode-int8", "decode-int4", "batch-16")}
    assert read["decode"] == 2 * read["decode-16"] == 4 * read["decode-int8"] == 8 * read["decode-int4"] == 4 * 64 * bench.weights_read(cfg)
    assert read["batch-16"] == read["decode"]  # for all rows at once
    assert by_key["batch-16"].flops == 16 * by_key["decode"].flops


def test_tokens_after_others_cost_what_the_whole_costs_more():
    cfg = TINY.cfg
    assert bench.forward_flops(cfg, 24, 1) == bench.forward_flops(cfg, 16, 0) + bench.forward_flops(cfg, 8, 1, past=16)


def test_the_limit_is_what_takes_longer():
    work = bench.Job("batch-9", "model", "int8", "", 1, "tokens/s", 300e9, 10e9)
    assert work.least(CEILINGS) == 3.0
    assert work.least({"matmul": 1e15, "bandwidth": 10e9}) == 1.0


def made_up_result() -> dict:
    seconds = {
        "decode": {"opt_fast float32": [0.1, 0.2, 0.1], "hf float32": [0.2, 0.2, 0.3]},
        "decode-16": {"opt_fast float16": [0.1, 0.1, 0.1], "opt_fast bfloat16": [0.2, 0.2, 0.2], "hf bfloat16": [0.4, 0.4, 0.4]},
    }
    where = {"cpu": "a processor", "vectors": ["avx2"], "threads": 2, "environment": {"OPENBLAS_CORETYPE": "Haswell"}}
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
    assert "set in the environment: OPENBLAS_CORETYPE=Haswell" in lines


def test_variables_that_steer_the_engines_are_recorded(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("HOME", "/nowhere")
    found = bench.machine(2)["environment"]
    assert found["OPENBLAS_CORETYPE"] == "Haswell"
    assert "HOME" not in found


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


def test_what_was_measured_is_told_where_engines_disagree_elsewhere(hasty, capsys, monkeypatch):
    """Minutes of other jobs are not lost; the status says that something is wrong."""

    def measure(jobs, those, *_):
        if jobs[0].kind == "train":
            raise bench.Disagreement("train: a and b differ by 2, 1 is allowed; it was not timed")
        return {job.key: {"numpy float32": [1.0]} for job in jobs}

    monkeypatch.setattr(bench, "measure", measure)
    assert run("--engines", "numpy", "--jobs", "attention", "train") != 0
    out, err = capsys.readouterr()
    assert list(json.loads(out.splitlines()[-1])["jobs"]) == [job.key for job in bench.all_jobs(TINY) if job.kind == "attention"]
    assert err.splitlines()[-1].endswith("train: a and b differ by 2, 1 is allowed; it was not timed")


def test_gradients_are_compared_as_a_whole():
    """A single one may be there or not: relu's input was nearly 0."""
    numbers = np.ones(10**6)
    found = numbers.copy()
    found[7] = 1.5
    bench.check("train", "float32", {"a": [found], "b": [numbers]})
    with pytest.raises(bench.Disagreement, match="a and b differ"):
        bench.check("decode", "float32", {"a": [found], "b": [numbers]})
    with pytest.raises(bench.Disagreement, match="a and b differ"):
        bench.check("train", "float32", {"a": [numbers * 1.01], "b": [numbers]})


def test_a_small_run_of_every_engine_that_is_here(hasty, capsys):
    """Where torch is here it ends with HF checked against the reference; with the extra `bench`, with all five."""
    engines = [name for name in bench.ENGINES if bench.installed(name)]
    if not find_spec("torch"):
        assert engines == ["opt_fast", "numpy"]
    assert run("--jobs", "decode", "prefill", "short", "batch", "prefix") == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    for key in ("decode", "prefill", "short", "batch-2", "batch-3", "prefix"):
        assert list(result["jobs"][key]["seconds"]) == [f"{name} float32" for name in engines]
        assert list(result["jobs"][key]["ratio"]["opt_fast float32"]) == [f"{name} float32" for name in engines[1:]]
    assert "numpy float32 agree; timing decode, prefill, short, batch-2, batch-3, prefix" in err


def test_weights_are_written_in_shards_of_float16_that_everyone_reads(tmp_path):
    bench.write_weights(TINY.cfg, tmp_path)
    params, cfg = checkpoint.load(tmp_path, dtype=None)
    flat = flatten(params)
    assert cfg.hidden_size == TINY.cfg.hidden_size
    assert {a.dtype for a in flat.values()} == {np.dtype(np.float16)}
    assert all(a.std() > 0.01 for a in flat.values())
    assert len(list(tmp_path.glob("*.safetensors"))) == TINY.cfg.num_hidden_layers + 4


def test_int4_has_groups_of_one_size_in_every_engine(tmp_path):
    bench.write_weights(TINY.cfg, tmp_path)
    own, make = peers.CONVERTERS["opt_fast"]
    make(str(tmp_path), own)
    kinds = {dtype: checkpoint.load(tmp_path / f"opt_fast-{dtype}", dtype=None)[1].quantized for dtype in own}
    assert kinds == {"int8": ("int8", None), "int4": ("int4", peers.INT4_GROUP)}


def test_a_small_run_in_whole_numbers(hasty, capsys):
    """Ours against the reference; with the extra `bench`, against OpenVINO's and CTranslate2's too."""
    engines = [name for name in ("opt_fast", "openvino", "ctranslate2") if bench.installed(name)]
    assert run("--jobs", "decode-int8", "batch-int8", "decode-int4") == 0
    out, err = capsys.readouterr()
    jobs = json.loads(out.splitlines()[-1])["jobs"]
    assert list(jobs["batch-3-int8"]["seconds"]) == [f"{name} int8" for name in engines] + ["numpy float32"]
    assert "opt_fast int4" in jobs["decode-int4"]["seconds"]
    assert "numpy float32 agree; timing decode-int8, batch-2-int8, batch-3-int8" in err
    assert "int8 and int4: each engine quantises in its own way" in out


def test_a_small_run_in_16_bits(hasty, capsys):
    assert run("--engines", "opt_fast", "--jobs", "decode-16") == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out.splitlines()[-1])["jobs"]["decode-16"]["seconds"]) == ["opt_fast float16", "opt_fast bfloat16"]
    assert "opt_fast float16, opt_fast bfloat16 agree; timing decode-16" in err
