"""The documents are consistent: links have targets, code runs, line counts are about right, and no placeholder is left."""

import re
import shlex
from pathlib import Path

import pytest

from opt_np import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "weights" / "README.md", ROOT / "notebooks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_no_blank_is_left(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target
    assert not re.findall(r"^[A-Z_]{6,}$|@@", text, re.M)


def test_python_in_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(program, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_python_in_the_documents_runs(monkeypatch, capsys):
    """All blocks of a document, one after the other, with the shipped model in the place of Meta's."""
    monkeypatch.chdir(ROOT)
    for document in (ROOT / "docs").glob("*.md"):
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
        program = re.sub(r"facebook/opt-[\w.]+", "weights/opt-tiny", "\n".join(blocks))
        exec(compile(program, document.name, "exec"), {})
    assert "the first to differ is embed_tokens" in capsys.readouterr().out


def test_commands_in_the_readme_are_understood():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = re.findall(r"^opt-np (.*?)(?:  +#.*)?$", README + page, re.M)
    assert len(commands) >= 20
    for words in commands:
        assert cli.build_parser().parse_args(shlex.split(words)).run


def test_line_counts_in_the_readme_are_near():
    rows = re.findall(r"^\| (\[`.*?) \| (\d+) \|", README, re.M)
    assert len(rows) > 8
    rows += re.findall(r"^\| (\[`.*?) \| (\d+) \|", (ROOT / "docs" / "files.md").read_text(encoding="utf-8").replace("../opt_np", "opt_np"), re.M)
    assert len(rows) > 28
    for files, said in rows:
        lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in re.findall(r"\((opt_np/\w+\.py)\)", files))
        assert abs(lines - int(said)) <= 0.1 * lines, f"{files}: {lines}"


def test_the_api_page_is_in_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_api

    assert make_api.page() == make_api.PAGE.read_text(encoding="utf-8"), "python docs/make_api.py"


def test_every_public_function_says_what_it_does(monkeypatch):
    """Each docstring on the page begins with a sentence, or is a line of shapes."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_api

    page = make_api.page()
    entries = re.findall(r"^\* `(.*?)`\n\n((?:  .*\n|\n)+)", page, re.M)
    assert len(entries) > 300
    for name, text in entries:
        first = " ".join(text.strip().split("\n\n")[0].split())
        assert first.endswith((".", ":", ";", "?", ")", "]", "}")) or "->" in text, f"{name}: {first}"
