"""The page in headless Chromium, over a real server with the shipped model."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from servers import running

from moss_jax.config import SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.serving.hub import Hub
from moss_jax.serving.security import Gate, Tokens, protection
from moss_jax.stream import Scheduler

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo.mp4"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Until the model has seen a frame and said something about it, on a slow machine, in milliseconds.
PATIENCE = 40_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    camera = tmp_path_factory.mktemp("camera") / "demo.y4m"
    film(camera)
    flags = [
        *FLAGS,
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
        "--auto-select-tab-capture-source-by-title=moss_jax",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def film(path: Path) -> None:
    """Writes the demo as a camera's file."""
    side, fps = 224, 10
    with av.open(DEMO) as container, path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{side} H{side} F{fps}:1 Ip A1:1 C420jpeg\n".encode())
        due = 0.0
        for frame in container.decode(video=0):
            if frame.time is not None and frame.time >= due:
                planes = frame.reformat(side, side, "yuv420p").to_ndarray()
                file.write(b"FRAME\n" + planes.tobytes())
                due += 1 / fps


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context, link) -> Iterator[Page]:
    """The page, of which nothing failed at the end."""
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
    page.goto(f"http://127.0.0.1:{link.port}/")
    yield page
    leave(page)
    assert not errors


def leave(page: Page) -> None:
    """Gives the stream back."""
    if page.locator("#start.running").count():
        page.click("#start")
    page.click("#new")


def seen(page: Page) -> int:
    text = page.inner_text("[data-figure=seen]")
    return int(text) if text.isdigit() else 0


def wait_seen(page: Page, count: int) -> None:
    # A function each time: an expression would be evaluated again and again, which the page's CSP forbids.
    page.wait_for_function(
        "count => Number(document.querySelector('[data-figure=seen]').textContent) >= count", arg=count
    )


def answers(page: Page):
    return page.locator(".entry.answer")


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def session_id(page: Page) -> str:
    # What is kept for a reload is written as the page goes, and now and then before.
    return page.evaluate(
        "dispatchEvent(new Event('pagehide')), JSON.parse(sessionStorage['moss.session']).id"
    )


def lay(page: Page, *things: tuple[str, str, str]) -> None:
    """Lays shapes on an empty table: (kind, colour, place)."""
    for cell in page.locator(".cell").all():
        cell.focus()
        page.keyboard.press("Delete")
    for kind, colour, place in things:
        page.locator(".cell").first.focus()
        page.keyboard.press("Escape")
        page.click(f'#swatches [data-colour="{colour}"]')
        page.click(f'.cell[data-cell="{place}"]')
        page.click(f'#tray [data-kind="{kind}"]')


def test_a_camera_is_allowed_and_asked_about(page):
    page.click("[data-source=camera]")
    page.click("#start")
    expect(page.locator("#link")).to_have_text("Connected")
    page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    wait_seen(page, 2)
    expect(page.locator("#mood")).to_have_text("Listening")
    ask(page, "What is on the table?")
    expect(page.locator(".entry.prompt")).to_have_text(re.compile("What is on the table"))
    expect(answers(page).first).to_have_text(re.compile(r"There is|I see|empty|There are"))
    # The moment is on the timeline, and in memory.
    expect(page.locator("#thumbs figure[data-fate=seen]").first).to_be_visible()
    expect(page.locator(".word.answer").first).to_be_visible()
    page.wait_for_function("() => Number(document.querySelector('#legend b').textContent) >= 2")
    # Frames stop at once.
    page.click("#start")
    page.wait_for_timeout(1500)
    count = seen(page)
    page.wait_for_timeout(2500)
    assert seen(page) == count


def test_a_screen_is_watched(page):
    page.click("[data-source=screen]")
    page.click("#start")
    expect(page.locator("#link")).to_have_text("Connected")
    page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
    wait_seen(page, 2)
    # Whoever shares it may stop that in the browser, too.
    page.evaluate(
        "() => { const [t] = document.getElementById('video').srcObject.getTracks();"
        " t.stop(); t.dispatchEvent(new Event('ended')); }"
    )
    expect(page.locator("#start")).not_to_have_class(re.compile("running"))


def test_a_server_that_asks_for_a_key_gets_it(context, answering):
    key = "the-key-of-this-server-0123456789"
    made = Hub(Scheduler(answering, SchedulerConfig()), ServerConfig(), session=SessionConfig())
    with running(made, middleware=protection(Gate(tokens=Tokens([key])))) as server:
        page = context.new_page()
        page.goto(server.url)
        page.click("#start")
        for given in ("a-key-that-is-wrong-0123456789", key):
            expect(page.locator("#key")).to_be_visible()
            page.fill("#key-value", given)
            page.press("#key-value", "Enter")
        expect(page.locator("#link")).to_have_text("Connected")
        expect(page.locator("#key")).to_be_hidden()
        wait_seen(page, 1)
        # It is kept for the next visit.
        page.reload()
        page.click("#start")
        expect(page.locator("#link")).to_have_text("Connected")
        page.close()


def test_a_question_cuts_an_answer_and_so_does_the_button(page):
    lay(
        page,
        ("circle", "red", "0,0"),
        ("star", "blue", "1,0"),
        ("cross", "black", "2,0"),
        ("ring", "green", "0,1"),
    )
    page.click("#start")
    wait_seen(page, 2)
    ask(page, "What is on the table?")
    expect(answers(page)).to_have_count(1)
    ask(page, "What colour is the star?")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).first).to_have_attribute("data-status", "cut")
    expect(answers(page).first).to_contain_text("interrupted")
    expect(answers(page).nth(1)).to_contain_text("blue")
    ask(page, "What is on the table?")
    expect(answers(page)).to_have_count(3)
    page.click("#stop")
    expect(answers(page).nth(2)).to_have_attribute("data-status", "cut")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#mood")).to_have_text("Listening")


def test_the_model_takes_back_what_is_no_longer_true(page):
    page.click("#start")
    # The change has to come while the sentence is said, and to be seen before its end.
    for _ in range(6):
        lay(
            page,
            ("circle", "red", "0,0"),
            ("square", "blue", "1,0"),
            ("triangle", "green", "2,0"),
            ("ring", "yellow", "1,1"),
        )
        wait_seen(page, seen(page) + 3)
        count = answers(page).count()
        ask(page, "What is on the table?")
        expect(answers(page)).to_have_count(count + 1)
        expect(answers(page).last).to_contain_text("circle")
        page.locator('.cell[data-cell="0,0"]').focus()
        page.keyboard.press("Delete")
        expect(page.locator("#mood")).to_have_text("Listening")
        if page.locator(".entry del").count():
            break
    gone = page.locator(".entry del").first
    expect(gone).to_contain_text("circle")
    expect(page.locator(".entry .wait").first).to_have_text(re.compile(r"wait,"))
    # On the timeline stands what is true.
    assert "red circle" not in page.locator(".word.corrected").first.inner_text()


def test_silence_shows_and_an_alert_notifies(page, context):
    context.grant_permissions(["notifications"])
    page.evaluate(
        """() => {
          window.told = [];
          window.Notification = class {
            static permission = "default";
            static async requestPermission() { window.asked = true; return (this.permission = "granted"); }
            constructor(title, { body }) { window.told.push([title, body]); }
          };
          document.hasFocus = () => false;
        }"""
    )
    lay(page, ("circle", "red", "0,0"), ("star", "blue", "2,1"))
    page.click("#start")
    wait_seen(page, 2)
    expect(page.locator("#mood")).to_have_text("Listening")
    assert page.evaluate("window.asked") is None
    page.click("#notify")
    expect(page.locator("#notify")).to_have_attribute("aria-pressed", "true")
    ask(page, "Tell me when the star is gone.")
    expect(answers(page)).to_have_count(1)
    wait_seen(page, seen(page) + 2)
    page.locator('.cell[data-cell="2,1"]').focus()
    page.keyboard.press("Delete")
    expect(page.locator(".entry.alert")).to_have_text(re.compile("Now! The star is gone"))
    page.wait_for_function("() => window.told.length > 0")
    assert ["Now!", "Now! The star is gone."] in page.evaluate("window.told")
    expect(page.locator("#announce")).to_have_text("Now! The star is gone.")


def test_a_reload_goes_on_with_the_session(page):
    lay(page, ("circle", "red", "0,0"), ("star", "blue", "2,1"))
    page.click("#start")
    wait_seen(page, 3)
    ask(page, "What is on the table?")
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#mood")).to_have_text("Listening")
    said, before = answers(page).first.inner_text(), session_id(page)
    page.reload()
    # The table, the conversation and the stream are what they were.
    assert (
        page.locator('.cell[data-cell="2,1"]').get_attribute("aria-label") == "on the right, front: blue star"
    )
    expect(page.locator("#link")).to_have_text("Connected")
    assert answers(page).first.inner_text() == said
    assert page.locator("#thumbs figure").count() > 0
    wait_seen(page, 5)
    assert session_id(page) == before
    ask(page, "Was there a star?")
    expect(answers(page).nth(1)).to_contain_text("Yes")


def test_a_lost_connection_comes_back(page, link):
    lay(page, ("circle", "red", "0,0"), ("star", "blue", "2,1"))
    page.click("#start")
    wait_seen(page, 2)
    before = session_id(page)
    link.cut()
    expect(page.locator("#link")).to_have_attribute("data-state", re.compile("waiting|connecting"))
    expect(page.locator("#link")).to_contain_text("Trying again")
    page.wait_for_timeout(1500)
    link.mend()
    expect(page.locator("#link")).to_have_text("Connected")
    wait_seen(page, seen(page) + 2)
    assert session_id(page) == before
    ask(page, "What is on the table?")
    expect(answers(page).last).to_contain_text("star")


def test_a_session_that_is_gone_begins_anew(page):
    page.click("#start")
    wait_seen(page, 1)
    before = session_id(page)
    page.add_init_script(
        "const kept = sessionStorage['moss.session'];"
        "if (kept) sessionStorage['moss.session'] = kept.replace(/sess_.{8}/, 'sess_00000000');"
    )
    page.reload()
    expect(page.locator(".entry.note")).to_contain_text("could not be resumed")
    expect(page.locator("#link")).to_have_text("Connected")
    assert session_id(page) != before


def test_the_table_is_laid_by_keys_alone(page):
    lay(page)
    keys = page.keyboard

    def places() -> dict[str, str]:
        labels = [cell.get_attribute("aria-label") or "" for cell in page.locator(".cell").all()]
        return {place: thing for place, thing in (label.split(": ") for label in labels) if thing != "empty"}

    page.locator("#tray [data-kind=cross]").focus()
    keys.press("Enter")
    assert places() == {"on the left, back": "red cross"}
    # Taken, and laid two places to the right.
    page.locator('.cell[tabindex="0"]').focus()
    keys.press("Escape")
    for key in ("Enter", "ArrowRight", "ArrowRight", "Enter"):
        keys.press(key)
    assert places() == {"on the right, back": "red cross"}
    keys.press("c")
    assert places() == {"on the right, back": "green cross"}
    keys.press("v")
    assert places() == {"on the right, back": "something under the cloth"}
    expect(page.locator("#announce")).to_have_text("The cross is covered.")
    keys.press("v")
    keys.press("Delete")
    assert places() == {}
    page.locator("#tray [data-kind=card]").focus()
    keys.press("Enter")
    expect(page.locator("#pad")).to_be_visible()
    keys.press("7")
    keys.press("Enter")
    expect(page.locator("#pad")).to_be_hidden()
    assert list(places().values()) == ["card"]


def test_the_table_is_laid_by_touch(browser, link):
    context = browser.new_context(viewport=PHONE, has_touch=True)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{link.port}/")
    devtools = context.new_cdp_session(page)

    def middle(selector: str) -> dict[str, float]:
        box = page.locator(selector).bounding_box()
        assert box is not None
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    def swipe(start: dict[str, float], end: dict[str, float]) -> None:
        def touch(kind: str, *points: dict[str, float]) -> None:
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

        touch("touchStart", start)
        for share in (0.25, 0.5, 0.75, 1.0):
            touch("touchMove", {axis: start[axis] + share * (end[axis] - start[axis]) for axis in "xy"})
        touch("touchEnd")

    # The red circle that a new page has; and a new thing.
    swipe(middle('.cell[data-cell="0,0"]'), middle('.cell[data-cell="1,1"]'))
    expect(page.locator('.cell[data-cell="1,1"]')).to_have_attribute("aria-label", re.compile("red circle"))
    swipe(middle("#tray [data-kind=square]"), middle('.cell[data-cell="1,0"]'))
    expect(page.locator('.cell[data-cell="1,0"]')).to_have_attribute("aria-label", re.compile("square"))
    # Tapped, and laid where the next tap is.
    page.locator('.cell[data-cell="2,1"]').tap()
    page.locator('.cell[data-cell="0,0"]').tap()
    expect(page.locator('.cell[data-cell="0,0"]')).to_have_attribute("aria-label", re.compile("blue star"))
    context.close()


def test_files_are_watched(page, tmp_path):
    with av.open(DEMO) as container:
        next(container.decode(video=0)).to_image().save(tmp_path / "table.png")
    page.click("[data-source=file]")
    for file in (tmp_path / "table.png", DEMO):
        page.set_input_files("#pick", file)
        expect(page.locator("#seeing")).to_be_visible()
        wait_seen(page, seen(page) + 2)
    # What is no picture is told, and stops nothing.
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#pick", tmp_path / "notes.txt")
    expect(page.locator("#stage-note")).to_contain_text("cannot show")


def test_reduced_motion_and_themes(page):
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def wait_drawn(line: str) -> None:
        """Waits until the line under the memory, which is drawn on a canvas, has a colour."""
        script = """(line) => {
            const canvas = document.querySelector("#memory"), ratio = devicePixelRatio;
            const y = Math.floor((canvas.clientHeight - 16) * ratio);
            return canvas.getContext("2d").getImageData(9, y, 1, 1).data.join() === line;
        }"""
        page.wait_for_function(script, arg=line, timeout=PATIENCE)

    light, light_line = "rgb(243, 242, 236)", "220,219,208,255"
    dark, dark_line = "rgb(18, 21, 18)", "46,52,46,255"
    page.emulate_media(color_scheme="light")
    assert ground() == light
    wait_drawn(light_line)
    page.click("#theme")
    assert ground() == dark
    wait_drawn(dark_line)
    page.evaluate("localStorage.clear()")
    page.reload()
    assert ground() == light
    page.emulate_media(color_scheme="dark")
    assert ground() == dark
    wait_drawn(dark_line)
    page.click("#theme")
    assert ground() == light
    wait_drawn(light_line)
    page.reload()
    assert ground() == light
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.mood b')).animationName") == "none"


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The accessibility checker, from npm's registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm to get axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    result = subprocess.run(
        [npm, "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.skip(f"npm cannot get axe-core: {result.stderr.strip()[-200:]}")
    shutil.unpack_archive(folder / result.stdout.strip(), folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_anybody(browser, link, axe, theme, viewport):
    context = browser.new_context(viewport=viewport, color_scheme=theme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{link.port}/")

    def check() -> None:
        found = page.evaluate(axe + "\n;axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert not [
            (v["id"], [n["target"] for n in v["nodes"]])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]

    check()
    page.click("#start")
    page.wait_for_selector("#thumbs figure", timeout=PATIENCE)
    ask(page, "What is on the table?")
    page.wait_for_selector(".entry.answer[data-status=done]", timeout=PATIENCE)
    page.click('.cell[data-cell="0,0"]')
    check()
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#tray [data-kind=card]")
    check()
    page.click("#pad-cancel")
    for source in ("camera", "screen", "file"):
        page.click(f"[data-source={source}]")
        check()
    leave(page)
    context.close()
