"""Reports: one file, whole by itself, whatever the model's name holds."""

import base64
import html.parser
import re

import pytest

from quantbench.record import Measurement
from quantbench.report import report

HOSTILE = '</title><script>alert(1)</script> | `x` "q" [a](b) {c} #d; %%e $f$\n```\n## g'


def row(setting="cpu-fp32", seconds=(2.0, 2.0, 2.0), cpu="A CPU", model="gpt2", **fields) -> Measurement:
    fields = {"max_new_tokens": 100, "new_tokens": 100, "weights": "pretrained", "weights_bytes": 5 * 10**8,
              "created_at": "2026-11-23T10:00:00+00:00", "versions": {"torch": "2.11.0"}} | fields
    return Measurement(model=model, setting=setting, latencies_s=list(seconds), machine={"cpu": cpu}, **fields)


class Page(html.parser.HTMLParser):
    """What a browser would make of it: tags with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.images, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def rows() -> list[Measurement]:
    return [row(), row("cpu-int8", (1.0, 1.0, 1.0)), row(model=HOSTILE, cpu="A CPU"),
            row("gpu-fp16", (), status="unavailable", reason="no <b>GPU</b>", new_tokens=None, weights=None)]


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "r.html"
    assert report(rows, path) == path
    return path.read_text()


@pytest.fixture(scope="module")
def text(rows, tmp_path_factory) -> str:
    return report(rows, tmp_path_factory.mktemp("report") / "r.md").read_text()


def charts(text: str) -> list[list[str]]:
    return [block.strip().splitlines() for block in re.findall(r"^```mermaid\n(.*?)^```$", text, re.M | re.S)]


def test_the_page_holds_tables_findings_charts_machine_and_versions(page):
    found = Page(page)
    words = " ".join(found.words)
    assert found.tags.count("h1") == 1 and found.tags.count("h2") == 1 and "table" in found.tags
    assert "Tokens/sec against CPU FP32" in words and "2.11.0" in words and "A CPU" in words
    assert len(found.images) == 4


def test_the_page_needs_nothing_beside_it(page):
    found = Page(page)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    for image in found.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
        assert "A CPU" in image["alt"] and len(image["alt"]) > 20


def test_hostile_names_are_text_in_the_page(page):
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "no &lt;b&gt;GPU" in page
    assert page.count("</title>") == 1


def test_markdown_has_a_mermaid_chart_per_model_and_length_and_one_of_memory(text):
    found = charts(text)
    assert len(found) == 4
    assert found[0] == ["xychart-beta horizontal", '    title "GPT-2 · 100 tokens · Tokens/sec"',
                        '    x-axis ["CPU FP32", "CPU INT8"]', '    y-axis "Tokens/sec" 0 --> 100',
                        "    bar [50.0, 100.0]"]
    assert found[1][1:] == ['    title "GPT-2 · Weights (GB)"', '    x-axis ["CPU FP32", "CPU INT8"]',
                            '    y-axis "Weights (GB)" 0 --> 0.5', "    bar [0.500, 0.500]"]


def test_hostile_names_are_text_in_markdown(text):
    outside = re.sub(r"^```mermaid\n.*?^```$", "", text, flags=re.M | re.S)
    assert "<script" not in outside and "`" not in outside and "](b)" not in outside
    assert not any(line.startswith("## g") for line in text.splitlines())
    for chart in charts(text):
        assert len(chart) == 5  # no name broke a line
        for line in chart[1:3]:
            quoted = re.findall(r'"([^"]*)"', line)
            assert quoted and not any(set('`<>#%{};|&$\\[]"') & set(name) for name in quoted), line
    titles = [chart[1] for chart in charts(text)]
    assert any("‹script›alert(1)‹/script›" in title for title in titles)
    assert any(title.endswith('… · 100 tokens · Tokens/sec"') for title in titles)


def test_a_section_per_machine(tmp_path):
    rows = [row(), row("cpu-int8", cpu="B CPU"), row("cpu-int8", (1.0, 1.0))]
    assert report(rows, tmp_path / "r.html").read_text().count("<h2>") == 2
    text = report(rows, tmp_path / "r.MD").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == ["A CPU", "B CPU"]


def test_vram_is_charted_where_there_is_any(tmp_path):
    text = report([row("gpu-fp16", vram_peak_bytes=123_000_000)], tmp_path / "r.md").read_text()
    assert ['    y-axis "VRAM (GB)" 0 --> 0.13', "    bar [0.123]"] == charts(text)[1][3:]


def test_a_run_where_nothing_could_be_measured_still_reports(tmp_path):
    failed = row("gpu-fp16", (), status="unavailable", reason="no GPU", new_tokens=None, weights=None)
    assert "Nothing was measured" in report([failed], tmp_path / "r.md").read_text()
    assert "no GPU" in report([failed], tmp_path / "r.html").read_text()


def test_other_suffixes_and_empty_runs_are_refused(tmp_path):
    for name in ("r.pdf", "r", "r.html.bak"):
        with pytest.raises(ValueError, match=".html or .md"):
            report([row()], tmp_path / name)
    with pytest.raises(ValueError, match="no measurements"):
        report([], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
