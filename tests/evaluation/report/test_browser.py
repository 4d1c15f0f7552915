"""The page in a browser: it renders from disk, light, dark and on paper, with every picture."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from evaluation.report.page import write_report
from tests.evaluation.report.folders import make_evaluation, make_quickstart

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here (.ci/install_chromium)"),
]
DARK = "--blink-settings=preferredColorScheme=0"
# Added to a copy of the page: the page itself has no script.
PROBE = """<script>
addEventListener("load", () => {
  const widths = [...document.images].map(image => image.naturalWidth);
  const boxes = [...document.querySelectorAll("table, svg, .protocol")];
  const seen = boxes.map(box => box.getBoundingClientRect().height > 10);
  const asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
  document.body.dataset.widths = widths.join(" ");
  document.body.dataset.seen = seen.every(Boolean) + " " + seen.length;
  document.body.dataset.asked = asked.length;
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
});
</script></body>"""


def browse(page: Path, profile: Path, *flags: str) -> str:
    quiet = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        # Whatever the page might ask for is nowhere to be found.
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
        f"--user-data-dir={profile}",
    ]
    command = [str(BROWSER), *quiet, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_quickstart(tmp_path_factory.mktemp("quickstart") / "runs")
    make_evaluation(folder / "judged")
    return write_report(folder)


@pytest.mark.parametrize("width", [1200, 420])
def test_everything_is_shown_and_nothing_asked_for(page: Path, tmp_path: Path, width: int) -> None:
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", PROBE))
    dom = browse(copy, tmp_path / "profile", f"--window-size={width},900", "--dump-dom")
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', dom))
    assert sorted(map(int, told["widths"].split())) == [80, 90], (
        "both pictures, at their own widths"
    )
    assert told["seen"] == "true 15" and told["asked"] == "0"
    assert int(told["overflow"]) <= 0, "nothing sticks out at the side"


def test_it_follows_the_readers_colours(page: Path, tmp_path: Path) -> None:
    """Light or dark by preference; neither is blank."""
    corners = []
    for name, flags in (("light", ()), ("dark", (DARK,))):
        shot = tmp_path / f"{name}.png"
        browse(page, tmp_path / name, "--window-size=1000,1400", f"--screenshot={shot}", *flags)
        with Image.open(shot) as picture:
            assert picture.size == (1000, 1400)
            corners.append(picture.convert("L").getpixel((2, 2)))
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert len(colours) > 100 and (0, 128, 128) in {colour for _, colour in colours}
    assert corners[0] > 240 and corners[1] < 60


def test_it_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper.pdf"
    browse(page, tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    assert len(content) > 20_000
