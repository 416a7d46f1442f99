"""Notebooks 01, its panel, and 04 in a real browser: JupyterLab on loopback, driven through headless Chromium.

usage: python tests/browser/drive.py

Runs all with a tiny model, re-runs one cell with another length, then works the panel: slider, Run, Stop, what fits and
which to take; then 04, from its limits to the line that loads the answer. Every step is checked and leaves a screenshot
in build/browser, in JupyterLab's light theme and at the end in its dark one.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from playwright.sync_api import Locator, Page, expect, sync_playwright

from quantbench.charts import CHARTS
from quantbench.settings import more_settings

ROOT = Path(__file__).parent.parent.parent
SMALL = {  # notebook -> parameters that take seconds
    "01_quantization_benchmark.ipynb": {"models": ["./tiny-gpt2"], "max_new_tokens": [4], "compare_tokens": 5,
                                        "cell_budget_s": 0.1, "results": "rows.jsonl"},
    "04_choose.ipynb": {"model": "./tiny-gpt2", "max_new_tokens": 8, "settings": ["cpu-fp32", "cpu-int8-dynamic"],
                        "results": "chosen.jsonl"}}
FIRST, LAST = SMALL
SHOTS = ROOT / "build" / "browser"
# small, but it can be asked for a thousand tokens: that is the long cell
MODEL = {"model_type": "gpt2", "n_layer": 8, "n_head": 4, "n_embd": 64, "n_positions": 1100, "vocab_size": 500,
         "bos_token_id": 0, "eos_token_id": 0}
SETTINGS = {  # every cell is in the page, not only those in view; and nothing pops up over it
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WORKING_S = 400  # for what takes 30 s on a quiet machine
IN_NOTEBOOK = 4  # charts


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium here: install your system's chromium package")
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir(parents=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home, served(Path(home)) as (address, server), sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1360, "height": 2000})
        try:
            page.goto(address.format("tree", FIRST))
            run_all(page)
            look_at_first(page)
            rerun_one_cell(page)
            use_panel(page, server)
            choose(browser.new_page(viewport=page.viewport_size), address.format("workspaces/two/tree", LAST))
            dark(page)
        except BaseException:
            page.screenshot(path=SHOTS / "failed.png")
            raise
        browser.close()
    print(f"notebooks 01 and 04 in a browser: all well in {time.monotonic() - start:.0f} s; screenshots in {SHOTS}")


# ---- the server ----

@contextlib.contextmanager
def served(home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """JupyterLab with tiny copies of the notebooks: the address to open, and the server's process."""
    shrink(home)
    for plugin, values in SETTINGS.items():
        path = home / "lab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "lab"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_TOKEN": token, "HF_HUB_OFFLINE": "1", "QUANTBENCH_CACHE": str(home / "cache")}
    with (SHOTS / "jupyter.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                                    "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}"],
                                   env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", process)
        yield f"http://127.0.0.1:{port}/lab/{{}}/{{}}?token={token}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def shrink(home: Path) -> None:
    """Copies of the notebooks with SMALL parameters."""
    (home / "tiny-gpt2").mkdir()
    (home / "tiny-gpt2" / "config.json").write_text(json.dumps(MODEL))
    for name, small in SMALL.items():
        book = json.loads((ROOT / "notebooks" / name).read_text())
        cell = next(cell for cell in book["cells"] if "parameters" in cell["metadata"].get("tags", []))
        cell["source"] = "".join(f"{key} = {small[key]!r}\n" if (key := line.split(" = ")[0]) in small else line
                                 for line in cell["source"])
        (home / name).write_text(json.dumps(book))


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(120):
        if process.poll() is not None:
            raise SystemExit(f"JupyterLab ended: see {SHOTS / 'jupyter.log'}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise SystemExit("JupyterLab does not answer")


# ---- what a person does and sees ----

def run_all(page: Page) -> None:
    expect(page.locator(".jp-Notebook .jp-CodeCell").last).to_be_visible(timeout=60_000)
    expect(page.get_by_text(re.compile(r"^Python 3 .*\| Idle$"))).to_be_visible(timeout=60_000)  # not just "no kernel"
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    expect(page.locator(".jp-CodeCell .jp-InputPrompt").last).to_have_text(re.compile(r"\[\d+\]:"),
                                                                          timeout=WORKING_S * 1000)
    no_errors(page)


def look_at_first(page: Page) -> None:
    shot(cell(page, "qb.show(run)"), "1-table")
    rows = table(cell(page, "qb.show(run)"))
    more = len(more_settings({}))  # CPU FP32 by itself, and in turns with the CPU's own; the GPU's are a line
    assert len(rows) == 2 + more and all(row[3] != "–" for row in rows), rows
    expect(cell(page, "qb.show(run)").get_by_text("Not here: GPU FP16, GPU INT8, GPU INT4: no NVIDIA GPU")).to_be_visible()
    charts = page.locator('.jp-OutputArea-output[data-mime-type="image/png"] img')
    assert sum(is_drawn(chart) for chart in charts.all()) == IN_NOTEBOOK
    for name, source in {"charts": "qb.plot_throughput(run)", "findings": "qb.findings(run)", "ratios": "qb.ratios(run",
                         "ledger": "qb.show(qb.memory_table(run))", "reference": "qb.show(qb.reference_table(run))",
                         "sweep": "qb.sweep(models"}.items():
        shot(cell(page, source), f"2-{name}")


def rerun_one_cell(page: Page) -> None:
    measuring, shown = cell(page, '"cpu-fp32"'), cell(page, "qb.show(run)")
    before = table(shown)
    line = measuring.locator(".cm-line").first
    line.click()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    page.keyboard.insert_text("lengths = [6]")
    rerun(page, measuring)
    shot(measuring, "3-one-cell-again")
    shown.locator(".cm-line").first.click()
    rerun(page, shown)
    old, new = ({tuple(row[:2]) for row in rows} for rows in (before, table(shown)))
    assert (old - new, new - old) == ({("CPU FP32", "4")}, {("CPU FP32", "6")}), (old, new)
    no_errors(page)


def use_panel(page: Page, server: psutil.Process) -> None:
    panel = cell(page, "qb.panel(run)").locator(".jp-OutputArea-output")
    seen = 0
    for chart in CHARTS.values():
        panel.get_by_role("tab", name=chart.tab).click()
        seen += sum(is_drawn(chart) for chart in panel.locator("img:visible").all())
    assert seen == len(CHARTS), seen
    panel.get_by_role("tab", name="Tokens/sec").click()
    shot(panel, "4-panel")
    before = table(panel)
    tokens = slide(page, panel, 0.04)
    press(panel, "Run")
    wait_to_read(panel, "CPU FP32 · .* tokens: ")
    assert width(panel) == "0%", width(panel)
    wait_to_read(panel, "Done: ")
    wait_to_read(panel, "1 of 1 cells")
    assert width(panel) == "100%", width(panel)
    after = table(panel)
    assert ["CPU FP32", tokens] in [row[:2] for row in after], after
    shot(panel, "5-panel-after-run")
    stop_a_long_one(page, panel, server)
    assert table(panel) == after and len(after) >= len(before)
    press(panel, "What fits")
    expect(panel.get_by_text("Decode floor (ms)")).to_be_visible(timeout=WORKING_S * 1000)
    press(panel, "Which to take")
    expect(panel.get_by_text(re.compile("keep CPU FP32|take CPU"))).to_be_visible(timeout=WORKING_S * 1000)
    wait_to_read(panel, "Done: ")
    shot(panel, "8-panel-chosen")
    no_errors(page)


def choose(page: Page, address: str) -> None:
    """Notebook 04, run whole: the answer, and the line that loads it."""
    page.goto(address)
    run_all(page)
    said = cell(page, "qb.choose(model").locator(".jp-OutputArea-output").last
    expect(said.get_by_text(re.compile("(take|keep) CPU .* tokens/s"))).to_be_visible()
    loads = cell(page, "choice.load_line").locator(".jp-OutputArea-output")
    assert loads.inner_text().startswith("lm = qb.load('./tiny-gpt2', 'cpu-"), loads.inner_text()
    for name, source in {"fits": "qb.fit(model", "answer": "qb.choose(model", "chart": "qb.plot_quality(run)"}.items():
        shot(cell(page, source), f"9-choose-{name}")
    page.close()


def stop_a_long_one(page: Page, panel: Locator, server: psutil.Process) -> None:
    slide(page, panel, 1.0)
    press(panel, "Run")
    wait_to_read(panel, ": round ")
    page.wait_for_timeout(3000)
    assert len(measuring_processes(server)) == 1
    shot(panel, "6-panel-measuring")
    start = time.monotonic()
    press(panel, "Stop")
    wait_to_read(panel, "Stopped; what was measured is kept")
    took = time.monotonic() - start
    assert took < 2 and not measuring_processes(server), took
    print(f"stopped in {took:.1f} s")
    shot(panel, "7-panel-stopped")


def dark(page: Page) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Settings$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^JupyterLab Dark$")).click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-light", "false", timeout=20_000)
    page.wait_for_timeout(1000)
    for name, source in {"table": "qb.show(run)", "chart": "qb.plot_vram(run)", "findings": "qb.findings(run)",
                         "panel": "qb.panel(run)"}.items():
        shot(cell(page, source), f"10-dark-{name}")


# ---- eyes and hands ----

def cell(page: Page, source: str) -> Locator:
    return page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=source))


def table(where: Locator) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in where.locator("tbody tr").all()]


def is_drawn(image: Locator) -> bool:
    return image.evaluate("image => image.complete && image.naturalWidth > 300 && image.clientWidth > 300")


def no_errors(page: Page) -> None:
    found = page.locator('[data-mime-type="application/vnd.jupyter.error"], .jp-RenderedText[data-mime-type$=stderr]')
    assert found.count() == 0, found.all_inner_texts()


def rerun(page: Page, where: Locator) -> None:
    prompt = where.locator(".jp-InputPrompt").first
    before = prompt.inner_text()
    page.keyboard.press("Control+Enter")
    expect(prompt).not_to_have_text(before)
    expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=WORKING_S * 1000)


def wait_to_read(panel: Locator, words: str) -> None:
    """Until tqdm says this: its spaces are as wide as figures, so that numbers don't jump."""
    expect(panel.get_by_text(re.compile(words.replace(" ", r"\s")))).to_be_visible(timeout=WORKING_S * 1000)


def press(panel: Locator, name: str) -> None:
    panel.get_by_role("button", name=re.compile(f"{name}$")).click()  # its icon is a part of its name


def slide(page: Page, panel: Locator, share: float) -> str:
    """Drag the slider of new tokens to this share of its length; what it then reads."""
    slider = panel.locator(".widget-slider").first
    slider.scroll_into_view_if_needed()
    handle, bar = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(bar["x"] + bar["width"] * share, handle["y"] + handle["height"] / 2, steps=10)
    page.mouse.up()
    return slider.locator(".widget-readout").inner_text()


def width(panel: Locator) -> str:
    return panel.locator(".progress-bar").evaluate("bar => bar.style.width")


def measuring_processes(server: psutil.Process) -> list[psutil.Process]:
    """What the kernel's fork server has forked."""
    return [process for kernel in server.children() for helper in kernel.children() for process in helper.children()
            if process.status() != psutil.STATUS_ZOMBIE]


def shot(what: Locator, name: str) -> None:
    what.scroll_into_view_if_needed()
    what.screenshot(path=SHOTS / f"{name}.png")


if __name__ == "__main__":
    main()
