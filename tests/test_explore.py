"""The page of opt-np explore: its data are the model's own values, and a browser without a network shows them, by mouse, touch and keyboard."""

import base64
import io
import json
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from opt_np import OPTForCausalLM, OPTForQuestionAnswering, cli, costs, explore
from opt_np.lens import logit_lens
from opt_np.quantize import quantized
from opt_np.score import score

TEXT = "the cat sat on the mat, and the dog"
HOSTILE = '<script>alert(1)</script> </script> & "quotes" 🙂 {{title}} <!-- \n\tnaïve\u200b </s>'
SHAPES = {
    "pre-norm": {},
    "like 350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12, "num_hidden_layers": 3, "num_attention_heads": 4},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
}
TOKENIZER = small.tokenizer()


def model_of(shape, **changes):
    cfg = small.config(**{"max_position_embeddings": 128, **SHAPES[shape], **changes})
    return OPTForCausalLM(small.params(cfg), cfg)


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def found(model):
    return explore.gather(model, TOKENIZER, TEXT)


def embedded(page):
    """The data in a page."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)


def softmax(logits):
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# The data are the model's


def test_attention_is_the_models_own(model, found):
    own = model([found["ids"]], output_attentions=True).attentions
    np.testing.assert_array_equal(found["attention"], [P[0] for P in own])


def test_attention_on_the_page_is_right_to_half_a_step(model, found):
    T, layers = len(found["ids"]), embedded(explore.page(model, TOKENIZER, TEXT))["attention"]
    assert len(layers) == model.config.num_hidden_layers
    for packed, P in zip(layers, found["attention"], strict=True):
        triangles = np.frombuffer(base64.b64decode(packed), "<u2").reshape(len(P), T * (T + 1) // 2) / 65535
        np.testing.assert_allclose(triangles, P[:, *np.tril_indices(T)], rtol=0, atol=0.51 / 65535)


def test_every_layers_candidates_are_the_lens_own(model, found):
    lens = dict(logit_lens(model, [found["ids"]]))
    assert list(lens) == found["layers"]
    for m, logits in enumerate(lens.values()):
        p, top, at = softmax(logits[0]), found["top_ids"][m], np.arange(len(found["ids"]))[:, None]
        np.testing.assert_allclose(np.exp(found["top_logprobs"][m]), p[at, top], rtol=1e-4)
        np.testing.assert_allclose(p[at, top], -np.sort(-p, axis=1)[:, : explore.TOP], rtol=1e-4)
        np.testing.assert_allclose(found["entropy"][m], -(p * np.log(p)).sum(-1), rtol=1e-4)


def test_what_came_is_judged_as_by_score(model, found):
    scores = score(model, [found["ids"]])
    np.testing.assert_allclose(found["logprob"][-1, :-1], scores.logprob[0, 1:], rtol=1e-4)
    np.testing.assert_array_equal(found["rank"][-1, :-1], scores.rank[0, 1:])
    np.testing.assert_allclose(found["entropy"][-1, :-1], scores.entropy[0, 1:], rtol=1e-4)
    assert np.isnan(found["logprob"][:, -1]).all()
    assert (found["rank"][:, -1] == -1).all()


def test_costs_add_up_to_those_of_all_steps(model, found):
    steps = costs.steps(model.config, 1, len(found["ids"]))
    assert sum(row["steps"] for row in found["costs"]) == len(steps)
    assert sum(row["flops"] for row in found["costs"]) == sum(step.flops for step in steps)
    assert sum(row["weights"] for row in found["costs"]) == sum(step.weights for step in steps)
    assert sum(row["activations"] for row in found["costs"]) == sum(step.read + step.written for step in steps)
    assert {row["kind"] for row in found["costs"]} <= set(explore.KINDS.values())


def test_costs_are_those_of_the_weights_as_they_are():
    plain = model_of("pre-norm")
    for kind in ("int8", "int4"):
        params, cfg = quantized(plain.params, plain.config, kind)
        steps = costs.steps(cfg, 1, 5, kind=kind)
        assert sum(row["weights"] for row in explore.cost_rows(OPTForCausalLM(params, cfg), 5)) == sum(step.weights for step in steps)
    double = OPTForCausalLM(small.cast(plain.params, "float64"), plain.config)
    steps = costs.steps(plain.config, 1, 5, dtype="float64")
    assert sum(row["weights"] for row in explore.cost_rows(double, 5)) == sum(step.weights for step in steps)


def test_numbers_on_the_page_are_those_gathered(model, found):
    data = embedded(explore.page(model, TOKENIZER, TEXT, "a name"))
    for name, dtype in (("ids", "<i4"), ("top_ids", "<i4"), ("rank", "<i4"), ("top_logprobs", "<f4"), ("logprob", "<f4"), ("entropy", "<f4")):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(data[name]), dtype), found[name].astype(dtype).ravel())
    assert (data["name"], data["text"], data["pieces"]) == ("a name", TEXT, found["pieces"])
    assert data["strings"] == {str(i): string for i, string in found["strings"].items()}
    assert {*found["top_ids"].ravel().tolist(), *found["ids"].tolist()} == set(found["strings"])


# Tokens as text


def test_token_strings_keep_spaces_and_tell_bytes_and_ids_without_a_token():
    ids = TOKENIZER.encode("the cat 🙂")
    strings = explore.token_strings(TOKENIZER, ids)
    assert strings[0] == "</s>"
    assert " cat" in strings
    assert "".join(strings[-4:]) == r"\xf0\x9f\x99\x82"
    assert explore.token_strings(TOKENIZER, [307]) == ["<id 307>"]


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text):
    ids = TOKENIZER.encode(text)
    pieces = explore.pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "</s>" + text


def test_a_character_belongs_to_its_first_token():
    assert explore.pieces(TOKENIZER, TOKENIZER.encode("🙂!")) == ["</s>", "🙂", "", "", "", "!"]


def test_arrays_for_circuitsvis_and_bertviz():
    attentions = model_of("pre-norm")(small.ids(small.config(), rows=2, length=5), output_attentions=True).attentions
    np.testing.assert_array_equal(explore.circuitsvis(attentions, 1), attentions[1][0])
    np.testing.assert_array_equal(explore.circuitsvis(attentions, 1, row=1), attentions[1][1])
    assert [P.shape for P in explore.bertviz(attentions)] == [(1, 2, 5, 5)] * 2
    np.testing.assert_array_equal(explore.bertviz(attentions, row=1)[0][0], attentions[0][1])


# The page as a file


def test_the_page_loads_nothing_from_elsewhere(model):
    page = explore.page(model, TOKENIZER, TEXT)
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc\s*=|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b", page)
    assert re.findall(r'href="(.*?)"', page) == ["data:,"]
    assert "default-src 'none'" in page


def test_no_text_ends_the_script_or_fills_another_blank():
    page = explore.page(model_of("pre-norm"), TOKENIZER, HOSTILE, "<b>{{data}}</b>")
    assert page.count("</script") == 2
    assert embedded(page)["text"] == HOSTILE
    assert embedded(page)["name"] == "<b>{{data}}</b>"
    assert page.count("<script>alert") == 0
    assert "<title>&lt;b&gt;{{data}}&lt;/b&gt;: &lt;script&gt;" in page


def test_the_template_comes_with_the_package():
    setup = ConfigParser()
    setup.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    assert explore.TEMPLATE.name in setup["options.package_data"]["opt_np"].split(", ")


def test_the_size_told_beforehand_is_about_right():
    cfg = small.config(num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=400)
    text = small.TEXT * 8
    tokens = len(TOKENIZER.encode(text)[:400])
    page = explore.page(OPTForCausalLM(small.params(cfg), cfg), TOKENIZER, TOKENIZER.decode(TOKENIZER.encode(text)[1:400]))
    assert len(page) == pytest.approx(explore.page_bytes(cfg, tokens), rel=0.1)


def test_a_page_that_would_be_too_large_is_refused_before_it_is_computed(monkeypatch):
    model = model_of("pre-norm")
    monkeypatch.setattr(explore, "MOST_BYTES", explore.page_bytes(model.config, 9))
    with pytest.raises(ValueError, match=r"0 MB: 1\d tokens, and the attention of 2 layers of 2 heads.* shorten the text to 9 tokens"):
        explore.gather(model, TOKENIZER, TEXT)
    assert explore.longest(model.config) == 9


def test_what_cannot_be_shown_is_told():
    model = model_of("pre-norm")
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        explore.gather(model, TOKENIZER, TEXT * 20)
    model.params["final_layer_norm"]["bias"][:] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        explore.gather(model, TOKENIZER, TEXT)
    cfg = small.config()
    reader = OPTForQuestionAnswering({**small.params(cfg), "qa_outputs": {"weight": np.ones((2, 16), "f4"), "bias": np.ones(2, "f4")}}, cfg)
    with pytest.raises(ValueError, match="OPTForQuestionAnswering"):
        explore.gather(reader, TOKENIZER, TEXT)


# The command


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return cli.main(["explore", *map(str, words)]), *capsys.readouterr()

    return call


def test_the_command_writes_the_page_and_tells_its_size(run, tmp_path):
    folder, out = small.folder(tmp_path / "a-model"), tmp_path / "page.html"
    status, told, err = run("the cat", "--model", folder, "--out", out)
    assert (status, err) == (0, "")
    assert told == f"{out}: {out.stat().st_size / 1e6:.1f} MB, to be opened in any browser\n"
    data = embedded(out.read_text(encoding="utf-8"))
    assert (data["name"], data["text"]) == ("a-model", "the cat")
    assert run("-", "--model", folder, "--out", out, stdin="the dog")[0] == 0
    assert embedded(out.read_text(encoding="utf-8"))["text"] == "the dog"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-model", "page.html"]


def test_a_page_that_fails_leaves_the_old_one(run, tmp_path):
    folder, out = small.folder(tmp_path / "a-model"), tmp_path / "page.html"
    out.write_text("old")
    status, told, err = run(TEXT * 20, "--model", folder, "--out", out)
    assert (status, told, err.count("\n")) == (1, "", 1)
    assert "max_position_embeddings=32" in err
    assert out.read_text() == "old"


@pytest.mark.parametrize(("out", "words"), [("", "is a folder"), ("no/page.html", "there is no folder")])
def test_where_no_page_can_be_written_is_told_before_the_model_is_loaded(run, tmp_path, out, words):
    status, told, err = run("the cat", "--model", "not there", "--out", tmp_path / out)
    assert (status, told, err.count("\n")) == (1, "", 1)
    assert words in err
    assert str(tmp_path / out) in err


# In a browser

PAGES = {"hostile": ("pre-norm", HOSTILE), "long": ("like 350m", small.TEXT[:80] + "\n" + small.TEXT[:60]), "one": ("one layer, one head", "")}
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900")  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One browser for all tests, that reaches no network."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[test]'")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    started = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    started.execute_cdp_cmd("Network.enable", {})
    started.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each page's file, and its data."""
    folder, made = tmp_path_factory.mktemp("pages"), {}
    for name, (shape, text) in PAGES.items():
        model = model_of(shape)
        explore.write(folder / f"{name}.html", explore.page(model, TOKENIZER, text, "<b>name</b>"))
        made[name] = folder / f"{name}.html", explore.gather(model, TOKENIZER, text)
    return made


class Shown:
    """A page in the browser, and the data that it should show."""

    def __init__(self, browser, file, data):
        self.browser, self.data = browser, data
        browser.get(file.as_uri())

    def all(self, selector, value="e.textContent"):
        return self.browser.execute_script(f"return [...document.querySelectorAll(arguments[0])].map(e => {value})", selector)

    def one(self, selector, value="e.textContent"):
        (only,) = self.all(selector, value)
        return only

    def click(self, selector):
        self.browser.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center', inline: 'center'})", selector)
        self.browser.find_element("css selector", selector).click()

    def press(self, *keys):
        """Keys, each for whatever has the focus then."""
        from selenium.webdriver.common.keys import Keys

        self.browser.switch_to.active_element.send_keys(*(getattr(Keys, key) for key in keys))

    def focus(self, selector):
        self.browser.execute_script("document.querySelector(arguments[0]).focus()", selector)

    @property
    def selected(self):
        """Position, layer, head, and layer of the lens, as the elements say that are marked."""
        position = self.one("#tokens [aria-selected=true]", "Number(e.dataset.t)")
        layer, head = self.one("#heads [aria-checked=true]", "[Number(e.dataset.l), Number(e.dataset.h)]")
        lens, column = self.one("#lens [aria-selected=true]", "[Number(e.dataset.m), Number(e.dataset.t)]")
        assert position == column == self.one("#looked-at [aria-selected=true]", "Number(e.dataset.t)")
        return position, layer, head, lens


@pytest.fixture
def shown(chromium, pages, request):
    yield Shown(chromium, *pages[getattr(request, "param", "hostile")])
    assert [entry for entry in chromium.get_log("browser") if "willReadFrequently" not in entry["message"]] == []  # said of a test's own reading
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0


every_page = pytest.mark.parametrize("shown", PAGES, indirect=True)
a_long_one = pytest.mark.parametrize("shown", ["long"], indirect=True)


def near(text, p):
    """Whether a probability as the page writes it is this one."""
    return float(text) == pytest.approx(p, abs=5.1e-5 if "e" not in text else 0, rel=0.06 if "e" in text else 0)


def assert_candidates(shown, where, layer, position, size):
    """The bars of a list are a layer's candidates, and the token that came."""
    data = shown.data
    expected = [(data["strings"][i], np.exp(p)) for i, p in zip(data["top_ids"][layer, position], data["top_logprobs"][layer, position], strict=True)]
    expected = expected[:size]
    following = data["ids"][position + 1] if position + 1 < len(data["ids"]) else None
    if following is not None and following not in data["top_ids"][layer, position, :size]:
        expected.append((data["strings"][following], np.exp(data["logprob"][layer, position])))
    parts = "[e.querySelector('.text').textContent, e.querySelector('.number').textContent, e.querySelector('.fill').style.width]"
    rows = shown.all(f"{where} li", parts)
    assert [text for text, _, _ in rows] == [text for text, _ in expected]
    assert all(near(number, p) for (_, number, _), (_, p) in zip(rows, expected, strict=True))
    assert [float(width.removesuffix("%")) for _, _, width in rows] == pytest.approx([100 * p for _, p in expected], rel=1e-3)
    assert shown.all(f"{where} li.came .text") == ([data["strings"][following]] if following is not None else [])


@every_page
def test_the_text_is_shown_literally(shown):
    from selenium.common.exceptions import NoAlertPresentException

    assert shown.all("#tokens .token .text") == shown.data["pieces"]
    assert "".join(shown.data["pieces"]) == "</s>" + shown.data["text"]
    assert shown.one("h1") == "<b>name</b>"
    assert shown.one("title").startswith("<b>name</b>: ")
    assert len(shown.all("script")) == 2
    with pytest.raises(NoAlertPresentException):  # so no script in the text ran
        _ = shown.browser.switch_to.alert


@every_page
def test_candidates_and_what_came_are_the_arrays(shown):
    T = len(shown.data["ids"])
    for position in sorted({0, T // 2, T - 1}):
        shown.browser.execute_script("select({position: arguments[0]})", position)
        assert_candidates(shown, "#candidates", -1, position, explore.TOP)
        facts = dict(zip(shown.all("#came dt"), shown.all("#came dd"), strict=True))
        assert float(facts["Entropy"].removesuffix(" nats")) == pytest.approx(shown.data["entropy"][-1, position], abs=6e-4)
        if position == T - 1:
            assert facts["Token"] == "none: the text ends here"
            continue
        logprob, rank = shown.data["logprob"][-1, position], shown.data["rank"][-1, position]
        assert near(facts["Probability"], np.exp(logprob))
        assert float(facts["Log-probability"].removesuffix(" nats").replace("−", "-")) == pytest.approx(logprob, abs=6e-4)
        place = facts["Place"].removesuffix("likeliest of 308")
        assert place == "" if rank == 0 else int(re.match(r"\d+", place)[0]) == rank + 1


def test_places_are_ordinal_numbers(shown):
    told = shown.browser.execute_script("return [0, 1, 2, 3, 10, 11, 12, 20, 110, 1000].map(place).map(text => text.replace(/likeliest.*/, ''))")
    assert told == ["", "2nd ", "3rd ", "4th ", "11th ", "12th ", "13th ", "21st ", "111th ", "1,001st "]


@every_page
def test_tokens_are_coloured_by_probability_and_by_entropy(shown):
    logprob, entropy, T = shown.data["logprob"][-1, :-1], shown.data["entropy"][-1, :-1], len(shown.data["ids"])
    shades = [float(v) for v in shown.all("#tokens .token", "e.style.getPropertyValue('--v')")]
    assert shades == pytest.approx([0, *np.minimum(-logprob / np.log(10) / 4, 1)], abs=1e-4)
    shown.click("[value=entropy]")
    shades = [float(v) for v in shown.all("#tokens .token", "e.style.getPropertyValue('--v')")]
    assert shades == pytest.approx([0, *(entropy / np.log(308))], abs=1e-4)
    assert len(set(shown.all("#tokens .token", "getComputedStyle(e).backgroundColor"))) >= min(T, 5) - 1
    assert "entropy" in shown.one("#explain-colour")


@every_page
def test_the_chosen_heads_weights_are_the_arrays(shown):
    L, H, T, _ = shown.data["attention"].shape
    for layer, head, query in ((0, 0, T - 1), (L - 1, H - 1, T // 2)):
        shown.browser.execute_script("select({layer: arguments[0], head: arguments[1], position: arguments[2]})", layer, head, query)
        P = shown.data["attention"][layer, head, query, : query + 1]
        told = [label.rpartition(" ")[2] for label in shown.all("#looked-at .token", "e.getAttribute('aria-label')")]
        assert told[query + 1 :] == ["seen"] * (T - query - 1)
        assert [float(weight) for weight in told[: query + 1]] == pytest.approx(P, abs=7e-5)
        written = [float(weight or 0) for weight in shown.all("#looked-at .weight")]
        assert written == pytest.approx([*P, *[0] * (T - query - 1)], abs=5.1e-3)
        assert shown.one("#matrix-title") == f"Layer {layer}, head {head}"
        assert float(shown.one("#readout").rpartition(" ")[2]) == pytest.approx(P.max(), abs=7e-5)


@every_page
def test_the_lens_shows_every_layers_likeliest_token(shown):
    top, p, strings = shown.data["top_ids"][..., 0], np.exp(shown.data["top_logprobs"][..., 0]), shown.data["strings"]
    cells = shown.all("#lens td", "[e.querySelector('.text').textContent, e.style.getPropertyValue('--v')]")
    assert [text for text, _ in cells] == [strings[i] for i in top.ravel()]
    assert [float(v) for _, v in cells] == pytest.approx(p.ravel(), abs=6e-5)
    assert shown.all("#lens th") == shown.data["layers"]
    shown.click(f"#lens [data-m='{len(top) - 1}'][data-t='0']")
    assert shown.selected[0] == 0
    assert shown.selected[3] == len(top) - 1
    for m in range(len(top)):
        shown.browser.execute_script("select({lens: arguments[0]})", m)
        assert_candidates(shown, "#lens-candidates", m, 0, 5)


@a_long_one
def test_costs_are_shown_in_full(shown):
    rows = shown.all("#costs tr", "[...e.children].map(c => c.textContent)")
    assert [row[0].partition(" × ")[0] for row in rows] == [row["kind"] for row in shown.data["costs"]]
    assert [amount(row[2], "FLOP") for row in rows] == pytest.approx([row["flops"] for row in shown.data["costs"]], rel=6e-3)
    assert [amount(row[4], "B") for row in rows] == pytest.approx([row["weights"] + row["activations"] for row in shown.data["costs"]], rel=6e-3)
    total = shown.all("#costs-sum td.number")
    assert amount(total[0], "FLOP") == pytest.approx(sum(row["flops"] for row in shown.data["costs"]), rel=6e-3)


def amount(text, unit):
    number, _, prefix = text.removesuffix(unit).partition(" ")
    return float(number) * {"": 1, "k": 1e3, "M": 1e6}[prefix]


# By mouse, finger and keyboard


@a_long_one
def test_a_thumbnail_chooses_its_head(shown):
    position, _, _, lens = shown.selected
    shown.click("[data-l='2'][data-h='3']")
    assert shown.selected == (position, 2, 3, lens)
    assert (shown.one("#layer"), shown.one("#head")) == ("Layer 2", "Head 3")
    shown.click("#layer-less")
    shown.click("#head-less")
    assert shown.selected == (position, 1, 2, lens)
    shown.focus("[data-l='0'][data-h='1']")
    shown.press("ENTER")
    assert shown.selected == (position, 0, 1, lens)


@a_long_one
def test_thumbnails_and_matrix_are_painted(shown):
    first, future = (shown.all(".thumb canvas", f"[...e.getContext('2d').getImageData({x}, 0, 1, 1).data]") for x in ("0", "e.width - 1"))
    assert first == [[0x08, 0x30, 0x6B, 255]] * 12  # the first token sees itself alone
    assert future == [[0xE9, 0xEB, 0xEF, 255]] * 12
    darkest = "[...e.getContext('2d').getImageData(0, 0, e.width, e.height).data].filter((v, i) => i % 4 === 0).reduce((a, b) => Math.min(a, b))"
    assert shown.one("#matrix", darkest) <= 0x10
    media = "Emulation.setEmulatedMedia"
    shown.browser.execute_cdp_cmd(media, {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    shown.browser.execute_async_script("setTimeout(arguments[0], 200)")
    dark = shown.all(".thumb canvas", "[...e.getContext('2d').getImageData(0, 0, 1, 1).data]")
    shown.browser.execute_cdp_cmd(media, {"features": []})
    assert dark == [[0xEA, 0xF4, 0xFF, 255]] * 12


@a_long_one
def test_arrow_keys_among_tokens(shown):
    T, rest = len(shown.data["ids"]), shown.selected[1:]
    for where in ("#tokens", "#looked-at"):
        shown.click(f"{where} [data-t='3']")
        shown.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
        assert shown.selected == (4, *rest)
        assert shown.browser.execute_script("return document.activeElement.dataset.t") == "4"
        shown.press("HOME", "ARROW_LEFT")
        assert shown.selected == (0, *rest)
        shown.press("END", "ARROW_RIGHT")
        assert shown.selected == (T - 1, *rest)
    assert shown.one("#here").startswith(f"Token {T} of {T}")


@a_long_one
def test_arrow_keys_among_heads_and_in_the_lens(shown):
    position, lens = shown.selected[0], shown.selected[3]
    shown.focus("#heads [aria-checked=true]")
    shown.press("ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT")
    assert shown.selected == (position, 1, 2, lens)
    shown.press("ARROW_UP", "ARROW_UP", "ARROW_LEFT")
    assert shown.selected == (position, 0, 1, lens)
    shown.focus("#lens [aria-selected=true]")
    shown.press("ARROW_LEFT", "ARROW_LEFT", "ARROW_DOWN")
    assert shown.selected == (position - 2, 0, 1, lens + 1)
    assert shown.browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_arrow_keys_where_nothing_has_the_focus(shown):
    position = shown.selected[0]
    shown.press("ARROW_LEFT", "ARROW_LEFT", "ARROW_RIGHT")
    assert shown.selected[0] == position - 1
    shown.click("#previous")
    shown.press("ARROW_LEFT")
    assert shown.selected[0] == position - 3


def test_only_one_of_each_row_is_reached_by_tab(shown):
    for where in ("#tokens", "#looked-at", "#heads", "#lens"):
        assert shown.all(f"{where} [tabindex='0']", "1") == [1]


@a_long_one
def test_pointing_at_a_token_shows_what_it_looks_at(shown):
    from selenium.webdriver import ActionChains

    before = shown.all("#looked-at .weight")
    shown.browser.execute_script("document.querySelector('#looked-at').scrollIntoView({block: 'center'})")
    ActionChains(shown.browser).move_to_element(shown.browser.find_element("css selector", "#looked-at [data-t='2']")).perform()
    assert [w != "" for w in shown.all("#looked-at .weight")] == [t <= 2 for t in range(len(before))]
    ActionChains(shown.browser).move_to_element(shown.browser.find_element("css selector", "h2")).perform()
    assert shown.all("#looked-at .weight") == before


def test_pointing_at_the_matrix_reads_and_chooses(shown):
    from selenium.webdriver import ActionChains

    T = len(shown.data["ids"])
    canvas = shown.browser.find_element("css selector", "#matrix")
    shown.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    left, bottom = -canvas.rect["width"] / 2 + 6, canvas.rect["height"] / 2 - 5  # the last token's row, the first one's column
    ActionChains(shown.browser).move_to_element_with_offset(canvas, round(left), round(bottom)).click().perform()
    assert shown.selected[0] == T - 1
    told, _, weight = shown.one("#readout").rpartition(" ")
    assert told.endswith("(token 1) with weight")
    assert float(weight) == pytest.approx(shown.data["attention"][0, 0, T - 1, 0], abs=7e-5)


@every_page
def test_a_phone_shows_it_without_scrolling_sideways(shown):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    try:
        shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        shown.browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
        assert shown.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        targets = shown.all(".token, .step, .switch label, .thumb, .lens td", "[e.getBoundingClientRect().width, e.getBoundingClientRect().height]")
        assert min(map(min, targets)) >= 32
        outside = "e.closest('.lens, .scroll') === null && e.getBoundingClientRect().right > 360.5"
        assert not any(shown.all("main *", outside))
    finally:
        shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
