"""The page at `/` in a real browser, headless Chromium: what its reader sees and does."""

from __future__ import annotations

import json
import math
import re
import shutil

import httpx
import pytest
from support.audited import small_model_of_embedded_tokens
from support.serving import Gate, engine, eventually, served

from minqwen import Qwen2, SamplingParams
from minqwen.serve.page import PAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
BROWSER_NEEDED = "the page is tried in a browser: install chromium, and playwright from PyPI"
QUESTION = "What is 47 + 38?"
LENGTH = 12  # tokens of an answer, a setting of the page


def test_the_page_is_held_to_itself(running):
    """The browser takes this script and this style, and asks no other host."""
    found = httpx.get(running.url)
    policy = dict(
        part.split(" ", 1) for part in found.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert found.text == PAGE.read_text() and "text/html" in found.headers["Content-Type"]
    outside = re.findall(r"https?://[^\s'\"]+", found.text)
    assert outside == ["http://www.w3.org/2000/svg"]  # a name, which nobody fetches


# ---- a server, a browser, a page ----------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(embedded_tokenizer):
    """An engine of a model that knows nothing: what it says is long enough, and greedy."""
    config, weights = small_model_of_embedded_tokens()
    end = embedded_tokenizer.token_to_id("<|im_end|>")
    weights["lm_head.weight"][end] = 0  # no answer ends by itself
    config = config.replace(eos_token_id=(end,))
    model = Qwen2.from_tensors(config, lambda name, shard: weights[name])
    return engine(model, embedded_tokenizer, max_model_len=256)


@pytest.fixture(scope="module")
def running(llm):
    with served(llm) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason=BROWSER_NEEDED)
    if CHROMIUM is None:
        pytest.skip(BROWSER_NEEDED)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, running):
    """A new reader's page. Nothing may have been asked of another host, nor gone wrong in it."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.set_default_timeout(300_000)  # a loaded machine may take its time
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
    page.goto(running.url)
    set_up(page)
    yield page
    assert all(url.startswith((running.url, "data:")) for url in page.asked), page.asked
    assert page.wrong == []
    context.close()


@pytest.fixture
def gate(llm, monkeypatch):
    """Lets the engine make steps."""
    gate = Gate(llm, monkeypatch)
    yield gate
    gate.let(10_000)


def set_up(page, **settings):
    """Wait until the server is known; give settings."""
    page.wait_for_selector("#about:has-text('context')", state="attached")
    page.click("#showsettings")
    for name, value in {"max_tokens": LENGTH, **settings}.items():
        page.fill(f"#{name}", str(value))
    page.click("#hidesettings")


def send(page, text=QUESTION):
    page.fill("#draft", text)
    page.keyboard.press("Enter")
    done(page)


def done(page):
    page.wait_for_selector("#stop", state="hidden")


def tokens(page, place=-1):
    """The ids and spans of an answer that is shown."""
    answers = page.locator("article.answer")
    answer = answers.nth(place if place >= 0 else answers.count() + place)
    spans = answer.locator(".tok")
    return [int(i) for i in spans.evaluate_all("all => all.map(one => one.dataset.id)")], spans


def generated(llm, tokenizer, messages, given=(), length=LENGTH):
    """What the engine says, asked directly, and with its likeliest tokens."""
    prompt = [*tokenizer.encode_chat(messages), *given]
    params = SamplingParams(temperature=0, max_tokens=length, logprobs=6)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output.outputs[0]


@pytest.fixture(scope="module")
def oracle(llm, embedded_tokenizer):
    return engine(llm.model, embedded_tokenizer, max_model_len=256)


@pytest.fixture(scope="module")
def said(oracle, embedded_tokenizer):
    """The engine's answer to the question."""
    return generated(oracle, embedded_tokenizer, [{"role": "user", "content": QUESTION}])


# ---- what a reader does -------------------------------------------------------------------------


def test_an_answer_streams_and_its_tokens_are_coloured(page, said, gate):
    page.fill("#draft", QUESTION)
    page.keyboard.press("Enter")
    gate.let(3)
    page.locator(".answer .tok").nth(2).wait_for()
    assert page.is_visible("#stop") and page.locator("article.busy").count() == 1
    gate.let(100)
    done(page)
    ids, spans = tokens(page)
    assert ids == said.token_ids
    levels = spans.evaluate_all("all => all.map(one => one.className.match(/p(\\d)/)?.[1] ?? 0)")
    limits = (0.9, 0.5, 0.2, 0.05)
    for found, id, entry in zip(levels, ids, said.logprobs):
        assert int(found) == sum(math.exp(entry[id].logprob) < limit for limit in limits)
    under = page.inner_text("article.answer .under")
    assert f"{LENGTH} tokens" in under and "tokens/s" in under and "prompt tokens cached" in under


def test_a_token_shows_its_alternatives_and_one_of_them_is_a_branch(
    page, oracle, said, embedded_tokenizer
):
    send(page)
    tokens(page)[1].nth(2).hover()
    rows = page.locator("#pop button")
    entry = sorted(said.logprobs[2].values(), key=lambda found: -found.logprob)[:6]
    assert rows.count() == 6
    for row, found in zip(rows.all(), entry):
        shown = float(row.locator("span").last.inner_text().removesuffix(" %"))
        assert shown == pytest.approx(100 * math.exp(found.logprob), rel=0.06)
    second = next(i for i, found in said.logprobs[2].items() if found == entry[1])
    rows.nth(1).click()
    done(page)
    given = [*said.token_ids[:2], second]
    ids, spans = tokens(page)
    messages = [{"role": "user", "content": QUESTION}]
    assert ids == given + generated(oracle, embedded_tokenizer, messages, given).token_ids
    assert "chosen" in spans.nth(2).get_attribute("class")
    assert "2 / 2" in page.inner_text(".answer .versions")
    page.click(".answer .versions button:first-child")
    assert tokens(page)[0] == said.token_ids


def test_a_stopped_answer_frees_the_engine_and_can_be_continued(page, running, llm, said, gate):
    page.fill("#draft", QUESTION)
    page.keyboard.press("Enter")
    gate.let(4)
    page.locator(".answer .tok").nth(3).wait_for()
    page.keyboard.press("Escape")
    done(page)
    eventually(lambda: not running.service.front.open)
    gate.let(1)  # the step that was waiting; there is no other
    eventually(lambda: not llm.has_unfinished_requests)
    gate.let(1000)
    assert "Stopped" in page.inner_text(".answer .under")
    assert tokens(page)[0] == said.token_ids[:4]
    page.get_by_role("button", name="Continue").click()
    done(page)
    assert tokens(page)[0][:LENGTH] == said.token_ids


def test_a_question_is_edited_and_sent_again(page, said):
    send(page, "Other words")
    page.click(".user .under button")
    page.keyboard.press("Control+A")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    done(page)
    assert page.inner_text(".user .said") == QUESTION
    assert tokens(page)[0] == said.token_ids
    page.get_by_role("button", name="Earlier question").click()
    assert page.inner_text(".user .said") == "Other words"


def test_a_reload_keeps_the_conversation_and_its_probabilities(page, said):
    send(page)
    send(page, "And then?")
    before = page.inner_text("#chat")
    page.reload()
    assert page.inner_text("#chat") == before
    assert tokens(page, 0)[0] == said.token_ids
    tokens(page, 0)[1].nth(1).hover()
    assert page.locator("#pop button").count() == 6
    assert page.input_value("#max_tokens") == str(LENGTH)
    page.click("#new")
    page.get_by_role("button", name="Begin anew").click()
    page.reload()
    assert page.is_visible("#empty")


def test_the_keyboard_alone_asks_looks_and_branches(page, said):
    page.reload()
    page.wait_for_selector("#draft:focus")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    done(page)
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.answer .tok')"):
            break
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "%" in page.evaluate(focused)
    assert page.evaluate("document.activeElement.dataset.index") == "2"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("Go on from ")
    page.keyboard.press("Escape")
    assert page.is_hidden("#pop")
    for key in ("Enter", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    done(page)
    assert tokens(page)[0][:2] == said.token_ids[:2] and tokens(page)[0][2] != said.token_ids[2]
    assert page.evaluate("document.activeElement.dataset.index") == "2"
    assert page.inner_text("#status") == "The answer is complete"
    assert page.locator("#spoken p").count() > 0


def test_the_raw_prompt_has_every_token_and_marks_the_cached_ones(page, said, embedded_tokenizer):
    page.click("#rawswitch")
    page.fill("#draft", QUESTION)
    page.keyboard.press("Enter")
    done(page)
    prompt = embedded_tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    spans = page.locator("#raw .tok")
    spans.nth(len(prompt) + LENGTH - 1).wait_for()
    ids = spans.evaluate_all("all => all.map(one => Number(one.dataset.id))")
    assert ids == prompt + said.token_ids
    assert spans.first.inner_text() == "<|im_start|>"
    page.get_by_role("switch", name="Raw prompt").click()
    cached = int(re.search(r"(\d+) of \d+ prompt tokens cached", page.inner_text("#chat"))[1])
    page.get_by_role("switch", name="Raw prompt").click()
    page.wait_for_selector("#raw .text")
    assert page.locator("#raw .tok.kept").count() == cached > 0


def test_a_telephone_has_room_for_it(page):
    page.set_viewport_size({"width": 360, "height": 640})
    send(page, "a" * 200)
    page.locator(".answer .tok").nth(3).click()
    assert page.is_visible("#pop")
    for open_it in ("body", "#showsettings"):
        page.click(open_it, position={"x": 3, "y": 3})
        width = "Math.max(document.body.scrollWidth, document.querySelector('#scroll').scrollWidth)"
        assert page.evaluate(width) <= 360
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"


# ---- what a server says -------------------------------------------------------------------------


def chunk(delta="", found=(), **fields):
    """A piece of a stream, written by hand."""

    def entry(id, data):
        return {"token": f"token_id:{id}", "logprob": -0.5, "bytes": list(data)}

    content = [{**entry(*one), "top_logprobs": [entry(*one), entry(900, b"\x81")]} for one in found]
    choice = {"index": 0, "delta": {"content": delta}, "logprobs": {"content": content}}
    choice |= {"finish_reason": fields.pop("reason", None), "stop_reason": fields.pop("stop", None)}
    return "data: " + json.dumps({"choices": [choice], **fields}) + "\n\n"


def answer_with(page, *chunks, status=200):
    """Have the next answers be these."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=status, content_type="text/event-stream", body="".join(chunks)
        ),
    )


def test_parts_of_a_character_are_shown_as_bytes_and_whole_where_it_is_complete(page):
    pieces = [(1, b"ab"), (2, b"\xe2"), (3, b"\x96"), (4, b"\x81c"), (5, b"\xff"), (6, b"\n<b>")]
    answer_with(page, *(chunk(found=[one]) for one in pieces), chunk(reason="length"))
    send(page)
    texts = tokens(page)[1].evaluate_all("all => all.map(one => one.textContent)")
    assert texts == ["ab", "e2", "96", "\u2581c", "\ufffd", "\u21b5\n<b>"]
    tokens(page)[1].nth(3).hover()
    assert "81 63" in page.inner_text("#pop .top")
    tokens(page)[1].nth(2).hover()
    tokens(page)[1].nth(3).hover()
    assert "completes \u2581" in page.inner_text("#pop")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    send(page, "<img src=x onerror=alert(1)>")
    assert page.inner_text("article.user:nth-of-type(3) .said") == "<img src=x onerror=alert(1)>"
    assert asked[0]["messages"][1]["content"] == "ab\u2581c\ufffd\n<b>"


def test_what_a_stop_string_cuts_off_is_marked_and_not_sent_back(page):
    found = [(1, b"one"), (2, b" two."), (3, b"END now")]
    answer_with(page, chunk("one two.", found), chunk(reason="stop", stop="END"))
    send(page)
    assert tokens(page)[1].evaluate_all("all => all.map(one => one.matches('.cut'))") == [
        False,
        False,
        True,
    ]
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    send(page, "more")
    assert asked[0]["messages"][1]["content"] == "one two."


LONG = {"message": "too many", "code": "context_length_exceeded"}
ERRORS = [
    (429, {"message": "9 prompts run"}, "The server is busy: 9 prompts run."),
    (400, {"message": "top_p is 3"}, "The server refused this: top_p is 3."),
    (500, {"message": "it fell over"}, "The server could not answer: it fell over."),
    (400, LONG, "longer than the model can read"),
    (None, None, "The server does not answer."),
    (200, None, "the connection ended before the answer did"),
]


def test_errors_are_told_in_plain_words(page):
    for status, error, told in ERRORS:
        if status is None:
            page.route("**/v1/chat/completions", lambda route: route.abort())
        else:
            body = json.dumps({"error": error}) if error else chunk("a", [(1, b"a")])
            answer_with(page, body, status=status)
        send(page)
        assert told in page.locator(".answer").last.locator(".error").inner_text()
        page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").last.click()
    done(page)
    assert len(tokens(page)[0]) == LENGTH
    assert page.locator(".answer").last.locator(".error").count() == 0
    page.wrong[:] = [line for line in page.wrong if "Failed to load resource" not in line]


def test_a_server_with_a_key_is_asked_for_it_in_the_page(browser, llm):
    with served(llm, api_key="s\u00e9same") as locked:
        context = browser.new_context()
        page = context.new_page()
        page.goto(locked.url)
        for key in ("wrong", "s\u00e9same"):
            page.wait_for_selector("#keydialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        set_up(page)
        send(page)
        assert len(tokens(page)[0]) == LENGTH
        page.reload()
        set_up(page)
        assert page.is_hidden("#keydialog")
        stored = page.evaluate("JSON.stringify(localStorage)")
        assert "s\u00e9same" not in stored
        context.close()
