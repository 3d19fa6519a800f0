"""The report, as text and in a real browser: what it says, that it fetches nothing, that nothing in the data becomes markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lrpfast.screening
from lrpfast.cli import screen
from lrpfast.errors import ScreeningError
from lrpfast.screening import embed, findings, report
from tests.screening_planted import Planted, model, screening

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    source = Planted()
    folder = screening(tmp_path_factory.mktemp("reported"), source)
    lrpfast.screening.analyse(folder)
    lrpfast.screening.verify(folder, source, model)
    report.write_report(folder, source)
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("other", [Planted(count=59), Planted(count=61)])
def test_another_source_is_refused(folder, other, tmp_path):
    """Its images would stand for samples that were not looked at."""
    before = {path: path.read_bytes() for path in folder.glob("[!.]*.*")}
    for use in (
        lambda: lrpfast.screening.verify(folder, other, model),
        lambda: report.write_report(folder, other),
        lambda: lrpfast.screening.export_virelay(folder, tmp_path / "virelay", other),
    ):
        with pytest.raises(
            ScreeningError, match=rf"the source is not what .* explained: {len(other)} samples, there 120"
        ):
            use()
    assert (
        before == {path: path.read_bytes() for path in folder.glob("[!.]*.*")} and not (tmp_path / "virelay").exists()
    )


class Reader(HTMLParser):
    """Collects elements with their attributes, and the text of all of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def decoded(uri: str) -> Image.Image:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB")


class TestPage:
    def test_it_opens_with_the_answer(self, folder, page, capsys):
        text = " ".join(" ".join(Reader(page).text).split())
        assert "1 of 2 classes rests on something that a small group of images shares" in text
        assert "in 8 of its 60 images the model looks at one place" in text
        moved = report.percent(findings.read(folder)["findings"][0]["effect"]["moved"]["value"])
        told = f"{moved} more of them to “ <b>right</b> ” than the same place of the class’s other images does."
        assert told.replace(" ", "") in text.replace(" ", "")
        assert "Samples 120 Classes" in text
        screen._tell_findings(lrpfast.screening.verify(folder, Planted(), model), Planted())
        said = capsys.readouterr().out
        assert said.startswith("suspicious: 1 group in 1 class\n")
        assert f"moves {moved} more of other images to this class, when it is pasted, than the same place" in said

    def test_groups_have_the_number_of_the_findings(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        content = findings.read(copy)
        content["findings"].reverse()
        (copy / "findings.json").write_text(json.dumps(content))
        page = report.write_report(copy, Planted()).read_text(encoding="utf-8")
        by_class = report.rank_classes(content["findings"])
        numbers = [[entry["group"] for entry in entries] for entries in by_class]
        assert [int(number) for number in re.findall(r"Group (\d+): ", page)] == sum(numbers, [])
        assert numbers != [[*range(len(own))] for own in numbers]
        data = json.loads(next(text for text in Reader(page).text if text.startswith("[{")))
        assert [plot["numbers"] for plot in data] == numbers

    def test_it_says_how_many_images_were_skipped(self, tmp_path):
        source = Planted()
        folder = screening(tmp_path, source, skipped=(3, 5))
        lrpfast.screening.analyse(folder)
        lrpfast.screening.verify(folder, source, model)
        text = report.write_report(folder, source).read_text(encoding="utf-8")
        assert "120, of which 2 could not be read or explained: skipped.jsonl says why" in text

    def test_an_answer_that_no_map_shows(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        content = json.loads((copy / "findings.json").read_text())
        for entry in content["findings"]:
            entry["told_by"] = "features"
        (copy / "findings.json").write_text(json.dumps(content))
        report.write_report(copy, Planted())
        text = " ".join(" ".join(Reader((copy / "report.html").read_text(encoding="utf-8")).text).split())
        assert "in 8 of its 60 images the model relies on features that the others do not have" in text
        assert "Pasted from where their maps differ most into images of other classes" in text

    def test_it_says_what_no_map_shows(self, folder, page):
        entries = findings.read(folder)["findings"]
        told = [
            entry["told_by"] for entry in sorted(entries, key=lambda entry: (-entry["class"]["index"], entry["rank"]))
        ]
        said = [
            "no map" if "Told by the relevance" in part else "maps"
            for part in page.split('<p class="hint">Suspicion ')[1:]
        ]
        assert said == ["no map" if by == "features" else "maps" for by in told] and "no map" in said and "maps" in said

    def test_classes_stand_in_the_order_of_the_findings(self, folder, page):
        order = [entries[0]["class"]["index"] for entries in report.rank_classes(findings.read(folder)["findings"])]
        assert order == [1, 0]
        assert [int(label) for label in re.findall(r'<section class="class" id="class-(\d+)"', page)] == order

    def test_nothing_is_fetched(self, page):
        for tag, attributes in Reader(page).elements:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                value = attributes.get(name)
                if value is not None:
                    allowed = ("data:", "#") if tag != "a" else ("#", "file:///")
                    assert value.startswith(allowed), f"<{tag} {name}={value[:60]}>"
        assert "@import" not in page
        assert not re.search(r"url\((?!data:)", page)

    def test_names_and_paths_are_escaped(self, page):
        reader = Reader(page)
        assert "i" not in {tag for tag, attributes in reader.elements if not attributes}  # of a path "<i>"
        assert "<b>right" not in page
        assert "&lt;b&gt;right&lt;/b&gt;" in page
        links = [
            attributes["href"] for tag, attributes in reader.elements if tag == "a" and "file:" in attributes["href"]
        ]
        assert "file:///data/001%20%3Ci%3E%27%26%22.png" in links
        data = next(text for text in reader.text if text.startswith("[{"))
        assert "<" not in data
        assert json.loads(data)[0]["name"][0] == "001 <i>'&\".png"

    def test_maps_are_in_the_colours_of_relevance(self, folder, page):
        maps = [a["src"] for tag, a in Reader(page).elements if tag == "img" and a.get("class") == "map"]
        first = np.asarray(decoded(maps[0])).astype(int)
        assert first.shape == (16, 16, 3)
        assert first[1, 1].tolist() == [255, 0, 0]  # the tag
        assert first[10, 2].min() > 240  # where nothing is

    def test_the_region_is_outlined(self, page):
        picture = next(
            a["src"] for tag, a in Reader(page).elements if tag == "img" and "outlined" in (a.get("alt") or "")
        )
        pixels = np.asarray(decoded(picture))
        scale = pixels.shape[0] // 16
        assert pixels[scale, scale].tolist() == [0, 0, 0]
        assert pixels[2 * scale, 2 * scale].tolist() == [255, 0, 0]

    def test_without_images_it_says_so_and_shows_maps(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        path = report.write_report(copy)  # "planted" cannot be opened again
        text = path.read_text(encoding="utf-8")
        assert "The images are not shown" in text
        assert 'class="map"' in text
        assert 'class="photo"' not in text

    def test_images_that_vanished_are_left_out(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        source = Planted()
        source.gone = set(range(0, 120, 3))
        text = report.write_report(copy, source).read_text(encoding="utf-8")
        assert text.count('class="map"') > text.count('class="photo"') > 0

    def test_few_classes_can_be_shown(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        text = report.write_report(copy, Planted(), classes=1, images=2).read_text(encoding="utf-8")
        assert len(re.findall('<section class="class"', text)) == 1
        assert "left &amp; first" in text  # in the ranking

    def test_nothing_found(self, folder, tmp_path):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        content = findings.read(copy)
        content["findings"] = []
        (copy / "findings.json").write_text(json.dumps(content))
        text = report.write_report(copy, Planted()).read_text(encoding="utf-8")
        assert "No group of images was found" in text

    @pytest.mark.parametrize(
        ("low", "said"),
        [
            (0.3, "1 group has such an effect, but lies nearer than that: worth a look."),
            (0.05, "No group has such an effect."),
            (None, "No group has such an effect."),
        ],
    )
    def test_nothing_flagged(self, folder, tmp_path, low, said):
        copy = tmp_path / "screen"
        shutil.copytree(folder, copy)
        content = findings.read(copy)
        for entry in content["findings"]:
            entry["flagged"] = False
            entry["effect"]["moved"]["low"] = None
        content["findings"][0]["effect"]["moved"]["low"] = low
        (copy / "findings.json").write_text(json.dumps(content))
        text = " ".join(Reader(report.write_report(copy, Planted()).read_text(encoding="utf-8")).text)
        text = " ".join(text.split())
        assert (
            "None is both far from the rest of its class (13 standard deviations or more) and sure to move more" in text
        )
        assert f"more than 5% of other images to it when it is pasted. {said} They are listed below." in text

    def test_without_findings_it_says_what_to_do(self, tmp_path):
        source = Planted(count=10)
        with pytest.raises(ScreeningError, match="no findings yet; start the screening again"):
            report.write_report(screening(tmp_path, source), source)


class TestPicture:
    def test_large_classes_are_drawn_in_part_with_what_is_suspicious(self):
        groups = np.zeros((2, 5000), dtype=bool)
        groups[0, 4990:] = True
        chosen = embed.chosen_points(groups, 100)
        assert len(chosen) == 100
        assert set(range(4990, 5000)) <= set(chosen.tolist())
        assert (np.diff(chosen) > 0).all()

    @pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
    def test_points_lie_in_the_unit_square(self, count):
        places = embed.picture(np.random.default_rng(0).normal(size=(count, min(count, 4))))
        assert places.shape == (count, 2)
        assert places.min() >= 0
        assert places.max() <= 1

    def test_equal_points(self):
        assert np.isfinite(embed.picture(np.ones((30, 3)))).all()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver, which drives Chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.add_argument("--window-size=1200,1600")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the report in")
class TestBrowser:
    @pytest.fixture
    def opened(self, browser, folder):
        browser.get_log("performance")
        browser.get((folder / "report.html").as_uri())
        return browser

    def test_no_errors_and_no_request_but_for_the_file(self, opened, folder):
        assert opened.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
        page = (folder / "report.html").as_uri()
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        # Of this page: the browser's own first tab may still ask for its parts.
        asked = {request["request"]["url"] for request in sent if request["documentURL"] == page}
        assert {url for url in asked if not url.startswith("data:")} == {page}

    def test_every_picture_is_drawn(self, opened):
        broken = opened.execute_script("return [...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        assert broken == 0

    def test_the_answer_is_on_the_first_screen(self, opened):
        bottom = opened.execute_script("return document.querySelector('tr.flagged').getBoundingClientRect().bottom")
        assert bottom < 800
        title = opened.find_element("css selector", "h1").text
        assert title.startswith("1 of 2 classes rests on")

    def test_points_can_be_hovered(self, opened):
        from selenium.webdriver import ActionChains

        plot = opened.find_element("css selector", ".scatter")
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        marks = _until(lambda: plot.find_elements("css selector", "circle"))
        assert len(marks) == 60
        ActionChains(opened).move_to_element(marks[-1]).perform()
        tip = opened.find_element("css selector", ".tip")
        assert tip.is_displayed()
        assert re.search(r"\n-?\d+% as clear as a typical image of the farthest group$", tip.text)
        assert "<i>'&\".png" in tip.text  # text, not markup

    def test_the_scatter_zooms_and_resets(self, opened):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

        plot = opened.find_element("css selector", ".scatter")
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        svg = _until(lambda: plot.find_elements("css selector", "svg"))[0]
        place = "return [...arguments[0].querySelectorAll('circle')].map(c => c.getAttribute('cx')).join()"
        before = opened.execute_script(place, svg)
        ActionChains(opened).scroll_from_origin(ScrollOrigin.from_element(svg), 0, -400).perform()
        assert float(_until(lambda: svg.get_attribute("data-side") != "1" and svg.get_attribute("data-side"))) < 0.7
        assert opened.execute_script(place, svg) != before
        ActionChains(opened).double_click(svg).perform()
        assert opened.execute_script(place, svg) == before

    def test_eigenvalues_are_drawn_with_the_gap(self, opened, folder):
        plot = opened.find_element("css selector", ".spectrum")
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        assert len(_until(lambda: plot.find_elements("css selector", "circle"))) == 12
        assert "gap" in plot.text


def _until(ask, seconds: float = 5.0):
    import time

    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
