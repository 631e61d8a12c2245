"""Notebook 09 and a training in a real JupyterLab in headless Chromium, worked by mouse and keys: what the
page shows, and what it exports.

Screenshots and what was measured are left in build/browser (`make test-browser` installs Chromium first).
A wait ends when the page shows what it must, or an error, or when nothing happens any more.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pandas as pd
import psutil
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from flowopd_lib.checkpoint import load_state
from flowopd_lib.files import ROOT
from flowopd_lib.runs.profiles import NOTEBOOKS

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium with its chromedriver on the PATH; `make test-browser` installs both (Debian)",
)
SHOTS = ROOT / "build" / "browser"
# Without autosave: when it meets the test's saving, JupyterLab takes one of them for a stranger's and asks.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1700",
    "--force-device-scale-factor=1",
)
CAP = 3600  # seconds: against what never ends, not a limit that a slow machine comes near
# Looks at the page, a quarter of a second apart, between which nothing happens; a slow machine takes longer.
PATIENCE = 240
# What has gone wrong, the status of the kernel, what is seen. An error of a cell looks like a warning on the
# page, so the notebook itself is asked.
STATE = r"""
const shown = window.jupyterapp?.shell.currentWidget, kernel = shown?.sessionContext?.session?.kernel;
const outputs = [...shown?.content?.model?.cells ?? []].flatMap(cell => cell.outputs?.toJSON() ?? []);
const errors = outputs.filter(output => output.output_type == "error").map(it => it.traceback.join("\n"));
const alerts = [...document.querySelectorAll(".fo-problem, .jp-Dialog")].map(alert => alert.innerText);
return [[...errors, ...alerts].join("\n").replace(/\x1b\[[\d;]*m/g, ""), kernel ? kernel.status : "",
        document.body.innerText + [...document.images].map(image => image.src.length)];
"""

TRAINING = """
from flowopd_lib import InProcess, Look, Sampler, TrainingMonitor, some_prompts
from flowopd_lib.jobs.recipes import build
policy, objective, config = build({"student": {"rank": 4, "alpha": 8}, "sampler": {"steps": 4},
                                   "train": {"iterations": 100000, "lr": 1e-3},
                                   "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2,
                                                "images_per_prompt": 4},
                                   "grpo": {"reward_weights": {"OCR": 1.}, "micro_batch_size": 4}})
look = Look(some_prompts(objective.schedule, 4), objective.rewards, 2, Sampler(8))
TrainingMonitor(InProcess(policy, objective, "training", config, look=look), ["OCR", "kl"])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a copy of notebook 09 that draws its samples and exports beside it, and a notebook with
    a training: (address of a file, folder)."""
    place = tmp_path_factory.mktemp("lab")
    root = place / "root"
    root.mkdir()
    text = (NOTEBOOKS / "09_gallery.ipynb").read_text()
    # There is no run in the server's folder: samples are drawn, of two splits and two seeds, which the
    # reference run has not.
    for old, new in (
        ('out_dir = \\"\\" ', f'out_dir = \\"{root / "out"}\\" '),
        ('RUNS / \\"reference\\"', f'\\"{root}\\"'),
    ):
        assert text.count(old) == 1, (
            f"notebook 09 no longer has once what this test replaces: {old}"
        )
        text = text.replace(old, new)
    (root / "09_gallery.ipynb").write_text(text)
    (root / "out").mkdir()
    training = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(TRAINING)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(training, root / "training.ipynb")
    for name, settings in SETTINGS.items():
        file = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "FLOWOPD_HEADLESS"}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(place / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "IPYTHONDIR": str(place / "ipython"),
    }
    with (place / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                "--IdentityProvider.token=for-the-test",
                f"--ServerApp.root_dir={root}",
                "--LabApp.expose_app_in_browser=True",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=root,
        )
    try:
        end = time.monotonic() + CAP
        while True:
            try:
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api?token=for-the-test", timeout=60
                ).close()
                break
            except OSError:  # refused: it does not listen yet
                said = (place / "log.txt").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < end, said
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=for-the-test", root
    finally:
        server.terminate()
        server.wait(CAP)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    # Selenium's own limits, Chromium's start among them, know nothing of how busy the machine is.
    options.timeouts = {"script": CAP * 1000, "pageLoad": CAP * 1000}
    options.add_experimental_option("browserStartupTimeout", CAP * 1000)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = 2 * CAP
    # A window without a screen may have no focus, by which JupyterLab knows the notebook that is meant.
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield Page(driver)
    driver.quit()


def computed():
    """The whole seconds of processor time that all kernels have used; an idle one needs minutes for one.

    JupyterLab's word for a kernel does not do: it says idle as soon as a widget's message has been answered,
    though a cell runs beside it, and while a training runs in a thread.
    """
    used = 0
    for process in psutil.Process().children(recursive=True):  # psutil comes with ipykernel
        with contextlib.suppress(psutil.Error):  # one that ended meanwhile
            if "ipykernel_launcher" in process.cmdline():
                used += sum(process.cpu_times()[:2])
    return int(used)


class Page:
    """What a reader does: find a control by its label, look at what stands there."""

    def __init__(self, driver):
        self.driver = driver

    def until(self, condition, what):
        """Wait as long as something happens: the page changes or a kernel computes.

        An error of a cell or a widget ends it at once, and so does a dead kernel, which opens a dialog.
        """
        end, before, quiet = time.monotonic() + CAP, None, 0
        while True:
            problem, kernel, shown = self.driver.execute_script(STATE)
            if problem or kernel in ("restarting", "autorestarting", "terminating", "dead"):
                break
            try:
                if held := condition():
                    return held
            except (WebDriverException, LookupError, StopIteration, ValueError):
                pass  # what is not there yet, or is just being replaced, is asked for again
            now = shown, computed()
            before, quiet = now, quiet + 1 if now == before else 0
            # Without a kernel JupyterLab itself is still being loaded, which shows nothing for long.
            if quiet > PATIENCE * (1 if kernel else 5):
                problem = "nothing happens any more"
            elif time.monotonic() > end:
                problem = f"not within {CAP} s"
            if problem:
                break
            time.sleep(0.25)
        self.shot("failed")
        raise AssertionError(f"waited in vain for {what} (kernel: {kernel or 'none'}): {problem}")

    def run(self, command, arguments="{}"):
        """One of JupyterLab's commands, to its end."""
        problem = self.driver.execute_async_script(f"""jupyterapp.commands.execute('{command}', {arguments})
            .then(() => arguments[0](), e => arguments[0](String(e)))""")
        assert not problem, f"{command}: {problem}"

    def open_and_run(self, address, name):
        self.driver.get(address.format(name))
        # Not another notebook that JupyterLab had open before.
        self.until(
            lambda: self.driver.execute_script(
                """
            const shown = window.jupyterapp?.shell.currentWidget;
            return shown?.context?.path == arguments[0]
                && !!shown.node.querySelector('.jp-Notebook .jp-CodeCell')
                && shown.sessionContext.session?.kernel?.status == 'idle'""",
                name,
            ),
            "the notebook's kernel",
        )
        self.run("application:toggle-left-area")
        self.driver.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")

    def all(self, css, within=None):
        return (within or self.driver).find_elements(By.CSS_SELECTOR, css)

    def one(self, css, within=None):
        return (within or self.driver).find_element(By.CSS_SELECTOR, css)

    def read(self, css, within, what="textContent"):
        """A property of all there are, at one moment: elements found before may be gone when they are
        asked."""
        return self.driver.execute_script(
            """return [...arguments[1].querySelectorAll(arguments[0])]
            .map(e => e[arguments[2]].replaceAll('\\u00a0', ' '))""",
            css,
            within,
            what,
        )

    def labelled(self, label, kind, within):
        return within.find_element(By.XPATH, f".//label[normalize-space()='{label}']/..//{kind}")

    def handle(self, label, within, number=0):
        slider = within.find_element(By.XPATH, f".//label[normalize-space()='{label}']/..")
        return self.all(".noUi-handle", slider)[number]

    def button(self, text, within, number=0):
        return within.find_elements(By.XPATH, f".//button[contains(normalize-space(), '{text}')]")[
            number
        ]

    def press(self, find, *what):
        """Click what `find(*what)` finds, which a widget may put another in place of until it is clicked."""

        def pressed():
            element = find(*what)
            if element.is_displayed() and element.is_enabled():
                self.driver.execute_script(
                    "arguments[0].scrollIntoView({block: 'center'})", element
                )
                element.click()
                return element

        return self.until(pressed, f"something to press: {what}")

    def shot(self, name, element=None):
        if element is not None:
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)
            element.screenshot(str(SHOTS / f"{name}.png"))
        else:
            self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def contrast(self, element):
        """WCAG's contrast of an element's text against what is behind it."""
        return self.driver.execute_script(
            """
            const rgb = s => s.match(/[\\d.]+/g).map(Number);
            const light = c => c.slice(0, 3).map(v => v / 255)
                                .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            let e = arguments[0], behind = [0, 0, 0, 0];
            const text = rgb(getComputedStyle(e).color);
            while (e && !(behind.length == 3 || behind[3] > 0)) {
                behind = rgb(getComputedStyle(e).backgroundColor); e = e.parentElement; }
            const [a, b] = [light(text), light(behind)].sort((x, y) => y - x);
            return (a + .05) / (b + .05);""",
            element,
        )


def count(page, gallery):
    """Rows that the filter lets through, as the gallery says."""
    note = next(text for text in page.read(".fo-note", gallery) if " samples" in text)
    return int(note.split(";")[1].split()[0])


def test_notebook_09_in_jupyterlab(lab, page):
    address, root = lab
    measured, began = {}, time.time()
    page.open_and_run(address, "09_gallery.ipynb")
    page.until(lambda: page.all(".fo-gallery img"), "the gallery")
    measured["seconds from opening the notebook to the first gallery"] = round(
        time.time() - began, 1
    )
    page.until(
        lambda: (
            page.all(".fo-playground img") and "minus base" in page.all(".jp-CodeCell")[-1].text
        ),
        "the last cell",
    )
    measured["seconds from opening the notebook to its last cell"] = round(time.time() - began, 1)
    assert not page.all(".fo-problem") and not page.all(
        "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
    )
    work_the_gallery(page, root / "out")
    scrub_the_explorer(page)
    try_the_playground(page)
    look_at_the_dark_theme(page)
    page.run("docmanager:save")
    saved = root / "09_gallery.ipynb"
    page.until(lambda: '"outputs": [\n    {' in saved.read_text(), "the saved notebook")
    measured["bytes of the saved notebook, outputs and all"] = saved.stat().st_size
    assert (
        saved.stat().st_size < 200_000
        and "widgets" not in json.loads(saved.read_text())["metadata"]
    )
    (SHOTS / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(measured)


def test_a_training_is_watched_stopped_and_gone_on_with(lab, page):
    address, root = lab
    page.open_and_run(address, "training.ipynb")
    page.until(lambda: page.all(".fo-monitor"), "the monitor")
    monitor = page.one(".fo-monitor")

    def curves():
        """How many iterations the curves have, as they say."""
        alts = page.read("img", monitor, "alt")
        return next(
            int(m[1])
            for alt in alts
            if (m := re.match(r"Curves of training: (\d+) of 100000", alt))
        )

    def newest():
        """The first samples and the last two times', however far it has come when the page is looked at."""
        first, before, now = (
            int(text.removeprefix("iteration ")) for text in page.read(".fo-head", monitor)
        )
        return first == 0 < before == now - 2 and len(page.read("img", monitor, "alt")) == 1 + 3 * 4

    page.until(lambda: curves() >= 4, "curves that go on")
    page.until(newest, "the newest samples")
    page.press(page.button, "stop", monitor)
    page.until(
        lambda: "stopped: training" in monitor.text and page.button("go on", monitor).is_enabled(),
        "the stop",
    )
    done = len((root / "training" / "metrics.jsonl").read_text().splitlines())
    assert (
        load_state(root / "training" / "state.safetensors")["iteration"] == done
        and not (root / "training" / "adapter").exists()
    )
    page.shot("monitor", monitor)
    page.press(page.button, "go on", monitor)
    page.until(
        lambda: len((root / "training" / "metrics.jsonl").read_text().splitlines()) > done,
        "more iterations",
    )
    page.press(page.button, "stop", monitor)
    page.until(
        lambda: "stopped: training" in monitor.text and page.button("go on", monitor).is_enabled(),
        "the second stop",
    )
    assert not page.all(".fo-problem")


def work_the_gallery(page, out):
    gallery = page.all(".fo-gallery")[0]
    page.shot("gallery", gallery)
    every = count(page, gallery)
    search = page.press(page.labelled, "search", "input", gallery)
    search.send_keys("sign")

    def rows():
        return [text for text in page.read(".fo-row", gallery) if "seed" in text]

    page.until(
        lambda: count(page, gallery) < every and rows() and all("sign" in text for text in rows()),
        "the search",
    )
    labels = rows()
    search.send_keys(Keys.TAB)
    assert page.driver.switch_to.active_element == page.one(".widget-select select", gallery), (
        "Tab goes on to the prompts"
    )
    listed = page.read(".widget-select option", gallery)
    assert any(text.startswith("— ocr, ood:") for text in listed) and any(
        '"' in text for text in listed
    )

    both = count(page, gallery)
    seeds = Select(page.labelled("seeds", "select", gallery))
    seeds.select_by_visible_text("sample 2 of each prompt")
    page.until(
        lambda: count(page, gallery) == both // 2 and rows() and not set(rows()) & set(labels),
        "another seed of the same prompts",
    )
    seeds.select_by_visible_text("every seed")
    page.until(lambda: count(page, gallery) == both, "every seed")

    Select(page.labelled("sort by", "select", gallery)).select_by_visible_text("OCR")
    of = Select(page.labelled("scores of", "select", gallery)).first_selected_option.text

    def scores():
        alts = page.read(".fo-tile img", gallery, "alt")
        return [
            float(alt.split("OCR ")[1].split(",")[0]) for alt in alts if alt.startswith(f"{of}, ")
        ]

    Select(page.one(".widget-select-multiple select", gallery)).select_by_visible_text(of)
    page.until(
        lambda: (
            len(scores()) > 1
            and scores() == sorted(scores(), reverse=True)
            and len(set(scores())) > 1
        ),
        "the order",
    )

    Select(page.labelled("range of", "select", gallery)).select_by_visible_text("OCR")
    low = page.press(page.one, ".noUi-handle", gallery)
    low.send_keys(*[Keys.PAGE_UP] * 14, Keys.ARROW_RIGHT)
    page.until(lambda: 0 < count(page, gallery) < both and min(scores()) > 0.7, "the range")

    page.press(page.button, "look", gallery)
    page.until(lambda: len(page.all(".fo-swipe img", gallery)) == 2, "the zoom")
    swipe = page.press(page.handle, "A | B", gallery)
    swipe.send_keys(Keys.PAGE_UP, Keys.PAGE_UP, Keys.PAGE_UP, Keys.PAGE_UP)
    page.until(
        lambda: (
            "inset(0px 100% 0px 0px)"
            not in page.all(".fo-swipe img", gallery)[1].value_of_css_property("clip-path")
        ),
        "the swipe",
    )
    page.press(page.button, "pin", gallery)
    page.until(lambda: page.button("look ★", gallery), "the pin")
    page.shot("gallery_looked", gallery)
    before = count(page, gallery)
    page.press(gallery.find_element, By.XPATH, ".//label[contains(., 'pinned only')]//input")
    page.until(lambda: count(page, gallery) == 1 <= before, "the pinned row alone")

    page.press(page.button, "CSV", gallery)
    page.until(lambda: "gallery.csv" in gallery.text, "the CSV")
    page.press(page.button, "contact sheet", gallery)
    page.until(lambda: "gallery.png" in gallery.text, "the contact sheet")
    page.press(page.button, "code of", gallery)
    page.until(
        lambda: "redraw(policy, samples" in page.one("textarea", gallery).get_attribute("value"),
        "the code",
    )
    table = pd.read_csv(out / "gallery.csv")
    assert (
        set(table["task"]) == {"ocr"}
        and table["row"].nunique() == 1
        and table["OCR"].between(0, 1).all()
        and "OCR - base" in table
    )
    with Image.open(out / "gallery.png") as sheet:
        assert sheet.width > 300 and len(sheet.convert("RGB").getcolors(1 << 20)) > 100
    compile(page.one("textarea", gallery).get_attribute("value"), "cell", "exec")


def scrub_the_explorer(page):
    explorer = page.one(".fo-explorer")
    assert "step 1 of 20" in explorer.text
    scrubber = page.press(page.handle, "step", explorer)
    scrubber.send_keys(*[Keys.ARROW_RIGHT] * 9)
    page.until(lambda: "step 10 of 20" in explorer.text, "the scrubber")
    assert "step 10 of 20" in page.read("img", explorer, "alt")[0] and page.read(
        "[aria-current]", explorer
    )[0].startswith("10")
    page.shot("explorer", explorer)
    before = page.read("img", explorer, "src")[0]
    page.press(page.button, "ODE", explorer)
    page.until(
        lambda: (
            "as if with the SDE" in explorer.text and page.read("img", explorer, "src")[0] != before
        ),
        "the ODE's walk",
    )
    first = page.read("[aria-current]", explorer)[0]
    noise = page.press(page.handle, "noise level", explorer)
    noise.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.until(
        lambda: page.read("[aria-current]", explorer)[0] != first,
        "another noise level weighs the KL otherwise",
    )


def try_the_playground(page):
    playground = page.one(".fo-playground")
    text = page.press(page.labelled, "prompt", "input", playground)
    text.send_keys(Keys.CONTROL, "a")
    text.send_keys('a label saying "HRS"', Keys.ENTER)
    page.until(
        lambda: (
            "known ocr prompt" in playground.text
            and 'saying "HRS"' in page.read("img", playground, "alt")[0]
        ),
        "the prompt typed",
    )
    assert all(
        word in page.read("img", playground, "alt")[0]
        for word in ("seed 0", "OCR", "PickScore", "DeQA", "read: ", "seen: ")
    )
    page.press(page.button, "another seed", playground)
    page.until(lambda: "seed 1:" in page.read("img", playground, "alt")[0], "another seed")
    page.shot("playground", playground)


def look_at_the_dark_theme(page):
    def least():
        seen = [
            e
            for css in (
                ".fo-note",
                ".fo-row",
                ".fo-badge > span",
                ".fo-head",
                ".fo-bars td",
                ".fo-dim",
            )
            for e in page.all(css)[:3]
            if e.is_displayed()
        ]
        return min(page.contrast(e) for e in seen)

    # Asked until it is: the explorer may be writing its last walk.
    page.until(lambda: least() >= 4.5, "a light page that can be read")
    page.run("apputils:change-theme", "{theme: 'JupyterLab Dark'}")
    page.until(
        lambda: page.one("body").get_attribute("data-jp-theme-light") == "false" and least() >= 4.5,
        "a dark page that can be read",
    )
    for name in ("gallery", "explorer", "playground"):
        page.shot(f"{name}_dark", page.all(f".fo-{name}")[0])
