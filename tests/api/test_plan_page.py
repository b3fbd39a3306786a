"""The page of a plan: what it holds, how large it is, and that a browser draws it without a complaint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ms_ckpt_ext.api.dry_run.plan import plan
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from tests.harness.browser import chromium, open_page

needs_browser = pytest.mark.skipif(chromium() is None, reason="needs Chromium (apt-get install chromium)")
EVIL = ['</script><img src=x onerror="alert(1)">', "a'\"&<b>\u2028\u2029", "${alert(1)}`", "\U0001f600 重み", "<!--"]


def small(golden: Path, page: Path) -> None:
    source = golden / "dp2_tp2_pp2_zero"
    target = golden / "dp3_tp8/strategy.ckpt"
    plan(source / "shards", target, src_strategy=source / "strategy.ckpt", html=page, bucket_bytes=1 << 16)


def named(names: list[str], layout: Layout, page: Path) -> None:
    """A plan of parameters of any names."""
    shapes = {name: {"dtype": "F32", "shape": [64, 64]} for name in names}
    strategy = Strategy.from_items([LayoutItem(name, 0, layout) for name in names], "<i>s</i>")
    plan(None, strategy, src_strategy=strategy, shapes=shapes, html=page)


def embedded(page: Path) -> dict:
    """The data in a page, read as a browser's parser would find its script."""
    (script,) = re.findall(r"<script>(.*?)</script", page.read_text(), re.DOTALL)
    line = next(line for line in script.splitlines() if line.startswith("const data = "))
    return json.loads(line[len("const data = ") : -1])


def test_what_a_page_holds(golden: Path, tmp_path: Path) -> None:
    small(golden, tmp_path / "plan.html")
    data = embedded(tmp_path / "plan.html")
    report = data["report"]
    assert (report["ranks"], report["files"], report["rounds"]) == (24, 8, sum(r["count"] for r in data["rounds"]))
    assert len(data["traffic"]["cells"]) == 24
    assert sum(map(sum, data["traffic"]["cells"])) == report["cooperative"]["sent"]["total"]
    assert sum(map(sum, data["reading"]["cells"])) == report["cooperative"]["read"]["total"] == report["unique"]
    assert len(data["parameters"]) == report["parameters"] == 42
    names = {parameter[0]: parameter for parameter in data["parameters"]}
    _, dtype, shape, held, wanted = names["layers.0.wqkv.weight"]
    assert (dtype, shape) == ("F32", [72, 24])
    assert data["layouts"][held]["parts"] == [4, 1]
    assert data["layouts"][wanted]["parts"] == [8, 1]
    assert data["layouts"][wanted]["boxes"][0] == [0, 0, 0, 3, "0, 8, 16"]


def test_names_cannot_break_out(tmp_path: Path) -> None:
    named(EVIL, Layout((2, 2), ((0,), ())), tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text.count("</script") == 1 and "<img" not in text
    assert [parameter[0] for parameter in embedded(tmp_path / "plan.html")["parameters"]] == EVIL


def test_a_large_page_stays_small(tmp_path: Path) -> None:
    """2,048 ranks, 2,400 parameters."""
    named(
        [f"backbone.layers.{n}.feed_forward.weight" for n in range(2400)],
        Layout((64, 32), ((0,), ())),
        tmp_path / "p",
    )
    assert (tmp_path / "p").stat().st_size < 400_000
    data = embedded(tmp_path / "p")
    assert len(data["traffic"]["cells"]) == 64 and data["traffic"]["group"] == 32
    assert max(len(layout["boxes"]) for layout in data["layouts"]) <= 32 * 32


def test_nothing_is_fetched(golden: Path, tmp_path: Path) -> None:
    small(golden, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    before, after = text.split("const data = ", 1)
    outside = before + after.split("\n", 1)[1]
    assert set(re.findall(r"https?://[^\"' ]+", outside)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(scheme: str, golden: Path, tmp_path: Path) -> None:
    small(golden, tmp_path / "plan.html")
    picture = tmp_path / "plan.png"
    dark = "--blink-settings=preferredColorScheme=0"
    dom, console = open_page(tmp_path / "plan.html", f"--screenshot={picture}", *([dark] * (scheme == "dark")))
    assert console == []
    assert 'data-ready="yes"' in dom
    assert "Load of 42 parameters by 24 ranks" in dom
    assert dom.count("<option") == 42
    assert len(re.findall(r'<div class="machine">', dom)) == 7
    assert dom.count("<rect") > 10


HANDS = """
<script>
const type = (element, value, kind) => { element.value = value; element.dispatchEvent(new Event(kind)); };
type(byId("filter"), "layers.1.", "input");
type(byId("parameter"), byId("parameter").options[3].value, "change");
const box = document.querySelector("#to rect").parentNode;
box.dispatchEvent(new MouseEvent("mousemove", { clientX: 50, clientY: 50 }));
</script></body>"""


@needs_browser
def test_a_parameter_is_chosen_and_pointed_at(golden: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    small(golden, page)
    names = [parameter[0] for parameter in embedded(page)["parameters"] if "layers.1." in parameter[0]]
    page.write_text(page.read_text().replace("</body>", HANDS))
    dom, console = open_page(page)
    assert console == []
    options = re.findall(r"<option[^>]*>(\S+)", dom)
    assert options == names
    (tip,) = re.findall(r'<div id="tip"[^>]*visible[^>]*>(.*?)</div>', dom, re.DOTALL)
    assert re.match(r"(rank|3 ranks|24 ranks)", tip)


@needs_browser
@pytest.mark.parametrize("shape", [[0, 4], [], [3]])
def test_hardly_anything_to_load(shape: list[int], tmp_path: Path) -> None:
    """No elements, a scalar, a single axis."""
    report = plan(None, None, shapes={"w": {"dtype": "F32", "shape": shape}}, html=tmp_path / "plan.html")
    assert (report.ranks, len(report.rounds)) == (1, int(shape != [0, 4]))
    dom, console = open_page(tmp_path / "plan.html")
    assert console == []
    assert 'data-ready="yes"' in dom


@needs_browser
def test_a_browser_shows_names_as_they_are(tmp_path: Path) -> None:
    named(EVIL, Layout((2, 2), ((0,), ())), tmp_path / "plan.html")
    dom, console = open_page(tmp_path / "plan.html")
    assert console == []
    assert 'data-ready="yes"' in dom
    options = re.findall(r"<option[^>]*>(.*?)</option>", dom, re.DOTALL)
    assert len(options) == len(EVIL)
    assert options[0].startswith('&lt;/script&gt;&lt;img src=x onerror="alert(1)"&gt;')
    assert "<img" not in dom
