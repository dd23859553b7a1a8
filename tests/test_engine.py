"""The engine: rows share pages and none leaks, and a request's output has the same bits as alone, whatever else is running."""

import bisect
import dataclasses
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numba
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from opt_fast import attention_cpu, engine, machine_cpu, ops_cpu
from opt_fast.engine import Engine, Reader
from opt_fast.kernel import BYTES
from opt_fast.machine_cpu import Machine, Pages
from opt_fast.paged_cache import PAGE, Full, Row
from opt_fast.program_cpu import Program
from opt_np import OPTForCausalLM, generate
from opt_np.reader import Reader as PlainReader
from opt_np.reader import Reading

CFG = small.config(max_position_embeddings=5 * PAGE - 10)
PARAMS = small.params(CFG)
LM, NUMPY = (OPTForCausalLM(PARAMS, CFG, backend=backend) for backend in ("cpu", "numpy"))
TALKS = small.config(max_position_embeddings=5 * PAGE - 10, tie_word_embeddings=False)  # where the head is tied, it says one token for ever
NO_EOS = {"eos_token_id": []}


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(4, CFG.vocab_size, (1, length))


def paged(params=LM.params, dtype="float32", first=0):
    return Reader(Machine(params, CFG, Pages(CFG, 0, dtype)), first)


def run(e):
    """Rounds until nothing is left to do; after each, no page is lost or held twice."""
    rounds = 0
    while e.step():
        rounds += 1
        e.pool.check(row for handle in (*e.running, *e.waiting) for row in handle.reader.rows)
    e.pool.check()
    assert e.pool.available == len(e.pool.counts)
    return rounds


def same_steps(ours, alone):
    for a, b in zip(ours, alone, strict=True):
        assert [*a.ids] == [*b.ids]
        assert [*a.finished] == [*b.finished]
        assert [*a.logprobs] == [*b.logprobs]
        assert [*a.entropies] == [*b.entropies]
        assert a.text == b.text


# ---- pages -------------------------------------------------------------------------------------------------------------------------------


def marks(text):
    """A number for each token that depends on all the text up to it, as its keys do."""
    return np.cumsum(text * (np.arange(len(text)) ** 2 % 97 + 1)).astype(np.float32)


class PoolMachine(RuleBasedStateMachine):
    """Rows come, grow, fork and go, over few pages; marks are written where their keys would be, so that a page used twice shows."""

    def __init__(self):
        super().__init__()
        self.pool, self.rows = Pages(small.config(max_position_embeddings=4 * PAGE), 9), []

    @rule(kinds=st.lists(st.sampled_from([5, 6]), min_size=4, max_size=4), cut=st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 4 * PAGE]))
    def begin(self, kinds, cut):
        row = Row(self.pool)
        row.text = np.repeat(kinds, PAGE)[:cut]
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0), most=st.sampled_from([1, 2, PAGE - 1, PAGE, 3 * PAGE]), adopt=st.booleans(), fails=st.booleans())
    def grow(self, i, most, adopt, fails):
        row = self.rows[i % len(self.rows)]
        if adopt:
            row.adopt()
        count = min(row.left, most)
        lacks = row.lacks(count)
        try:
            row.reserve(count)
        except Full:
            assert lacks > 0 == self.pool.available
            return
        if fails:
            return
        self.pool.keys.reshape(len(self.pool.keys), -1)[:, row.slots(count)] = marks(row.text)[row.length : row.length + count]
        row.wrote(count)

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0), token=st.sampled_from([5, 6, 7]))
    def say(self, i, token):
        row = self.rows[i % len(self.rows)]
        row.text = np.append(row.text, token)[: 4 * PAGE]

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0))
    def fork(self, i):
        row = self.rows[i % len(self.rows)]
        self.rows += [] if row.left else [row.fork()]

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0), forget=st.booleans())
    def end(self, i, forget):
        row = self.rows[i % len(self.rows)]
        row.release()
        if forget:
            self.rows.remove(row)

    @invariant()
    def nothing_leaks(self):
        self.pool.check(self.rows)

    @invariant()
    def every_row_finds_what_it_wrote(self):
        keys = self.pool.keys[1].reshape(-1)
        for row in self.rows:
            at = np.arange(row.length)
            assert (keys[row.places[at // PAGE] + at % PAGE * self.pool.step] == marks(row.text)[: row.length]).all()

    @invariant()
    def known_pages_are_those_of_their_text(self):
        texts = {0: np.empty(0, np.int64)}
        for page, (name, (before, ids)) in sorted(self.pool.labels.items(), key=lambda label: label[1][0]):
            if before in texts:
                texts[name] = np.append(texts[before], np.frombuffer(ids, np.int64))
                assert (self.pool.keys[0, page, 0, :, 0] == marks(texts[name])[-PAGE:]).all()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_copy_that_is_broken_off_keeps_no_page(monkeypatch):
    pool = Pages(CFG, 3)
    row = Row(pool)
    row.text = np.arange(4, 9)
    row.reserve(5)
    row.wrote(5)
    other = row.fork()
    with monkeypatch.context() as patch:
        patch.setattr(pool, "copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            other.reserve(1)
    pool.check([row, other])
    assert pool.available == 2
    other.reserve(1)
    pool.check([row, other])


@pytest.mark.parametrize(("name", "bits"), [("float16", np.int16), ("bfloat16", np.uint16)])
def test_numbers_are_stored_in_16_bits_as_numpy_rounds_them(name, bits):
    """Subnormal, halfway between two, too large, infinite, NaN."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**32, 40000, np.uint32).view(np.float32)
    halves = np.arange(0, 0x7C00, 3).astype(np.uint16).view(np.float16).astype(np.float32)
    grid = (halves[:, None] * np.float32([1, 1 + 2**-11, 1 + 2**-12])).ravel()
    special = np.float32([0, -0.0, 65504, 65519.99, 65520, -1e9, np.inf, -np.inf, np.nan, 2**-24, 2**-25, 3 * 2**-26, 2**-14, 3.4e38])
    x = np.concatenate([some, grid, special])[:, None]
    kept = np.empty((2, len(x)), bits)
    attention_cpu.write(x, -x, *kept, np.arange(len(x)), apart=1)
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    with np.errstate(over="ignore", invalid="ignore"):
        for ours, exact in zip(kept.view(dtype), (x[:, 0], -x[:, 0]), strict=True):
            np.testing.assert_array_equal(ours.astype(np.float32), exact.astype(dtype).astype(np.float32))


# ---- one reader --------------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]), program=st.booleans())
@settings(max_examples=25)
def test_rows_over_pages_have_the_bits_that_they_have_alone(data, dtype, program):
    """Any batch, cut anywhere, forked and reordered; 16-bit keys and values have the same bits among themselves."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    N, T = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 9, PAGE, PAGE + 1, 2 * PAGE + 3]))
    ids = rng.integers(4, CFG.vocab_size, (N, T))
    ids[rng.integers(N), : T // 2] = ids[0, : T // 2]  # rows may begin alike
    mask = (np.arange(T) >= rng.integers(0, T, N)[:, None] * data.draw(st.integers(0, 1))).astype(np.int64)
    copies, reader = data.draw(st.integers(1, 3)), paged(dtype=dtype)
    reader.machine.__dict__["has_programs"] = program
    ids, mask = np.repeat(ids, copies, 0), np.repeat(mask, copies, 0)
    _, logits = reader(Reading(ids, mask, copies))
    for grown in data.draw(st.lists(st.sampled_from([1, 1, 2, PAGE]), max_size=4)):
        rows = rng.integers(0, len(ids), data.draw(st.integers(1, 5)))
        reader.reorder(rows)
        reader.machine.pool.check(reader.rows)
        ids = np.concatenate([ids[rows], rng.integers(4, CFG.vocab_size, (len(rows), grown))], axis=1)
        mask = np.concatenate([mask[rows], np.ones((len(rows), grown), np.int64)], axis=1)
        _, logits = reader(Reading(ids, mask))
    for row, seen, ours in zip(ids, mask, logits, strict=True):
        text = row[seen != 0][None]
        alone = LM(text).logits[:, -1] if dtype == "float32" else paged(dtype=dtype)(Reading(text, np.ones_like(text)))[1]
        np.testing.assert_array_equal(ours, alone[0])


def tokens_read(monkeypatch):
    """How many tokens each pass reads."""
    read, before = [], Machine.read
    monkeypatch.setattr(Machine, "read", lambda self, pieces: read.append(sum(count for _, count in pieces)) or before(self, pieces))
    return read


def test_what_prompts_have_in_common_is_read_once(monkeypatch):
    read, common = tokens_read(monkeypatch), prompt(2 * PAGE + 5)
    ids = np.concatenate([np.repeat(common, 3, 0), np.arange(30).reshape(3, 10) + 4], axis=1)
    LM.generate(ids, max_new_tokens=1)
    assert sum(read) == ids.shape[1] + 2 * (ids.shape[1] - 2 * PAGE)
    assert len(read) == 2  # the second and third wait for what the first reads
    read.clear()
    LM.generate(common, max_new_tokens=3, num_return_sequences=4, do_sample=True, **NO_EOS)
    assert read == [2 * PAGE + 5, 4, 4]


def test_a_later_request_takes_the_pages_of_an_earlier_one_while_they_are_there(monkeypatch):
    read, e, ids = tokens_read(monkeypatch), Engine(LM, pages=8), prompt(2 * PAGE)
    for length, expected in ((PAGE + 1, [PAGE + 1]), (2 * PAGE, [PAGE]), (2 * PAGE, [PAGE])):  # the last token is always read
        read.clear()
        np.testing.assert_array_equal(e.result(e.submit(ids[:, :length], max_new_tokens=1)), LM.generate(ids[:, :length], max_new_tokens=1))
        assert read[:1] == expected
    e.result(e.submit(prompt(4 * PAGE, seed=1), max_new_tokens=1))  # needs the pages of others
    e.result(e.submit(prompt(4 * PAGE, seed=2), max_new_tokens=1))
    read.clear()
    e.result(e.submit(ids, max_new_tokens=1))
    assert read[:1] == [2 * PAGE]


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"penalty_alpha": 0.6, "top_k": 4}, {"do_sample": True, "seed": 1},
                                     {"overflow": "slide"}, {"overflow": "truncate_left"},
                                     {"overflow": "slide", "penalty_alpha": 0.6, "top_k": 4}], ids=str)  # fmt: skip
def test_generate_over_pages_is_that_of_numpy(options):
    length = CFG.max_position_embeddings - 4 if "overflow" in options else PAGE - 3
    ids = np.concatenate([prompt(length), prompt(length, seed=1)])
    mask = (np.arange(length) >= [[0], [7]]).astype(np.int64)
    ours, numpys = (lm.generate(ids, attention_mask=mask, max_new_tokens=8, **NO_EOS, **options) for lm in (LM, NUMPY))
    np.testing.assert_array_equal(ours, numpys)


def test_the_last_block_goes_on_with_the_tokens_asked_for_alone(monkeypatch):
    """One of each text that is read to its end, and all whose hidden states are wanted: else keys and values are enough."""
    runs, before, e = [], Program.run, Engine(LM, chunk=2 * PAGE)
    monkeypatch.setattr(Program, "run", lambda self, x, *rest: runs.append(len(x)) or before(self, x, *rest))
    handles = [e.submit(prompt(length, seed=length), max_new_tokens=1) for length in (PAGE + 3, 3 * PAGE + 5, 9)]
    while e.step():
        pass
    assert runs == [PAGE + 3 + 9, 2, 2 * PAGE, PAGE + 5, 1]
    for handle in handles:
        e.result(handle)
    runs.clear()
    LM.generate(prompt(30), max_new_tokens=1)
    assert runs == [30, 1]
    runs.clear()
    LM.generate(prompt(31), max_new_tokens=1, penalty_alpha=0.5, top_k=2)
    assert runs[:2] == [31, 31]


def test_keys_and_values_alone_have_memory_of_their_own():
    """Whichever of them needs more, as weights of another kind may."""
    layers = ops_cpu.pack(small.params(CFG))["layers"][-1:]
    for name, most in (("k_proj", 10**5), ("v_proj", 10**6)):
        layers[0]["self_attn"][name]["weight"].needed = lambda M, most=most: most
    for rest, lines in ((True, (2, 3)), (False, (1, 2))):  # after LayerNorm, and q
        program = Program(layers, CFG, 9, np.dtype(np.float32), paged().machine.way, rest=rest)
        assert all(program.tables[line, BYTES] >= 4 * least for line, least in zip(lines, (10**5, 10**6), strict=True))


def test_hidden_states_are_those_of_the_plain_reader_also_past_the_context():
    """There all is read again, and all of it is given back."""
    most, rows = CFG.max_position_embeddings, (paged(), PlainReader(LM.params, CFG, ops_cpu, 0))
    ids, mask = np.concatenate([prompt(most + 2), prompt(most + 2, seed=1)]), np.arange(most + 2) >= [[0], [7]]
    for end in (most - 3, most - 1, most, most + 1, most + 2):
        reading = Reading(ids[:, :end], mask[:, :end].astype(np.int64), hidden=True)
        (h, logits), (h_, logits_) = (reader(reading) for reader in rows)
        assert h.shape == h_.shape
        np.testing.assert_array_equal(logits, logits_)
        real = mask[:, end - h.shape[1] : end]
        np.testing.assert_array_equal(h[real], h_[real])


def test_contrastive_search_sees_the_hidden_states_of_what_rows_have_in_common():
    ids = np.concatenate([np.repeat(prompt(PAGE + 9), 2, 0), [[5, 6], [7, 8]]], axis=1)
    options = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 6, **NO_EOS}
    np.testing.assert_array_equal(LM.generate(ids, **options), NUMPY.generate(ids, **options))


def test_layers_that_come_and_go_are_read_without_a_program():
    class Layers:
        def __init__(self, layers):
            self.layers = layers

        def __iter__(self):
            return iter(self.layers)

    reader, ids = paged(LM.params | {"layers": Layers(LM.params["layers"])}), prompt(9)
    assert not reader.machine.has_programs
    for end in (8, 9):
        np.testing.assert_array_equal(reader(Reading(ids[:, :end], np.ones((1, end), np.int64)))[1], LM(ids[:, :end]).logits[:, -1])


# ---- several tokens before Python looks --------------------------------------------------------------------------------------------------


def in_kernels(monkeypatch, rows=None):
    """How many tokens each call of a program reads, and of how many rows."""
    read, before = [], Program.steps
    monkeypatch.setattr(Program, "steps", lambda self, *arguments: note(read, rows, before(self, *arguments)))
    return read


def note(read, rows, found):
    read.append(len(found[0]))
    if rows is not None:
        rows.append(found[0].shape[1])
    return found


def test_greedy_search_reads_several_tokens_at_once_to_where_a_page_or_the_text_ends(monkeypatch):
    read = in_kernels(monkeypatch)
    OPTForCausalLM(PARAMS, CFG, backend="cpu").generate(prompt(PAGE - 20), max_new_tokens=37, **NO_EOS)
    assert read == [1, 8, 8, 3, 8, 8]  # the first of them is not known to be guessed
    read.clear()
    OPTForCausalLM(PARAMS, CFG, backend="cpu").generate(prompt(PAGE - 20), max_new_tokens=9, do_sample=True, temperature=0.01, **NO_EOS)
    assert read == [1] * 8  # though all of them are guessed
    read.clear()
    OPTForCausalLM(PARAMS, CFG, backend="cpu").generate(np.repeat(prompt(5), 30, 0), max_new_tokens=10, **NO_EOS)
    assert read == [1, 4, 4]  # of many rows fewer
    longest = CFG.max_position_embeddings
    read.clear()
    OPTForCausalLM(PARAMS, CFG, backend="cpu").generate(prompt(longest - 4), max_new_tokens=5, **NO_EOS)
    assert read == [1, 3]


def test_nothing_is_read_beyond_an_end(monkeypatch):
    ours, numpys = (OPTForCausalLM(small.params(TALKS), TALKS, backend=backend) for backend in ("cpu", "numpy"))
    text = ours.generate(prompt(9), max_new_tokens=30, **NO_EOS)[0, 9:].tolist()
    n = next(i for i, token in enumerate(text) if i > 2 and token not in text[:i])
    assert n < 9  # among those that are read at once
    read = in_kernels(monkeypatch)
    assert ours.generate(prompt(9), max_new_tokens=30, eos_token_id=text[n])[0, 9:].tolist() == text[: n + 1]
    assert sum(read) == n
    read.clear()  # an end that is best, and is not allowed yet: the text goes on with another token
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "eos_token_id": text[n]}
    np.testing.assert_array_equal(ours.generate(prompt(9), **options), numpys.generate(prompt(9), **options))
    assert sum(read) == 29


def test_big_models_read_fewer_tokens_at_once(monkeypatch):
    read = in_kernels(monkeypatch)
    for bytes_, most in ((0, 1), (3, 3), (100, 8)):
        monkeypatch.setattr(machine_cpu, "AT_ONCE", bytes_ * sum(leaf.nbytes for leaf in machine_cpu.leaves(LM.params)))
        read.clear()
        OPTForCausalLM(PARAMS, CFG, backend="cpu").generate(prompt(5), max_new_tokens=30, **NO_EOS)
        assert max(read) == most


@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 24, "do_layer_norm_before": False}, {"tie_word_embeddings": True}], ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_steps_are_the_same_however_many_are_read_at_once(changes, data):
    cfg = dataclasses.replace(TALKS, **changes)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    N, T, new = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 7, PAGE - 3, 2 * PAGE])), data.draw(st.integers(1, 70))
    ids = rng.integers(4, cfg.vocab_size, (N, T))
    mask = (np.arange(T) >= rng.integers(0, T, N)[:, None] * data.draw(st.integers(0, 1))).astype(np.int64)
    one, many = (OPTForCausalLM(small.params(cfg), cfg, backend="cpu") for _ in range(2))
    ends: list[int] = []
    for _ in range(2):  # then with an end that comes
        options = {
            "attention_mask": mask,
            "max_new_tokens": new,
            "eos_token_id": ends,
            "min_new_tokens": data.draw(st.sampled_from([None, min(5, new)])),
        }
        found = []
        for lm, ahead in ((one, 1), (many, 8)):
            with mock.patch.object(machine_cpu, "AHEAD", ahead):
                found.append([(step.ids.tolist(), step.finished.tolist(), step.logits) for step in lm.stream(ids, **options)])
        for (*said, logits), (*said_, logits_) in zip(*found, strict=True):
            assert said == said_
            np.testing.assert_array_equal(logits, logits_)
        ends = [data.draw(st.sampled_from([token for tokens, *_ in found[0] for token in tokens]))]


def test_requests_that_were_read_ahead_read_together_with_one_that_comes(monkeypatch):
    """However they were cut: what was read ahead is said first, and then all go on at once."""
    rows, e = [], Engine(LM)
    read = in_kernels(monkeypatch, rows)
    first = [e.submit(prompt(5 + i), max_new_tokens=60, **NO_EOS) for i in range(2)]
    while len(first[0].new) < 12:
        e.step()
    assert max(read) == 8
    assert set(rows) == {2}
    second = e.submit(prompt(9), max_new_tokens=40, **NO_EOS)
    rows.clear()
    while not second.done:
        e.step()
    assert set(rows) == {3}
    run(e)
    for handle, length, new in ((first[0], 5, 60), (first[1], 6, 60), (second, 9, 40)):
        np.testing.assert_array_equal(e.result(handle), LM.generate(prompt(length), max_new_tokens=new, **NO_EOS))


def test_requests_with_ends_of_their_own_are_not_read_ahead(monkeypatch):
    read, e = in_kernels(monkeypatch), Engine(LM)
    handles = [e.submit(prompt(5), max_new_tokens=10, eos_token_id=end) for end in (4, 5)]
    run(e)
    assert all(handle.done for handle in handles)
    assert set(read) == {1}


def test_whoever_waits_for_a_turn_is_not_overtaken(monkeypatch):
    read, e = in_kernels(monkeypatch), Engine(LM, max_batch=2)
    handles = [e.submit(prompt(5 + i), max_new_tokens=30, **NO_EOS) for i in range(3)]
    while not any(handle.done for handle in handles):
        e.step()
        counts = [len(handle.new) for handle in handles]
        assert max(counts) - min(counts) <= 1
    assert set(read) == {1}


def test_a_request_that_is_cancelled_among_tokens_read_ahead_leaves_nothing(monkeypatch):
    read, e = in_kernels(monkeypatch), Engine(LM)
    handle, other = (e.submit(prompt(5 + i), max_new_tokens=60, **NO_EOS) for i in range(2))
    while len(handle.new) < 5:
        e.step()
    assert read[-1] == 8
    e.cancel(handle)
    run(e)
    np.testing.assert_array_equal(e.result(other), LM.generate(prompt(6), max_new_tokens=60, **NO_EOS))


# ---- what stays with a model -------------------------------------------------------------------------------------------------------------


def test_a_machine_serves_again_until_parameters_config_or_threads_are_others():
    ours, numpys = (OPTForCausalLM(small.params(TALKS), TALKS, backend=backend) for backend in ("cpu", "numpy"))

    def machine_of(new=9):
        np.testing.assert_array_equal(
            ours.generate(prompt(5), max_new_tokens=new, **NO_EOS), numpys.generate(prompt(5), max_new_tokens=new, **NO_EOS)
        )
        (machine,) = ours.params.idle
        assert machine.pool.available == len(machine.pool.counts)
        return machine

    first = machine_of()
    programs = dict(first.programs)
    assert programs
    assert not any(small.writes_without_a_task(program) for program in programs.values())
    assert machine_of(3 * PAGE) is first  # in more pages than there were
    assert first.programs == programs
    weight = numpys.params["layers"][0]["fc1"]["weight"] * 2
    numpys.params["layers"][0]["fc1"]["weight"], ours.params["layers"][0]["fc1"]["weight"] = weight, ops_cpu.pack_matrix(weight)
    second = machine_of()
    assert second is not first
    ours.config = numpys.config = dataclasses.replace(TALKS, num_attention_heads=TALKS.num_attention_heads // 2)
    third = machine_of()
    assert third is not second
    numba.set_num_threads(1)
    try:
        assert machine_of() is not third
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def test_large_buffers_and_pages_do_not_stay(monkeypatch):
    ours = OPTForCausalLM(small.params(CFG), CFG, backend="cpu")
    ours.generate(prompt(128), max_new_tokens=3, **NO_EOS)
    assert ours.params.idle[0].reading
    monkeypatch.setattr(machine_cpu, "KEPT", ours.params.idle[0].pool.nbytes)
    ours.generate(prompt(128), max_new_tokens=3, **NO_EOS)
    assert not ours.params.idle[0].reading
    monkeypatch.setattr(machine_cpu, "KEPT", 100)
    ours.generate(prompt(128), max_new_tokens=3, **NO_EOS)
    assert ours.params.idle == []


def test_a_model_is_copied_without_its_machines_and_gone_with_them():
    ours = OPTForCausalLM(small.params(CFG), CFG, backend="cpu")
    expected = ours.generate(prompt(5), max_new_tokens=4, **NO_EOS)
    params = pickle.loads(pickle.dumps(ours.params))
    assert params.idle == []
    np.testing.assert_array_equal(generate.generate(params, prompt(5), CFG, ops=ops_cpu, max_new_tokens=4, **NO_EOS), expected)
    seen = []
    weakref.finalize(ours.params.idle[0], seen.append, 1)
    gc.disable()
    try:
        del ours
        assert seen == [1]
    finally:
        gc.enable()


# ---- many requests -----------------------------------------------------------------------------------------------------------------------


def requests(n, seed):
    """Short and long prompts, some that begin alike, each way of decoding."""
    rng, common = np.random.default_rng(seed), prompt(2 * PAGE)
    ways = [{}, {}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}, {"repetition_penalty": 1.3}, {"num_beams": 2},
            {"penalty_alpha": 0.5, "top_k": 3}]  # fmt: skip
    for i in range(n):
        ids = prompt(int(rng.choice([1, 5, 30, PAGE, 2 * PAGE + 1])), seed=i)
        ids = np.concatenate([common[:, : int(rng.integers(2 * PAGE))], ids], axis=1) if i % 3 == 0 else ids
        eos = list(range(4, 40)) if i % 4 == 1 else []
        new = min(int(rng.integers(1, 30) if i % 4 else rng.integers(90, 130)), CFG.max_position_embeddings - ids.shape[1])
        yield ids, {"max_new_tokens": new, "seed": i, "eos_token_id": eos, **ways[i % len(ways)]}


class Eager(Engine):
    """Takes in whatever comes, so that pages run out all the time."""

    def _admit(self):
        while self.waiting:
            self.running[self.waiting.pop(0)] = None


@pytest.mark.parametrize("kind", [Engine, Eager])
def test_a_hundred_requests_say_what_each_says_alone_and_leave_no_page_behind(kind, monkeypatch):
    """Over few pages; one in five is cancelled on its way."""
    e, back = kind(LM, pages=16, max_batch=6, chunk=2 * PAGE), []

    def put_back(waiting, handle, key):
        back.append(handle.number > max((other.number for other in e.running), default=0))
        bisect.insort(waiting, handle, key=key)

    monkeypatch.setattr(engine, "bisect", SimpleNamespace(insort=put_back))
    asked = [(e.submit(ids, **options), ids, options) for ids, options in requests(100, seed=0)]
    for i, (handle, _, _) in enumerate(asked):
        if i % 5 == 0:
            [e.step() for _ in range(i % 4)]
            e.cancel(handle)
    run(e)
    assert len(back) > 1000 or kind is Engine
    assert all(back)  # it is always the last that is put back, so the first goes on
    for handle, ids, options in asked:
        if handle.cancelled:
            same_steps(handle, list(LM.stream(ids, **options))[: len(handle.new)]) if "num_beams" not in options else None
            with pytest.raises(ValueError, match=f"request {handle.number} was cancelled"):
                e.result(handle)
        else:
            np.testing.assert_array_equal(e.result(handle), LM.generate(ids, **options))
            if "num_beams" not in options:
                same_steps(handle, LM.stream(ids, **options))
    assert sum(handle.cancelled for handle, _, _ in asked) > 10


@given(seed=st.integers(0, 2**20), pages=st.integers(15, 40), max_batch=st.integers(1, 8), chunk=st.integers(PAGE, 3 * PAGE),
       dtype=st.sampled_from(["float16", "bfloat16"]))  # fmt: skip
@settings(max_examples=4)
def test_requests_do_not_notice_each_other_with_16_bit_keys_either(seed, pages, max_batch, chunk, dtype):
    e = Engine(LM, pages=pages, max_batch=max_batch, dtype=dtype, chunk=chunk)
    asked = [(e.submit(ids, **options), ids, options) for ids, options in requests(7, seed)]
    run(e)
    for handle, ids, options in asked:
        alone = Engine(LM, dtype=dtype)
        np.testing.assert_array_equal(e.result(handle), alone.result(alone.submit(ids, **options)))


def test_a_short_request_does_not_wait_for_long_ones():
    """Behind long prompts and long continuations, more than fit into a round, it gets its turn in every other round."""
    e = Engine(LM, pages=64, max_batch=4, chunk=PAGE)
    long = [e.submit(prompt(3 * PAGE + 1, seed=i), max_new_tokens=50, **NO_EOS) for i in range(3)]
    going_on = [e.submit(prompt(1, seed=i), max_new_tokens=200, **NO_EOS) for i in range(5)]
    [e.step() for _ in range(3)]
    assert all(handle.new for handle in going_on)  # though prompts are still being read
    assert not any(handle.new for handle in long)
    short, rounds = e.submit(prompt(5), max_new_tokens=4, **NO_EOS), 0
    while not short.done:
        rounds += e.step()
    assert rounds <= 13 + 4 * 3  # the prompts before it, then a turn of at most 9 rows for each token
    counts = [len(handle.new) for handle in going_on]
    assert max(counts) - min(counts) <= 1
    run(e)


def test_a_round_reads_so_many_tokens_at_most(monkeypatch):
    read, e = tokens_read(monkeypatch), Engine(LM, pages=64, max_batch=3, chunk=PAGE + 10)
    [e.submit(prompt(n, seed=n), max_new_tokens=5, **NO_EOS) for n in (200, 1, 1, 1, 1, 1, 70, 4)]
    run(e)
    assert max(read) <= 3 + PAGE + 10
    assert read[0] == PAGE + 4 + 3  # prompts are cut where pages end; the next does not fit, and a short one does


def test_threads_read_streams_of_their_own():
    e, found = Engine(LM, pages=16, max_batch=4), {}
    asked = list(requests(12, seed=3))
    asked = [(ids, options) for ids, options in asked if "num_beams" not in options]

    def client(i, ids, options):
        found[i] = list(e.submit(ids, **options))

    threads = [threading.Thread(target=client, args=(i, *request)) for i, request in enumerate(asked)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert len(found) == len(asked)
    for i, (ids, options) in enumerate(asked):
        same_steps(found[i], LM.stream(ids, **options))
    e.pool.check()


def test_text_comes_with_a_tokenizer_and_steps_nobody_took_keep_their_numbers():
    e, tok, options = Engine(LM), small.tokenizer(), {"max_new_tokens": 3 * engine.UNREAD, **NO_EOS}
    handle = e.submit([[5, 6]], tokenizer=tok, **options)
    run(e)
    assert handle.steps[0].logits.shape == (1, 0)
    assert handle.steps[-1].logits.shape == (1, CFG.vocab_size)
    same_steps(handle, LM.stream([[5, 6]], tokenizer=tok, **options))


def test_cancelling_before_on_the_way_and_after():
    e = Engine(LM, pages=5)
    first, second = (e.submit(prompt(3 * PAGE, seed=i), max_new_tokens=9, **NO_EOS) for i in range(2))
    steps = iter(first)
    next(steps)
    assert first in e.running
    assert second in e.waiting
    e.cancel(second)
    e.cancel(first)
    assert not e.running
    assert not e.waiting
    assert e.pool.available == 5
    assert list(steps) == list(second) == []
    third = e.submit([[5]], max_new_tokens=2, **NO_EOS)
    assert e.result(third).shape == (1, 3)
    e.cancel(third)
    assert not third.cancelled
    assert e.result(third).shape == (1, 3)
    assert not e.step()


def test_what_goes_wrong_in_one_request_is_told_there_alone():
    e = Engine(LM)
    good = e.submit([[5, 6]], max_new_tokens=5, **NO_EOS)
    bad = e.submit([[5]], max_new_tokens=3, bad_words_ids=[[i] for i in range(CFG.vocab_size)], **NO_EOS)
    run(e)
    for _ in range(2):
        with pytest.raises(ValueError, match="row 0 has no token to choose"):
            list(bad)
    with pytest.raises(ValueError, match="row 0 has no token to choose"):
        e.result(bad)
    np.testing.assert_array_equal(e.result(good), LM.generate([[5, 6]], max_new_tokens=5, **NO_EOS))


@pytest.mark.parametrize(("place", "name"), [(Program, "run"), (Machine, "logits")])
@pytest.mark.parametrize("options", [{}, {"penalty_alpha": 0.6, "top_k": 3}], ids=str)
def test_a_pass_that_fails_can_be_repeated(place, name, options, monkeypatch):
    """No page is known, and no row has moved on, before all numbers are there."""
    e, ids, before = Engine(LM, chunk=PAGE), prompt(PAGE + 9), getattr(place, name)
    handle = e.submit(ids, max_new_tokens=3, **options, **NO_EOS)
    monkeypatch.setattr(place, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        [e.step() for _ in range(3)]
    assert len(e.pool.known) == (name == "logits")  # the first half of the prompt
    monkeypatch.setattr(place, name, before)
    np.testing.assert_array_equal(e.result(handle), LM.generate(ids, max_new_tokens=3, **options, **NO_EOS))
    run(e)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[5]], {"max_new_tokens": 5 * PAGE - 10}, "may need 5 pages of 64 tokens, and the engine has 4: make it with pages=5"),
        ([[5]], {"max_new_tokens": 2, "num_beams": 5}, "may need 5 pages"),
        ([[5]], {"max_new_tokens": 2, "penalty_alpha": 0.5, "top_k": 5}, "may need 5 pages"),
        ([[5]], {"max_new_tokens": 999}, "outgrow this model's max_position_embeddings=310"),
        ([[5, 999]], {"max_new_tokens": 1}, "vocab_size=308 allows 0 to 307"),
        ([[]], {"max_new_tokens": 1}, "at least one token per row"),
        ([[5]], {"top_p": 7.0}, "top_p=7.0"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(ids, options, message):
    e = Engine(LM, pages=4)
    with pytest.raises(ValueError, match=message):
        e.submit(ids, **options)
    assert not e.waiting
    assert e.submit(prompt(PAGE), max_new_tokens=2, num_beams=3)  # 1 page together, and 3 for the beams
    assert Engine(LM, pages=1).submit(prompt(PAGE), max_new_tokens=1)  # the last token is never read,
    with pytest.raises(ValueError, match="may need 4 pages of 64 tokens, and the engine has 3"):  # but by contrastive search
        Engine(LM, pages=3).submit(prompt(PAGE), max_new_tokens=1, penalty_alpha=0.5, top_k=2)


def test_beams_have_no_steps_and_an_engine_has_limits():
    e = Engine(LM)
    handle = e.submit([[5, 6]], num_beams=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="num_beams=2: beam search knows no token before its end"):
        e.stream(handle)
    np.testing.assert_array_equal(e.result(handle), NUMPY.generate([[5, 6]], num_beams=2, max_new_tokens=3))
    with pytest.raises(ValueError, match=r"runs on backends 'cpu' and 'cuda', and this model's is opt_np\.ops"):
        Engine(NUMPY)
    for options, message in (({"pages": 0}, "pages=0 must be"), ({"chunk": 63}, "chunk=63 must be a whole number of at least 64"),
                             ({"max_batch": 0}, "max_batch=0"), ({"pages": 2.5}, "pages=2.5 must"), ({"pages": "3"}, "pages='3' must"),
                             ({"dtype": "float64"}, "dtype='float64' must be float32")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Engine(LM, **options)
    with pytest.raises(MemoryError, match="GB of keys and values; ask for fewer"):
        Engine(SimpleNamespace(ops=ops_cpu, config=CFG, params=LM.params), pages=10**13)


def test_candidates_that_do_not_fit_into_a_round_keep_their_hidden_states():
    """Without a final norm the states that are kept are the program's own buffer, which the next round writes."""
    cfg = small.config(hidden_size=16, num_hidden_layers=1, _remove_final_layer_norm=True)
    lm = OPTForCausalLM(small.params(cfg), cfg, backend="cpu")
    options = {"penalty_alpha": 0.9, "top_k": 4, "max_new_tokens": 12, "eos_token_id": []}
    e = Engine(lm, pages=8, max_batch=2)
    assert np.array_equal(e.result(e.submit([[5, 6, 7, 8]], **options)), lm.generate([[5, 6, 7, 8]], **options))


def test_projections_wider_than_all_else():
    cfg = small.config(word_embed_proj_dim=400)
    params, ids = small.params(cfg), small.ids(cfg, 1, 4)
    found = [OPTForCausalLM(params, cfg, backend=backend).generate(ids, max_new_tokens=8, eos_token_id=[]) for backend in ("numpy", "cpu")]
    assert np.array_equal(*found)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("ids", [[[2.7, 400.2]], [[True, False]], [[5, 999]], [[]]], ids=str)
def test_ids_are_checked_when_generation_is_asked_for(ids, backend):
    lm = OPTForCausalLM(small.params(small.config()), small.config(), backend=backend)
    for call in (lm.generate, lm.stream):
        with pytest.raises(ValueError, match="input_ids"):
            call(ids)


def test_a_request_belongs_to_its_engine_and_is_not_waited_for_within_a_round(monkeypatch):
    one, other = Engine(LM), Engine(LM)
    handle = one.submit(prompt(5), max_new_tokens=3)
    for ask in (other.result, other.stream, other.cancel):
        with pytest.raises(ValueError, match="request 1 was submitted to another engine"):
            ask(handle)
    real = one.machine.read
    monkeypatch.setattr(one.machine, "read", lambda pieces: (one.result(handle), real(pieces)))
    with pytest.raises(RuntimeError, match="within a round"):
        one.result(handle)
    monkeypatch.undo()
    np.testing.assert_array_equal(one.result(handle), LM.generate(prompt(5), max_new_tokens=3))
