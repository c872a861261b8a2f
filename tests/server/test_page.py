"""The page at `/`: who gets it, what it may load, and what people do with it in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from helpers.browser import ARROW_DOWN, ARROW_RIGHT, ARROW_UP, ENTER, SHIFT_ENTER, Browser, browsing, is_missing
from helpers.servers import serving, wait_for

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.guard import Access
from mlx_paged.server.page import policy_of

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
in_a_browser = pytest.mark.skipif(is_missing(), reason="needs chromium and chromedriver")


def test_browsers_get_the_page_and_others_a_line(url: str) -> None:
    page = httpx.get(url, headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.text.startswith("<!doctype html>")
    line = httpx.get(url)
    assert line.headers["content-type"].startswith("text/plain") and line.text == "mlx-paged serves scripted at /v1\n"
    for answer, more in ((page, BROWSER), (line, {})):
        assert answer.headers["vary"] == "Accept" and answer.headers["cache-control"] == "no-cache"
        head = httpx.head(url, headers=more)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == answer.headers["content-length"]


def test_the_page_may_run_its_own_script_and_ask_its_own_server_and_nothing_else(url: str) -> None:
    page = httpx.get(url, headers=BROWSER)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", policy["style-src"])
    assert page.headers.get_list("x-content-type-options") == ["nosniff"]
    assert page.headers["referrer-policy"] == "no-referrer"
    changed = policy_of(page.text.replace("</script>", "more()</script>"))
    assert policy["style-src"] in changed and policy["script-src"] not in changed
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", page.text)


def test_text_is_easy_to_read_on_its_ground_in_light_and_dark(url: str) -> None:
    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    schemes = re.findall(r":root \{(.*?)\}", httpx.get(url, headers=BROWSER).text, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): #(\w+)", scheme))
        pairs = [(text, ground) for text in ("ink", "muted", "accent", "alarm") for ground in ("panel", "ground")]
        for text, ground in [*pairs, ("on-accent", "accent")]:
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(window: Browser, url: str) -> Iterator[Browser]:
    """The page, opened afresh. Nothing comes on its console, and it asks nobody but its server."""
    window.open(url)
    yield window
    assert window.console() == []
    addresses = window.addresses()
    assert f"{url}/" in addresses and all(address.startswith(f"{url}/") for address in addresses)


def ask(page: Browser, text: str, chain: str = "answer") -> None:
    """Send a message, which the scripted model answers with one of its chains."""
    page.clear("#system")
    page.type("#system", f"SCRIPT:{chain}")
    page.type("#prompt", text + ENTER)


def answer(part: str) -> str:
    """The selector of a part of the last answer."""
    return f"article.assistant:last-child {part}"


def assert_nothing_runs(llm: AsyncLLM) -> None:
    wait_for(lambda: llm.num_requests == 0 and llm.snapshot.num_free_blocks == llm.snapshot.num_blocks)


@in_a_browser
def test_messages_are_answered_one_after_another_and_what_an_answer_took_is_said(page: Browser) -> None:
    ask(page, f"one{SHIFT_ENTER}two {'long ' * 40}")
    page.wait_for_text(answer(".note"), "complete")
    assert page.text("article.user div > .text").startswith("one\ntwo long")
    assert page.text(answer("div > .text")) == "All done: the tool said so."
    number = r"[\d.,]+"
    assert re.fullmatch(
        rf"({number} tokens/s · )?first token {number} s · prompt \d+ tokens, 0 cached · answer 6 · complete",
        page.text(answer(".note")),
    )
    ask(page, "three")
    page.wait_for_text(answer(".note"), "complete")
    assert page.count("article") == 4
    num_prompt, num_cached = map(int, re.findall(r"(\d+) (?:tokens,|cached)", page.text(answer(".note"))))
    assert num_prompt > num_cached > 40


@in_a_browser
def test_stop_ends_an_answer_and_its_blocks_are_free(page: Browser, llm: AsyncLLM) -> None:
    ask(page, "go on", "endless")
    page.wait_for_text(answer("div > .text"), "tick tack tick")
    page.wait_for_text("#requests", "running")
    page.wait_for_text("#status", "1 running")
    page.click("#stop")
    assert_nothing_runs(llm)
    page.wait_for_text(answer(".note"), "stopped")
    page.wait_for_text("#num_requests", "none")
    assert page.text("#error") == ""
    ask(page, "and now?")
    page.wait_for_text(answer(".note"), "complete")


@in_a_browser
def test_a_reload_keeps_the_conversation_and_ends_what_is_being_written(page: Browser, llm: AsyncLLM) -> None:
    ask(page, "first")
    page.wait_for_text(answer(".note"), "complete")
    ask(page, "second", "endless")
    page.wait_for_text(answer("div > .text"), "tick tack")
    page.reload()
    assert_nothing_runs(llm)
    assert page.count("article") == 4 and "All done" in page.text("#turns")
    assert "tick tack" in page.text(answer("div > .text")) and page.text(answer(".note")) == "cut by a reload"
    assert page.run("return document.getElementById('system').value") == "SCRIPT:endless"
    page.click("#new")
    assert page.text("#turns") == "Nothing has been said yet."
    page.reload()
    assert page.count("article") == 0


@in_a_browser
def test_thinking_is_folded_until_it_is_opened(page: Browser) -> None:
    ask(page, "think", "exec_command")
    page.wait_for_text(answer(".note"), "complete")
    assert "I should run it." not in page.text(answer("")) and "echo marker-7" in page.text(answer(""))
    page.click(answer("summary"))
    assert page.text(answer("details .text")) == "I should run it."


@in_a_browser
def test_what_a_model_writes_is_text_whatever_it_writes(page: Browser) -> None:
    ask(page, "<b>attack</b>", "hostile")
    page.wait_for_text(answer(".note"), "complete")
    text = page.text("#turns")
    for written in ("<b>attack</b>", "<img src=x onerror", "<script>document.title='taken'</script>", "<a href="):
        assert written in text
    assert page.text("#turns pre") == "<b>bold</b>"
    assert page.count("#turns :is(img, script, b, a)") == 0 and page.run("return document.title") == "mlx-paged"


@in_a_browser
def test_a_question_that_is_refused_is_told_why_and_can_be_sent_again(window: Browser, url: str) -> None:
    window.open(url)
    window.type("#max_tokens", "0")
    window.run("document.getElementById('ask').noValidate = true")
    ask(window, "too little")
    window.wait_for_text("#error", "max_tokens")
    assert window.count("article") == 0
    assert window.run("return document.getElementById('prompt').value") == "too little"
    (message,) = window.console()
    assert "400" in message
    window.addresses()


@in_a_browser
def test_a_key_is_asked_for_and_kept_in_the_tab(window: Browser, llm: AsyncLLM) -> None:
    with serving(llm, Access(keys=("schl\u00fcssel".encode(),))) as url:
        window.open(url)
        wait_for(lambda: window.count("dialog[open]"))
        window.type("#key_text", "wrong" + ENTER)
        window.wait_for_text("#key_error", "does not know that key")
        window.type("#key_text", "schl\u00fcssel" + ENTER)
        window.wait_for_text("#status", "0 running")
        assert window.count("dialog[open]") == 0
        window.reload()
        window.wait_for_text("#status", "0 running")
        ask(window, "hello")
        window.wait_for_text(answer(".note"), "complete")
        assert all("401" in message for message in window.console())
        window.open("about:blank")  # and nothing of it is left
        window.open(url)
        wait_for(lambda: window.count("dialog[open]"))
    window.console(), window.addresses()


ENDLESS = {"messages": [{"role": "system", "content": "SCRIPT:endless"}], "stream": True, "max_tokens": 5000}


@in_a_browser
def test_requests_of_others_are_listed_and_can_be_aborted(page: Browser, url: str, llm: AsyncLLM) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS, timeout=30) as response:
        page.wait_for_text("#requests", "running")
        assert re.search(r"^[1-9]\d* of 2,000 blocks held", page.text("#groups"), re.MULTILINE)
        page.wait_for_text("#prefixes", "held by 1")
        page.click("#requests button")
        *_, last = filter(None, response.iter_lines())
        assert "this request was aborted" in last
    assert_nothing_runs(llm)
    page.wait_for_text("#requests", "")
    page.wait_for_text("#num_requests", "none")


@in_a_browser
def test_a_request_of_another_key_is_not_ended_and_that_is_said(window: Browser, llm: AsyncLLM) -> None:
    with (
        serving(llm, Access(keys=(b"k1", b"k2"))) as url,
        httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS, timeout=30, headers={"x-api-key": "k2"}),
    ):
        window.open(url)
        wait_for(lambda: window.count("dialog[open]"))
        window.type("#key_text", "k1" + ENTER)
        window.wait_for_text("#requests", "running")
        window.click("#requests button")
        window.wait_for_text("#requests", "another key's")
        assert llm.num_requests == 1
    assert_nothing_runs(llm)
    window.console(), window.addresses()


@in_a_browser
def test_each_block_says_whose_it_is_to_a_pointer_and_to_keys(page: Browser, url: str, llm: AsyncLLM) -> None:
    ask(page, "go on", "endless")
    page.wait_for_text("#requests", "running")
    request = page.text("#requests td")
    second = [1, 0, int(request), 1, 1]  # of its blocks
    cells_now = lambda: httpx.get(f"{url}/debug/blocks").json()["pools"][0]["cells"]  # noqa: E731
    wait_for(lambda: second in cells_now())
    block = cells_now().index(second)
    page.click("canvas")  # in its middle
    assert re.match(r"Block [\d,]+: ", page.text("#block"))
    page.click("#turns")
    assert page.text("#block").startswith("Point at a block")
    page.type("canvas", ARROW_RIGHT + ARROW_DOWN)
    columns = int(page.text("#block").split(":")[0].removeprefix("Block "))
    page.type("canvas", ARROW_UP + ARROW_DOWN * (block // columns) + ARROW_RIGHT * (block % columns))
    page.wait_for_text("#block", f"Block {block:,}: held by request {request}, tokens 16 to 31 of its context")
    page.click("#stop")
    assert_nothing_runs(llm)


@in_a_browser
def test_everything_that_takes_keys_has_a_name(page: Browser) -> None:
    ask(page, "hello")
    page.wait_for_text(answer(".note"), "complete")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", ())):
            named[node["role"]["value"], node.get("name", {}).get("value", "")] = node
    assert not [role for role, name in named if not name and role != "RootWebArea"]
    assert {"Message", "Temperature", "Most tokens", "System prompt", "Send", "Conversation"} <= {
        name for _, name in named
    }


@in_a_browser
def test_on_a_phone_chat_and_pool_are_two_sights_that_fit(page: Browser) -> None:
    ask(page, "word" * 60)
    page.wait_for_text(answer(".note"), "complete")
    page.resize(390, 844)
    for name in ("Pool", "Chat"):
        page.click(f"nav a[href='#{name.lower()}']")
        widths = (
            "return ['body', `[aria-label=${arguments[0]}]`].map((part) => document.querySelector(part).scrollWidth)"
        )
        wait_for(lambda: page.run(widths, name) == [390, 390])  # noqa: B023
        assert page.run("return [...document.querySelectorAll('section')].filter((e) => e.offsetWidth).length") == 1


@in_a_browser
def test_the_pool_is_watched_while_the_page_is_in_sight(window: Browser, llm: AsyncLLM) -> None:
    def show(is_hidden: bool) -> None:
        window.run("Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });"
                   "document.dispatchEvent(new Event('visibilitychange'))", is_hidden)  # fmt: skip

    with serving(llm, names=["a model"]) as url:
        window.open(url)
        window.wait_for_text("#status", "0 running")
        assert window.addresses().count(f"{url}/debug/blocks?stream=1") == 1
        show(is_hidden=True)
        ask(window, "hello")
        window.wait_for_text(answer(".note"), "complete")
        show(is_hidden=False)
        wait_for(lambda: window.addresses().count(f"{url}/debug/blocks?stream=1") == 1)
        assert window.text("#model") == "a model"
    window.wait_for_text("#status", "trying again")
    window.console()
