"""The page in headless Chromium, opened from a file as a user would."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refluence.report import Presentation, write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
    "--window-size=1280,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.downloads = folder / "downloads"  # type: ignore[attr-defined]
    behaviour = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(path, digits.influence, digits.scores, digits.train, digits.test, suspicious=30).as_uri()


@pytest.fixture
def opened(browser: Any, page: str) -> Iterator[Any]:
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(page)
    yield browser
    assert browser.get_log("browser") == []


def all_(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def shown(browser: Any, selector: str) -> list[Any]:
    return [element for element in all_(browser, selector) if element.is_displayed()]


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def focused(browser: Any) -> Any:
    return browser.switch_to.active_element


def test_opens_on_the_predictions(opened: Any) -> None:
    assert "Refluence" in opened.title
    assert [panel.get_attribute("id") for panel in shown(opened, "[role=tabpanel]")] == ["predictions"]
    assert len(shown(opened, ".card")) == 8
    assert one(opened, "#found").text == "8 examples"


def test_pictures_are_there(opened: Any) -> None:
    script = """return [...document.querySelectorAll('.card:first-of-type .pic')].filter(p =>
        !getComputedStyle(p).backgroundImage.startsWith('url("data:image/png') || p.offsetHeight < 20).length"""
    assert opened.execute_script(script) == 0


def test_tabs_by_mouse_and_link(opened: Any, page: str) -> None:
    one(opened, "#tab-suspicious").click()
    assert one(opened, "#suspicious").is_displayed()
    assert not one(opened, "#predictions").is_displayed()
    assert opened.current_url.endswith("#suspicious")
    opened.get("about:blank")
    opened.get(page + "#method")
    assert [panel.get_attribute("id") for panel in shown(opened, "[role=tabpanel]")] == ["method"]
    opened.execute_script("location.hash = arguments[0]", one(opened, ".index a").get_attribute("hash"))
    time.sleep(0.2)
    assert one(opened, "#predictions").is_displayed()
    assert focused(opened).get_attribute("class") == "card"


def test_everything_by_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(opened, Keys.TAB)
    assert focused(opened).get_attribute("class") == "skip"
    press(opened, Keys.ENTER)
    press(opened, Keys.TAB)
    assert focused(opened).get_attribute("id") == "tab-predictions"
    assert opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(opened, Keys.ARROW_RIGHT)
    assert focused(opened).get_attribute("aria-selected") == "true"
    assert one(opened, "#suspicious").is_displayed()
    press(opened, Keys.END)
    assert focused(opened).get_attribute("id") == "tab-method"
    press(opened, Keys.ARROW_RIGHT)
    assert focused(opened).get_attribute("id") == "tab-predictions"
    press(opened, Keys.TAB, "row", Keys.TAB, Keys.TAB, Keys.SPACE)
    assert focused(opened).get_attribute("data-filter") == "wrong"
    assert focused(opened).get_attribute("aria-pressed") == "true"
    assert len(shown(opened, ".card")) == 3


@pytest.fixture(scope="module")
def checked(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    from refluence.evaluation.verification import verify

    path = tmp_path_factory.mktemp("checked") / "report.html"
    test = tuple(part[digits.scores.test_ids] for part in digits.test)
    found = verify(digits.influence, digits.scores, test, 4, progress=False)
    f = digits
    return write_report(path, f.influence, f.scores, f.train, f.test, suspicious=5, verification=found).as_uri()


def test_the_banner_leads_to_the_checks(browser: Any, checked: str) -> None:
    browser.get_log("browser")
    browser.get(checked)
    assert one(browser, "#trust").text.split("\n")[-1].startswith("Checked")
    one(browser, ".trust .go a").click()
    assert [panel.get_attribute("id") for panel in shown(browser, "[role=tabpanel]")] == ["checked"]
    scatter = one(browser, "#checked svg")
    assert scatter.accessible_name.startswith("Measured against predicted change")
    assert scatter.rect["width"] > 300
    assert len(shown(browser, "#checked .removed .thumb")) == 4
    one(browser, ".numbers summary").click()
    assert len(shown(browser, ".numbers tbody tr")) == 4 * 8
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_checks_need_no_horizontal_scroll(browser: Any, checked: str, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get("about:blank")
        browser.get(f"{checked}#checked")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_search_filter_and_order(opened: Any, digits: Any) -> None:
    one(opened, "[data-filter=wrong]").click()
    assert [card.get_attribute("data-wrong") for card in shown(opened, ".card")] == ["yes"] * 3
    assert len(shown(opened, ".index li")) == 3
    assert one(opened, "#found").text == "3 of 8 examples"
    find = one(opened, "#find")
    find.send_keys("no such thing")
    assert shown(opened, ".card") == []
    one(opened, "#reset").click()
    assert len(shown(opened, ".card")) == 8
    row = int(digits.scores.test_ids[5])
    find.send_keys(f"row {row}")
    assert f"test-{row}" in [card.get_attribute("id") for card in shown(opened, ".card")]
    one(opened, "#order [value=loss]").click()
    losses = [float(card.get_attribute("data-loss")) for card in all_(opened, ".card")]
    assert losses == sorted(losses, reverse=True)
    one(opened, "#order [value=given]").click()
    assert [card.get_attribute("id") for card in all_(opened, ".card")] == [f"test-{r}" for r in digits.scores.test_ids]


def test_suspicious_table_sorts_and_filters(opened: Any) -> None:
    one(opened, "#tab-suspicious").click()
    header = one(opened, "[data-key=loss]")
    for direction, reverse in (("descending", True), ("ascending", False)):
        header.click()
        assert one(opened, "th:has([data-key=loss])").get_attribute("aria-sort") == direction
        losses = [float(cell.get_attribute("data-loss")) for cell in all_(opened, "td[data-loss]")]
        assert losses == sorted(losses, reverse=reverse)
    assert len(all_(opened, "th[aria-sort=ascending], th[aria-sort=descending]")) == 1
    choice = all_(opened, "#class option")[1]
    choice.click()
    assert {row.get_attribute("data-label") for row in shown(opened, "#suspects tbody tr")} == {choice.text}
    one(opened, "#class option").click()
    one(opened, "#disagree").click()
    rows = shown(opened, "#suspects tbody tr")
    assert len(rows) > 0
    assert {row.get_attribute("data-differs") for row in rows} == {"yes"}
    assert one(opened, "#listed").text.startswith(f"{len(rows)} ")


def test_csv_download_holds_all_rows_whatever_is_filtered(opened: Any) -> None:
    one(opened, "#tab-suspicious").click()
    all_(opened, "#class option")[1].click()
    one(opened, "#export").click()
    path = opened.downloads / "suspicious.csv"
    for _ in range(50):
        if path.exists() and path.stat().st_size:
            break
        time.sleep(0.1)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 31))


@pytest.mark.parametrize("width", [1280, 390, 360])
@pytest.mark.parametrize("kind", ["image", "text", "table"])
def test_no_horizontal_scroll(browser: Any, digits: Any, tmp_path: Path, width: int, kind: str) -> None:
    words = "a_very_long_word_without_any_place_to_break_" * 8
    options: dict[str, Any] = {
        "image": {},
        "text": {"text": lambda s: words, "class_names": [words] * 10},
        "table": {"feature_names": [words] * 64},
    }
    presentation = Presentation(kind=kind, **options[kind])  # type: ignore[arg-type]
    file = tmp_path / "report.html"
    write_report(file, digits.influence, digits.scores, digits.train, digits.test, presentation=presentation, top=3)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for part in ("predictions", "suspicious", "method"):
            browser.get("about:blank")
            browser.get(f"{file.as_uri()}#{part}")
            widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
            assert widths[0] == width, part
            assert widths[1] <= width, part
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_planted_scripts_do_nothing(browser: Any, bag: Any, hostile: str, tmp_path: Path) -> None:
    f = bag
    names = [hostile, "<script>window.pwned=1</script>"]
    presentation = Presentation(text=lambda s: hostile, class_names=names)
    browser.get_log("browser")
    file = tmp_path / "report.html"
    write_report(
        file,
        f.influence,
        f.scores,
        f.train,
        f.test,
        presentation=presentation,
        title=hostile,
        notes=[hostile, names[1]],
    )
    browser.get(file.as_uri())
    for tab in all_(browser, "[role=tab]"):
        tab.click()
    for option in all_(browser, "#class option"):
        browser.execute_script(
            "arguments[0].selected = true; arguments[0].parentElement.dispatchEvent(new Event('change'))", option
        )
    assert browser.execute_script("return typeof window.pwned") == "undefined"
    assert all_(browser, "img") == []
    assert "<script>window.pwned=1</script>" in one(browser, "body").get_attribute("textContent")
    assert browser.get_log("browser") == []


def test_without_scripts_everything_is_on_the_page(browser: Any, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get("about:blank")
        browser.get(page)
        assert len(shown(browser, "[role=tabpanel]")) == 3
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("verified", [False, True])
def test_dark_scheme_and_contrast(opened: Any, checked: str, verified: bool) -> None:
    if verified:
        opened.get(checked)
    ratio = """
      const of = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
      let least = [99, ''];
      for (const e of document.querySelectorAll(arguments[0])) {
        if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
        const [a, b] = [of(getComputedStyle(e).color), of(ground(e))].sort((x, y) => y - x);
        const value = (a + .05) / (b + .05);
        if (value < least[0]) least = [value, e.outerHTML.slice(0, 80)];
      }
      return least;"""
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        time.sleep(0.3)
        ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(17, 19, 22)") == (scheme == "dark")
        for tab in all_(opened, "[role=tab]"):
            tab.click()
            time.sleep(0.3)
            least, where = opened.execute_script(ratio, "body *")
            assert least >= 4.5, (scheme, where)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_controls_have_names(opened: Any) -> None:
    for tab in all_(opened, "[role=tab]"):
        tab.click()
        for element in shown(
            opened,
            "button, input, select, [role=tabpanel], [role=region], nav, article, .card:first-of-type [role=img]",
        ):
            outer = element.get_attribute("outerHTML")[:120]
            assert element.accessible_name.strip(), outer
