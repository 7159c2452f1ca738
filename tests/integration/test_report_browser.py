"""What a run shows, looked at in a browser. Screenshots go to ``ROME_PL_SCREENSHOTS``, if that is set."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from rome_pl.callbacks import ProbeEvaluation, RetentionCheck, RunReport, TensorBoardReport, Verification
from rome_pl.data_modules import RequestDataModule
from rome_pl.modules.rome_module import RomeModule
from rome_pl.reports.html_report import html_report
from rome_pl.reports.run_figures import CAPTIONS
from rome_pl.reports.run_results import detailed_records, run_manifest, run_results
from tests.browser import Page, wait_until
from tests.integration.helpers import FAST, lenient_callbacks, quiet_trainer
from tests.integration.test_report import tensorboard
from tests.lively import lively_model
from tests.made_run import NASTY, made_request, made_session

pytestmark = pytest.mark.slow

TABS = {
    "custom_scalars": ["What the edits do", "right after each edit, mean so far", "norm of the accumulated change"],
    "images": ["figures/accuracy", "figures/retention", "figures/relations", "loss curves"],
    "text": ["generations", "unedited model", "final model", "violin duets"],
    "hparams": ["final/ES", "final/NS", "v_num_grad_steps"],
    "timeseries": ["edit", "running", "retention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A sequential run of 50 edits, some of them rejected."""
    from copy import deepcopy

    folder = tmp_path_factory.mktemp("browser")
    records = [
        {
            "prompt": f"{'' if index % 7 else NASTY[index // 7 % 4]} The lighthouse of Korrin{index} stands in",
            "subject": f"Korrin{index}", "target_new": ["violin duets", "rye", "Oslo"][index % 3],
            "target_true": "Lima",
            "relation": f"P{index % 5}", "paraphrases": [f"Where is Korrin{index}? In"],
            "neighbours": ["The mill of Dunholt stands in"],
        }
        for index in range(50)
    ]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "held_out.txt").write_text(
        "The tide comes in twice a day, and twice a day it goes out.", encoding="utf-8"
    )
    callbacks = [*lenient_callbacks(), TensorBoardReport(), RunReport()]
    for callback in callbacks:
        if isinstance(callback, ProbeEvaluation):
            callback.held_out_text = str(folder / "held_out.txt")
        if isinstance(callback, RetentionCheck):
            callback.text = str(folder / "held_out.txt")
        if isinstance(callback, Verification):
            callback.least_probability, callback.greedy = 0.002, False
    options = {"sequential_edit": True, "preset": "r_rome", "mom2_adjustment": False, "v_lr": 0.5}
    module = RomeModule.from_language_model(deepcopy(lively_model()), **{**FAST, **options})
    trainer = quiet_trainer(
        callbacks, folder, logger=tensorboard(folder), val_check_interval=10, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=RequestDataModule(str(folder / "records.json"), retention_sample=12))
    return folder


@pytest.fixture
def page(tmp_path):
    with Page(tmp_path / "profile") as page:
        yield page


def shot(page, tmp_path, name):
    """A screenshot that shows something; kept if asked for."""
    path = page.screenshot(tmp_path / f"{name}.png")
    assert len(np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)) > 20, name
    if keep := os.environ.get("ROME_PL_SCREENSHOTS"):
        Path(keep).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, keep)


def rows(page):
    return page.evaluate("[...document.querySelectorAll('#rows tbody tr:not(.detail)')].map((row) => row.dataset.id)")


def numbers(page, label):
    return page.evaluate(
        f"[...document.querySelectorAll('#rows td[data-label=\"{label}\"]')].map((cell) => Number(cell.textContent))"
    )


def test_the_page_of_a_run(run, page, tmp_path):
    content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert content["n_rejected"] > 3
    assert content["n_applied"] > 3
    address = (run / "report.html").as_uri()
    page.open(address)
    text = page.wait_for_text("Scores", "Figures", "Edits", "Settings", f"{content['n_applied']} of 50")
    for score in ("ES", "PS", "NS"):
        assert f"{100 * content['final'][score]['value']:.1f}" in text
    assert len(rows(page)) == 50
    for nasty in NASTY:
        assert " ".join(nasty.split()) in " ".join(page.evaluate("document.getElementById('rows').innerText").split())
    sizes = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(sizes) == len(CAPTIONS)
    assert min(sizes) > 900
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    shot(page, tmp_path, "report_top")
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}


def test_the_table_filters_sorts_and_opens(run, page, tmp_path):
    content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    address = (run / "report.html").as_uri()
    page.open(f"{address}#status=rejected&sort=-after")
    page.wait("document.querySelectorAll('#rows tbody tr').length > 0")
    assert len(rows(page)) == content["n_rejected"]
    after = numbers(page, "after, %")
    assert after == sorted(after, reverse=True)
    assert page.evaluate("document.querySelector('#rows th[aria-sort=descending]').textContent") == "after, %"
    edge = page.evaluate("document.getElementById('edits').getBoundingClientRect().top")
    left = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
    assert 0 <= edge < 100 or left < 2  # the page went there, as far as it can
    assert page.evaluate("document.getElementById('more').offsetParent === null")  # no more to show
    shot(page, tmp_path, "report_rejected")

    page.evaluate("location.hash = 'q=korrin12 stands'")
    page.wait("document.querySelectorAll('#rows tbody tr').length === 1")
    assert rows(page) == ["12"]
    page.evaluate("location.hash = 'q=' + encodeURIComponent('</script><script>alert(1)')")
    page.wait("document.querySelectorAll('#rows tbody tr').length === 2")  # two records begin with that text
    page.evaluate("document.querySelector('#rows button.open').click()")
    details = page.evaluate("document.querySelector('#rows tr.detail').innerText")
    assert "norm of the update" in details
    assert "rewrite_acc" in details
    shot(page, tmp_path, "report_details")

    # By hand: the address follows, and shows the same again when it is opened.
    page.open(address)
    page.evaluate(
        "[...document.querySelectorAll('#rows th button')].find((b) => b.textContent === 'before, %').click()"
    )
    before = numbers(page, "before, %")
    assert before == sorted(before)
    search = "document.querySelector('input[type=search]')"
    page.evaluate(f"{search}.value = 'P3'; {search}.dispatchEvent(new Event('input'))")
    shown = rows(page)
    assert len(shown) == 10
    again = page.evaluate("location.href")
    assert again.endswith("#q=P3&sort=before")
    page.open("about:blank")
    page.open(again)
    assert rows(page) == shown


def test_many_edits_are_shown_a_part_at_a_time(page, tmp_path):
    session = made_session([made_request(index) for index in range(5000)], sequential=False)
    content = run_results(session, [])
    text = html_report(content, detailed_records(session, content["records"]), run_manifest(session, 0), "", {})
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page.open((tmp_path / "report.html").as_uri())
    page.wait("document.querySelectorAll('#rows tbody tr').length === 200", 20)
    assert page.evaluate("document.getElementById('found').textContent") == "5000 of 5000, the first 200 shown"
    assert page.evaluate("document.getElementById('more').offsetParent !== null")
    page.evaluate("document.getElementById('more').click()")
    assert len(rows(page)) == 400
    took = page.evaluate(
        "(() => {const start = performance.now(); document.querySelector('#rows th button').click();"
        " return performance.now() - start})()"
    )
    assert took < 3000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone(scheme, run, page, tmp_path):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.open((run / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.removeprefix("rgb(").removesuffix(")").split(","))) > 384) == (scheme == "light")
    shot(page, tmp_path, f"report_phone_{scheme}")
    page.evaluate("document.getElementById('edits').scrollIntoView()")
    shot(page, tmp_path, f"report_phone_{scheme}_edits")


def test_the_page_on_paper(run, page, tmp_path):
    page.call("Emulation.setEmulatedMedia", media="print")
    page.open((run / "report.html").as_uri())
    assert page.evaluate("getComputedStyle(document.getElementById('tools')).display") == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shot(page, tmp_path, "report_print")


@pytest.fixture(scope="module")
def server(run):
    """TensorBoard on the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "tensorboard"), "--port", str(port),
         "--host", "127.0.0.1", "--load_fast", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def ready():
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                return "running/ES" in answer.read().decode()
        except OSError:
            return False

    wait_until(ready, "TensorBoard to start", 90)
    yield address
    process.terminate()
    process.wait(20)


@pytest.mark.parametrize("tab", TABS)
def test_the_page_of_tensorboard(tab, server, page, tmp_path):
    page.open(f"{server}/#{tab}")
    text = page.wait_for_text(*TABS[tab], seconds=90)
    if tab == "custom_scalars":
        assert "Matches (0)" not in text  # every chart has something to show
    if tab == "text":
        assert "</script>" in text  # the nasty prompt, as text
    time.sleep(5)  # charts are drawn after their titles
    shot(page, tmp_path, f"tensorboard_{tab}")
