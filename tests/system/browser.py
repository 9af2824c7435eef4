"""A page in Debian's headless Chromium: what overlaps, what is empty, what the console says, and its background."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
LOOKS = [
    (1280, False),
    (1280, True),
    (520, False),
]  # width of the window, dark; a phone is narrower than Chromium can be

_MEASURE = """<script>
addEventListener("load", () => {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth + 1) found.push("wider than the window");
  for (const e of document.querySelectorAll("svg, figure, td.number, .tile")) {
    if (!e.checkVisibility()) continue;  // a phone has no room for the bars
    const box = e.getBoundingClientRect();
    if (box.width < 8 || box.height < 8) found.push("empty " + e.tagName + " " + e.className);
  }
  const meet = (p, q, room) =>
    p.left < q.right - room && q.left < p.right - room && p.top < q.bottom - room && q.top < p.bottom - room;
  const apart = [...document.querySelectorAll(".tile, .chart, article, h2, .scroll")];
  for (const a of apart) for (const b of apart)
    if (a !== b && meet(a.getBoundingClientRect(), b.getBoundingClientRect(), 1))
      found.push("overlap of " + a.className + " and " + b.className);
  for (const svg of document.querySelectorAll("figure svg")) {
    const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
    for (const a of texts) for (const b of texts)
      if (a !== b && meet(a.getBoundingClientRect(), b.getBoundingClientRect(), 2))
        found.push("overlap of the words " + a.textContent.trim() + " and " + b.textContent.trim());
    if (!svg.querySelector("path, line, rect, use")) found.push("a figure without a mark");
  }
  document.body.dataset.found = [...new Set(found)].join("; ") || "nothing";
  document.body.dataset.page = getComputedStyle(document.body).backgroundColor;
});
addEventListener("error", e => { document.title = "console error " + e.message; });
</script>"""


def check_in_browser(text: str, folder: Path, width: int, dark: bool) -> None:
    """Opens a page of this HTML; asserts that nothing overlaps or is empty, no message, and the right background."""
    page = folder / "page.html"
    page.write_text(text.replace("</head>", f"{_MEASURE}</head>"), encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=4000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, "the browser's console has messages"
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    colour = re.search(r'data-page="rgb\((\d+)', done.stdout)
    assert found is not None and colour is not None, "the page did not finish loading"
    assert found[1] == "nothing", found[1]
    assert (int(colour[1]) < 64) == dark
