"""The notebooks run, are legible, and match their sources; and the code that they share gives learners correct feedback."""

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from opt_np import ops

jupytext = pytest.importorskip("jupytext")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(FOLDER))

import learn  # noqa: E402
import make  # noqa: E402

SOURCES = make.sources()
named = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def code_of(source):
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


def names_called(cell):
    return {node.func.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


@named
def test_it_runs_from_first_cell_to_last(source):
    outputs = [output for cell in make.executed(source).cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs), "a notebook has pictures"


@named
def test_the_notebook_is_in_step_with_its_source(source):
    assert make.in_step(source), f"python notebooks/make.py {source.stem}"


@named
def test_what_is_kept_has_outputs_and_nothing_of_the_machine(source):
    import nbformat

    cells = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert len(outputs) > 5
    text = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"/(root|home|tmp|work|Users)/|0x[0-9a-f]{8}|Warning|not yet: it stopped", text)


@named
def test_cells_are_short_and_lines_fit_the_page(source):
    for cell in code_of(source):
        lines = cell.splitlines()
        assert len(lines) <= 20, cell
        assert max(map(len, lines), default=0) <= 100, max(lines, key=len)


@named
def test_every_section_ends_in_an_assertion(source):
    """The last cell of code of each section, exercises aside, holds an assert; a section of words alone needs none."""
    sections, title = {}, None
    for cell in jupytext.read(source).cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^## (.*)", cell.source, re.M)):
            title = found[1]
        elif cell.cell_type == "code" and title and "check" not in names_called(cell.source):
            sections[title] = cell.source
    assert len(sections) >= 3
    for title, last in sections.items():
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(last))), f"{title}: {last}"


@named
def test_it_has_exercises_and_says_where_to_go_on(source):
    exercises = sum("check" in names_called(cell) for cell in code_of(source))
    assert 1 <= exercises <= 3
    text = source.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (FOLDER / target).exists(), target
    later = [path for path in SOURCES if path > source]
    assert not later or f"{later[0].stem}.ipynb" in text


@named
def test_it_shows_the_package_and_does_not_paste_it(source):
    """No function of the operations stands in a notebook again."""
    assert "show(" in source.read_text(encoding="utf-8")
    ours = {own_lines(ast.parse(inspect.getsource(f)).body[0]): name for name, f in vars(ops).items() if inspect.isfunction(f)}
    for cell in code_of(source):
        for node in ast.walk(ast.parse(cell)):
            assert not (isinstance(node, ast.FunctionDef) and own_lines(node) in ours), node.name


def own_lines(function):
    """A function's code without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return "\n".join(map(ast.unparse, body))


# What they share


@pytest.mark.parametrize("spec", [ops.linear, ops.layer_norm, ops.attention, ops.softmax, ops.embed, ops.activation, ops.attention_lse])
def test_check_knows_what_is_right(spec, capsys):
    learn.check(spec, spec)
    assert capsys.readouterr().out == f"right: {spec.__name__} equals opt_np.ops.{spec.__name__} on 2 inputs\n"


def attention_wrong(change):
    return lambda q, k, v, scale: change(ops.attention(q, k, v, scale))


@pytest.mark.parametrize(("mine", "said"), [
    (attention_wrong(lambda O: 2 * O), "all are 2 times what they should be"), (attention_wrong(lambda O: O + 1), r"all are \+1 too large"),
    (attention_wrong(lambda O: None), "it returns None"), (attention_wrong(lambda O: O[0]), r"the shape is \(5, 3, 4\), \(2, 5, 3, 4\) is wanted"),
    (attention_wrong(lambda O: O.swapaxes(-1, -2)), "right when its last two axes are swapped"),
    (attention_wrong(lambda O: O / 0), "NaN or infinite, or should be"),
    (attention_wrong(lambda O: O.foo), "it stopped with AttributeError"),
    (attention_wrong(lambda O: np.concatenate([O[:1], 1.5 * O[1:]])), r"in 60 of 120 numbers; the first is at \(1, 0, 0, 0\), and 1 rows are right"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_check_says_how_far_off_one_is(mine, said, capsys):
    learn.check(mine, ops.attention)
    out = capsys.readouterr().out
    assert out.startswith("not yet: ")
    assert re.search(said, out), out


def test_check_takes_cases_and_several_results(capsys):
    x = np.ones((2, 3))
    learn.check(lambda a: a * 2, lambda a: a + a, (x,))
    assert capsys.readouterr().out.startswith("right")
    learn.check(lambda *a: ops.attention(*a), ops.attention_lse)
    assert "it returns a ndarray; 2 results are wanted" in capsys.readouterr().out
    learn.check(lambda q, k, v, s: (ops.attention(q, k, v, s), q), ops.attention_lse)
    assert "result 1: the shape" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has the argument cfg, whose shape its docstring does not say"):
        learn.arguments(lambda cfg: cfg, 0)


def test_check_takes_infinities_and_flags(capsys):
    hidden = np.array([[1.0, -np.inf], [2.0, 3.0]])
    learn.check(lambda: hidden, lambda: hidden.copy(), ())
    assert capsys.readouterr().out.startswith("right")
    learn.check(lambda: np.zeros((2, 2)), lambda: hidden, ())
    assert "1 of 4 numbers are NaN or infinite, or should be" in capsys.readouterr().out
    learn.check(lambda: hidden + 1, lambda: hidden, ())
    assert "in 3 of 4 numbers" in capsys.readouterr().out
    learn.check(lambda: hidden > 0, lambda: hidden > 1.5, ())
    assert "1 of 4 values are wrong" in capsys.readouterr().out


def test_check_compares_dicts_and_knows_flags(capsys):
    from opt_np import flash, quantize

    learn.check(quantize.int8_rows, quantize.int8_rows, (np.ones((2, 3), np.float32),))
    assert capsys.readouterr().out.startswith("right")
    learn.check(lambda w: {"weight": w}, quantize.int8_rows, (np.ones((2, 3), np.float32),))
    assert "a dict with weight, scale is wanted" in capsys.readouterr().out
    learn.check(flash.attention, flash.attention)
    assert capsys.readouterr().out.startswith("right")


def test_a_learners_function_cannot_spoil_the_inputs(capsys):
    def spoils(q, k, v, scale):
        q *= 0
        return ops.attention(q, k, v, scale)

    learn.check(spoils, ops.attention)
    assert capsys.readouterr().out.startswith("not yet")
    learn.check(ops.attention, ops.attention)
    assert capsys.readouterr().out.startswith("right")


def test_show_names_the_place_and_prints_the_lines(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda markdown: shown.append(markdown.data))
    learn.show(ops.linear, learn.Path.exists)
    assert shown[0].startswith("`opt_np/ops.py`, line ")
    assert "```python\ndef linear(x: np.ndarray" in shown[0]
    assert "```python\ndef exists(self" in shown[1]


def test_a_wrong_name_is_told():
    with pytest.raises(SystemExit, match="no notebook is named nothing; there are 01_opt"):
        make.sources(["nothing"])


def test_a_notebook_that_lags_behind_is_noticed(tmp_path):
    source = tmp_path / SOURCES[0].name
    source.write_text(SOURCES[0].read_text(encoding="utf-8"), encoding="utf-8")
    made = source.with_suffix(".ipynb")
    assert not make.in_step(source)
    made.write_text(SOURCES[0].with_suffix(".ipynb").read_text(encoding="utf-8"), encoding="utf-8")
    assert make.in_step(source)
    source.write_text(source.read_text(encoding="utf-8").replace("np.array(", "np.asarray(", 1), encoding="utf-8")
    assert not make.in_step(source)
