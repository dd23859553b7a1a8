"""What the notebooks share: show() puts a function's source on the page, check() compares yours with the package's, picture() draws a matrix.

The notebooks import and show the package's code, and never repeat it: what you read is what runs.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "weights" / "opt-tiny"  # the model in the box
sys.path.insert(0, str(ROOT))

SIZES = {"B": 2, "T": 5, "S": 5, "D": 12, "H": 3, "Dh": 4, "F": 16, "V": 11, "I": 6, "O": 7, "M": 4, "K": 3, "N": 5, "R": 2, "W": 8}
LEADING = (2, 3)  # what *N stands for
PLAIN = {"scale": 0.5, "function": "relu"}  # arguments that are no arrays
ENOUGH = 1e-9  # of the largest value: rounding in float64 stays far below


# ---- showing code ------------------------------------------------------------------------------------------------------------------------


def show(*functions: Any) -> None:
    """The source of functions or classes, with the file and line where it stands."""
    from IPython.display import Markdown, display

    for function in functions:
        file, (lines, first) = Path(inspect.getsourcefile(function) or ""), inspect.getsourcelines(function)
        where = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
        display(Markdown(f"`{where}`, line {first}\n\n```python\n{textwrap.dedent(''.join(lines)).rstrip()}\n```"))


# ---- checking exercises ------------------------------------------------------------------------------------------------------------------


def check(mine: Callable, spec: Callable, *cases: tuple, seed: int = 0) -> None:
    """Says whether `mine` computes what `spec` does; if not, how far off it is and what that looks like.

    Inputs are random float64 arrays of the shapes in spec's docstring, or the `cases` given, each a tuple of arguments.
    """
    cases = cases or (arguments(spec, seed), arguments(spec, seed + 1))
    wrong = next((said for case in cases if (said := judged(mine, spec, case))), "")
    print(f"not yet: {wrong}" if wrong else f"right: {mine.__name__} equals {spec.__module__}.{spec.__name__} on {len(cases)} inputs")


def judged(mine: Callable, spec: Callable, case: tuple) -> str:
    """What is wrong with `mine` on one input; nothing if it is right."""
    wanted = spec(*(np.copy(a) if isinstance(a, np.ndarray) else a for a in case))
    try:
        found = mine(*(np.copy(a) if isinstance(a, np.ndarray) else a for a in case))
    except Exception as error:  # a learner's function may fail in any way
        return f"it stopped with {type(error).__name__}: {error}"
    return difference(found, wanted)


def arguments(spec: Callable, seed: int) -> tuple:
    """Random arguments for a function whose docstring has a shape line: x: (*N, I);  weight: (O, I)  ->  (*N, O)."""
    rng, doc = np.random.default_rng(seed), inspect.getdoc(spec) or ""
    line = next((line for line in doc.splitlines() if "->" in line and ": (" in line), "")
    shapes = {name: axes.split(", ") for name, axes in re.findall(r"(\w+): \(([^)]*)\)", line)}
    found: list[Any] = []
    for name, parameter in inspect.signature(spec).parameters.items():
        if name in shapes:
            shape = [n for axis in shapes[name] for n in (LEADING if axis.startswith("*") else (SIZES[axis],))]
            made = {"ids": lambda s: rng.integers(0, SIZES["V"], s), "visible": lambda s: rng.random(s) < 0.7}
            found.append(made.get(name, lambda s: rng.normal(size=s))(shape))
        elif parameter.default is not parameter.empty:
            break
        elif name in PLAIN:
            found.append(PLAIN[name])
        else:
            raise ValueError(f"{spec.__name__} has the argument {name}, whose shape its docstring does not say: give cases")
    return tuple(found)


def difference(found: Any, wanted: Any) -> str:
    """What is wrong with a result, in words; nothing if it is right."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            return f"it returns {sorted(found) if isinstance(found, dict) else type(found).__name__}; a dict with {', '.join(wanted)} is wanted"
        found, wanted = tuple(found[name] for name in wanted), tuple(wanted.values())
    if isinstance(wanted, tuple):
        if not isinstance(found, tuple) or len(found) != len(wanted):
            return f"it returns a {type(found).__name__}; {len(wanted)} results are wanted"
        said = [(i, difference(f, w)) for i, (f, w) in enumerate(zip(found, wanted, strict=True))]
        return next((f"result {i}: {text}" for i, text in said if text), "")
    if found is None:
        return "it returns None"
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        turned = found.ndim > 1 and found.swapaxes(-1, -2).shape == wanted.shape and close(found.swapaxes(-1, -2), wanted)
        return f"the shape is {found.shape}, {wanted.shape} is wanted" + ("; it is right when its last two axes are swapped" if turned else "")
    if close(found, wanted):
        return ""
    if found.size == 1:
        return f"it is {found.item():.6g}, and {wanted.item():.6g} is wanted" if found.dtype.kind in "fiu" else f"it is {found.item()!r}"
    if found.dtype.kind not in "fciu" or not np.issubdtype(wanted.dtype, np.number):
        return f"{int((found != wanted).sum())} of {found.size} values are wrong"
    if (unlike := np.isfinite(found) != np.isfinite(wanted)).any():
        return f"{int(unlike.sum())} of {found.size} numbers are NaN or infinite, or should be"
    found, wanted = (np.where(np.isfinite(wanted), a, 0) for a in (found, wanted))
    return how_far(found.astype(np.float64), wanted.astype(np.float64))


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether all numbers are equal up to rounding; infinities, and what is no number, must be the same."""
    if wanted.dtype.kind not in "fc" or found.dtype.kind not in "fciu":
        return bool((found == wanted).all())
    apart = found[found != wanted] - wanted[found != wanted]
    finite = np.abs(wanted[np.isfinite(wanted)])
    return bool(np.abs(apart).max() <= ENOUGH * max(finite.max(initial=0), 1e-300)) if apart.size else True


def how_far(found: np.ndarray, wanted: np.ndarray) -> str:
    off = np.abs(found - wanted) > ENOUGH * np.abs(wanted).max()
    said = f"off by up to {np.abs(found - wanted).max() / np.abs(wanted).max():.2g} times the largest value"
    said += f", in {int(off.sum())} of {off.size} numbers"
    with np.errstate(all="ignore"):
        ratios, shifts = (found / wanted)[np.abs(wanted) > 1e-6], found - wanted
    if ratios.size and np.ptp(ratios) < 1e-6 * abs(ratios.mean()):
        return f"{said}; all are {ratios.mean():.6g} times what they should be"
    if np.ptp(shifts) < 1e-9:
        return f"{said}; all are {shifts.mean():+.6g} too large"
    rows = off.reshape(len(off), -1).any(1)
    return f"{said}; the first is at {tuple(int(i) for i in np.argwhere(off)[0])}" + (
        "" if rows.all() else f", and {int((~rows).sum())} rows are right"
    )


# ---- pictures ----------------------------------------------------------------------------------------------------------------------------


def picture(matrix: Any, rows: Any = None, columns: Any = None, title: str = "", ax: Any = None, **options: Any) -> Any:
    """A matrix as a heatmap with its labels; returns the axes."""
    import matplotlib.pyplot as plt

    matrix = np.asarray(matrix)
    if ax is None:
        size = (min(10, 2 + 0.4 * matrix.shape[1]), min(8, 1.2 + 0.35 * matrix.shape[0]))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    image = ax.imshow(matrix, aspect="auto", **{"cmap": "Blues", **options})
    if rows is not None:
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
    if columns is not None:
        ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    return ax
