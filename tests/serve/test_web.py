"""The page in a real Chromium. With MMFREE_SCREENSHOTS=DIRECTORY it leaves pictures there."""

import os
import re
import shutil

import pytest

from conftest import ENDLESS

playwright = pytest.importorskip("playwright.sync_api", reason="NO playwright: THE PAGE WAS NOT TRIED")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Most tokens that these tests let the page ask for.
PAGE_MAX = 4096
SIZES = {"360": (360, 740), "1440": (1440, 900)}
if not CHROMIUM:
    pytest.skip("NO chromium: THE PAGE WAS NOT TRIED", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as context:
        browser = context.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page, and fails on any error in it and any request to somebody else."""
    problems = []
    contexts = []

    def open_page(size="1440", theme="light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "360", reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("console", lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None)
        page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(server.url) else None)
        page.goto(server.url + "/")
        page.get_by_text("kB a conversation").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems, problems


def settle(page):
    """Waits until nothing is being written."""
    page.locator("#send").wait_for()
    page.locator(".stats").last.wait_for()


def has_stats(page, count):
    """Waits for so many ended texts."""
    playwright.expect(page.locator(".stats")).to_have_count(count, timeout=20_000)


def set_tokens(page, count):
    change = "(node, [max, value]) => { node.max = max; node.value = value; node.dispatchEvent(new Event('input')); }"
    page.locator("#max_tokens").evaluate(change, [PAGE_MAX, count])


def write_to_the_limit(page):
    """Texts do not end by themselves, which a drawn one may do after any token; the longest that the page can ask for
    does not end at all."""

    def change(route):
        body = route.request.post_data_json
        body["ignore_eos"] = True
        if body["max_tokens"] == PAGE_MAX:
            body["max_tokens"] = ENDLESS
        route.continue_(post_data=body)

    page.route("**/v1/completions", change)


def picture(page, name):
    directory = os.environ.get("MMFREE_SCREENSHOTS")
    if directory:
        page.screenshot(path=os.path.join(directory, name + ".png"))


def no_sideways_scrolling(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_write_stop_reload_and_go_on(open_page, server, size, theme):
    page = open_page(size, theme)
    write_to_the_limit(page)
    no_sideways_scrolling(page)
    picture(page, f"welcome-{size}-{theme}")
    set_tokens(page, 64)

    # Type and see it come.
    page.locator("#input").fill("Once upon a time there was a ship")
    page.keyboard.press("Enter")
    settle(page)
    text = page.locator(".entry.model .text").inner_text()
    assert len(text) > 40
    stats = page.locator(".stats").inner_text()
    assert "64 tokens" in stats and "tokens/s" in stats and "state 12 kB" in stats, stats

    # Go on without a word: the session goes on.
    page.locator("#send").click()
    has_stats(page, 2)
    seen = re.findall(r"for (\d+) tokens", page.locator(".log").inner_text())
    assert int(seen[1]) == int(seen[0]) + 64

    # Stop.
    set_tokens(page, PAGE_MAX)
    page.locator("#input").fill("The captain said:")
    page.locator("#send").click()
    page.locator("#stop").wait_for()
    playwright.expect(page.locator(".running .text")).to_have_text(re.compile(r"\S.{20}", re.S), timeout=20_000)
    picture(page, f"writing-{size}-{theme}")
    page.keyboard.press("Escape")
    settle(page)
    assert "stopped" in page.locator(".stats").last.inner_text()
    picture(page, f"text-{size}-{theme}")
    no_sideways_scrolling(page)

    # Reload: everything is there, and goes on with all of it.
    before = page.locator(".log").inner_text()
    page.reload()
    page.locator(".entry").first.wait_for()
    assert page.locator(".log").inner_text() == before
    set_tokens(page, 32)
    page.locator("#send").click()
    has_stats(page, 4)
    seen = re.findall(r"for (\d+) tokens", page.locator(".log").inner_text())
    assert int(seen[-1]) > int(seen[1]), "after a stop the whole text is read again"

    # Another conversation, a chat.
    if size == "360":
        page.locator("#open-sidebar").click()
        picture(page, f"list-{size}-{theme}")
    page.locator("#new").click()
    page.get_by_text("Chat", exact=True).click()
    page.locator("#input").fill("Who are you?")
    page.keyboard.press("Enter")
    settle(page)
    page.locator("#input").fill("Where do you live?")
    page.keyboard.press("Enter")
    has_stats(page, 2)
    picture(page, f"chat-{size}-{theme}")
    page.locator("#open-settings").click()
    picture(page, f"settings-{size}-{theme}")
    page.keyboard.press("Escape")
    if size == "360":
        page.locator("#open-sidebar").click()
    assert page.locator(".list .open").count() == 2
    page.locator(".list .open").nth(1).click()
    assert page.locator(".log").inner_text().startswith("Once upon a time")
    # And delete it.
    if size == "360":
        page.locator("#open-sidebar").click()
    page.locator(".list li[data-current] .delete").click()
    assert page.locator(".list .open").count() == 1


def test_a_chat_tells_the_server_only_what_is_new(open_page):
    page = open_page()
    set_tokens(page, 16)
    page.get_by_text("Chat", exact=True).click()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    for number, message in enumerate(["Hello!", "And you?"]):
        page.locator("#input").fill(message)
        page.keyboard.press("Enter")
        has_stats(page, number + 1)
    assert [len(body["messages"]) for body in bodies] == [1, 1]
    assert bodies[0]["session_id"] == bodies[1]["session_id"]


def test_everything_can_be_reached_by_keyboard(open_page):
    page = open_page()
    page.locator("body").click(position={"x": 700, "y": 300})
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.name"))
    assert {"new", "theme", "mode", "open-settings", "input", "send"} <= reached, reached
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for control in page.locator("button, input, textarea").all():
        name = control.evaluate("node => node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent")
        assert name, control


def test_errors_are_shown_and_nothing_is_lost(open_page, server):
    page = open_page()
    page.route("**/v1/completions", lambda route: route.fulfill(status=429, content_type="application/json", body='{"error": {"message": "too busy"}}'))
    page.locator("#input").fill("My text")
    page.keyboard.press("Enter")
    page.get_by_text("too busy").wait_for()
    assert page.locator("#input").input_value() == "My text"
    page.unroute("**/v1/completions")
    page.keyboard.press("Enter")
    settle(page)


def test_the_policy_lets_nothing_in_from_elsewhere(server):
    for path in ["/", "/app.js", "/app.css", "/icon.svg"]:
        status, headers, body = server.call("GET", path)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", body), path
