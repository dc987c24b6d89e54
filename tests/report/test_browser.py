"""The page in a real headless Chromium: no errors, both widths, sorting, hovering, the keyboard,
dark, paper."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from mka.report import read_runs, write_pages

FillFolder = Callable[..., Path]
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="no Chromium with its driver here; on Debian: apt install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Any, full_folder: FillFolder, tmp_path: Path) -> Any:
    """The page of a made-up run, opened anew."""
    path = tmp_path / "page.html"
    write_pages(read_runs([full_folder(seeds=(0, 1))]), path, None)
    chromium.set_window_size(1280, 900)
    chromium.get(path.as_uri())
    return chromium


def column(page: Any, name: str) -> tuple[WebElement, Callable[[], list[str]]]:
    """The heading of that name, and what stands under it now."""
    heads = page.find_elements(By.CSS_SELECTOR, "#table thead th")
    number = next(index for index, head in enumerate(heads) if head.text.startswith(name))

    def cells() -> list[str]:
        rows = page.find_elements(By.CSS_SELECTOR, "#table tbody tr")
        return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in rows]

    return heads[number], cells


def tip(page: Any) -> str:
    return page.find_element(By.ID, "tip").text


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wrong_and_nothing_overflows(page: Any, width: int, tmp_path: Path) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.save_screenshot(str(tmp_path / f"{width}.png"))
        for chart in page.find_elements(By.CSS_SELECTOR, ".chart svg"):
            assert 0 < chart.rect["width"] <= width
            assert chart.rect["height"] > 100
        assert page.get_log("browser") == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_press_on_a_heading_sorts_by_its_numbers(page: Any) -> None:
    head, cells = column(page, "Cache B/token")
    button = head.find_element(By.TAG_NAME, "button")
    button.click()
    numbers = [float(text.replace(",", "")) for text in cells()]
    assert numbers == sorted(numbers)
    assert head.get_attribute("aria-sort") == "ascending"
    button.click()
    assert [float(text.replace(",", "")) for text in cells()] == sorted(numbers, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert page.get_log("browser") == []


def test_words_sort_by_the_alphabet_and_what_has_no_number_comes_last(page: Any) -> None:
    head, cells = column(page, "Mechanism")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert cells() == sorted(cells())
    head, cells = column(page, "Eval loss vs. baseline")
    for _ in range(2):
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
        assert cells()[-1] == "", "mha, which the others are set against"


def test_pointing_at_a_mark_shows_its_words(page: Any) -> None:
    for place in ("#perplexity-cache", "#cost-time", ".heat"):
        mark = page.find_element(By.CSS_SELECTOR, f"{place} path[aria-label]")
        page.execute_script(
            "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark
        )
        ActionChains(page).move_to_element(mark).perform()
        assert tip(page), place
        words = page.find_element(By.CSS_SELECTOR, ".on").get_attribute("aria-label")
        assert tip(page) == words
    page.execute_script("scrollTo({top: 0, behavior: 'instant'})")
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert tip(page) == ""
    assert page.get_log("browser") == []


def test_arrow_keys_walk_over_the_marks_of_the_figure_in_focus(page: Any) -> None:
    chart = page.find_element(By.CSS_SELECTOR, "#perplexity-cache .chart")
    page.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart
    )
    page.execute_script("arguments[0].focus({preventScroll: true})", chart)
    seen = []
    for _ in range(3):
        ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
        seen.append(tip(page))
    assert len(set(seen)) == 3
    assert all(text.partition(":")[0] in ("MHA", "MQA", "GQA") for text in seen)
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert tip(page) == ""


def test_the_words_stay_beside_their_mark_while_the_page_scrolls(page: Any) -> None:
    chart = page.find_element(By.CSS_SELECTOR, "#perplexity-cache .chart")
    page.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart
    )
    page.execute_script("arguments[0].focus({preventScroll: true})", chart)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    distance = """
        const box = (name) => document.querySelector(name).getBoundingClientRect();
        const [mark, tip] = [box(".on"), box("#tip")];
        return Math.abs(mark.top - tip.bottom);
    """
    before = page.execute_script(distance)
    page.execute_async_script("""
        scrollBy({top: 40, behavior: 'instant'});
        requestAnimationFrame(() => requestAnimationFrame(arguments[0]));
    """)
    assert page.execute_script(distance) == pytest.approx(before, abs=1)
    assert tip(page)


def test_the_tokens_of_a_passage_say_which_level_served_them(page: Any) -> None:
    word = page.find_element(By.CSS_SELECTOR, ".passage span")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", word)
    ActionChains(page).move_to_element(word).perform()
    assert tip(page).startswith("def: L1 0.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_ground(page: Any, scheme: str) -> None:
    """A contrast of 7 for text, of 3 for what is drawn (WCAG 2.1, 1.4.6 and 1.4.11)."""
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})

    def shade(name: str) -> float:
        script = """
            const probe = document.body.appendChild(document.createElement('i'));
            probe.style.color = `var(--${arguments[0]})`;
            const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
            probe.remove();
            return found;
        """
        parts = [value / 255 for value in page.execute_script(script, name)]
        linear = [
            part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    try:
        ground = shade("ground")
        assert (ground < 0.1) == (scheme == "dark")
        for name, least in {
            "text": 7,
            "soft": 4.5,
            "accent": 4.5,
            **dict.fromkeys(("mha", "mqa", "mka"), 3),
        }.items():
            lighter, darker = sorted((ground, shade(name)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= least, name
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_prints(page: Any) -> None:
    printed = page.execute_cdp_cmd(
        "Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True}
    )
    assert len(printed["data"]) > 20_000
    assert page.get_log("browser") == []
