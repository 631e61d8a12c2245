"""Notebook 09 and a training in JupyterLab in headless Chromium, operated by mouse and keys.

Screenshots are left in build/browser; `make test-browser` installs Chromium first. A wait ends when
the page shows what is expected or an error.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from flowopd_lib.files import ROOT, load_state
from flowopd_lib.runs.execute import NOTEBOOKS

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium or chromedriver is missing; `make test-browser` installs both (Debian)",
)
SHOTS = ROOT / "build" / "browser"
# Without autosave: JupyterLab asks when it and the test save at the same time.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--window-size=1500,1700",
    "--force-device-scale-factor=1",
)
CAP = 1200  # seconds; a slow machine needs far less
# Errors, and whether a kernel is there. On the page an error of a cell looks like a warning, so
# errors are read from the notebook.
STATE = r"""
const shown = window.jupyterapp?.shell.currentWidget;
const kernel = shown?.sessionContext?.session?.kernel;
const outputs = [...shown?.content?.model?.cells ?? []].flatMap(c => c.outputs?.toJSON() ?? []);
const errors = outputs.filter(o => o.output_type == "error").map(o => o.traceback.join("\n"));
const alerts = [...document.querySelectorAll(".fo-problem, .jp-Dialog")].map(a => a.innerText);
return [[...errors, ...alerts].join("\n").replace(/\x1b\[[\d;]*m/g, ""), kernel?.status];
"""

TRAINING = """
from flowopd_lib.lab import Lab
from flowopd_lib.widgets import TrainingMonitor
recipe = {"student": {"rank": 4, "alpha": 8}, "sampler": {"steps": 4, "noisy_steps": 2},
          "schedule": {"tasks": ["ocr"], "prompts_per_batch": 2, "images_per_prompt": 4},
          "grpo": {"reward_weights": {"OCR": 1.0}, "micro_batch_size": 4},
          "train": {"iterations": 100000, "lr": 1e-3}}
validation = {"every": 2, "n": 2, "steps": 8, "images": True}
TrainingMonitor(Lab("tiny").background("training", recipe, validation), ["OCR", "kl"])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a copy of notebook 09 and a notebook with a training: (address of a file,
    folder). There is no run in the folder, so notebook 09 samples here, two seeds of each
    prompt."""
    place = tmp_path_factory.mktemp("lab")
    root = place / "root"
    root.mkdir()
    text = (NOTEBOOKS / "09_gallery.ipynb").read_text()
    replaced = {
        'out_dir: Folder = \\"\\"': f'out_dir: Folder = \\"{root / "out"}\\"',
        "lab.find_run(run_dir)": "None",
    }
    for old, new in replaced.items():
        assert text.count(old) == 1, f"notebook 09 does not have this once: {old}"
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
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={root}"]
    command += ["--IdentityProvider.token=for-the-test", "--LabApp.expose_app_in_browser=True"]
    with (place / "log.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=root)
    try:
        end = time.monotonic() + CAP
        while socket.socket().connect_ex(("127.0.0.1", port)):  # it does not listen yet
            log_tail = (place / "log.txt").read_text()[-2000:]
            assert server.poll() is None and time.monotonic() < end, log_tail
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
    # Selenium's own limits know nothing of how busy the machine is.
    options.timeouts = {"script": CAP * 1000, "pageLoad": CAP * 1000}
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = 2 * CAP
    # A window without a screen may have no focus, which JupyterLab needs to know its notebook.
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield Page(driver)
    driver.quit()


class Page:
    """What a reader does: find a control by its label, press it, read the page."""

    def __init__(self, driver):
        self.driver = driver

    def until(self, condition, what):
        """Wait for a condition. An error of a cell or a widget ends the wait at once, and so does a
        dead kernel."""
        end = time.monotonic() + CAP
        while time.monotonic() < end:
            problem, kernel = self.driver.execute_script(STATE)
            if problem or kernel in ("restarting", "autorestarting", "terminating", "dead"):
                break
            try:
                if result := condition():
                    return result
            except (WebDriverException, LookupError, StopIteration, ValueError):
                pass  # it is not there yet, or is just being replaced
            time.sleep(0.25)
        self.driver.save_screenshot(str(SHOTS / "failed.png"))
        raise AssertionError(f"waited in vain for {what} (kernel: {kernel}): {problem}")

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
        self.run("notebook:run-all-cells")

    def run(self, command):
        """Start one of JupyterLab's commands."""
        self.driver.execute_script(f"jupyterapp.commands.execute('{command}')")

    def all(self, css, within=None):
        return (within or self.driver).find_elements(By.CSS_SELECTOR, css)

    def one(self, css, within=None):
        return (within or self.driver).find_element(By.CSS_SELECTOR, css)

    def read(self, css, within, what="textContent"):
        """A property of all matching elements, read at one moment: elements that were found before
        may be gone by now."""
        return self.driver.execute_script(
            """return [...arguments[1].querySelectorAll(arguments[0])]
            .map(e => e[arguments[2]].replaceAll('\\u00a0', ' '))""",
            css,
            within,
            what,
        )

    def labelled(self, label, kind, within):
        return within.find_element(By.XPATH, f".//label[normalize-space()='{label}']/..//{kind}")

    def button(self, text, within):
        return within.find_element(By.XPATH, f".//button[contains(normalize-space(), '{text}')]")

    def press(self, find, *what):
        """Click what `find(*what)` finds, which a widget may replace meanwhile."""

        def pressed():
            element = find(*what)
            if element.is_displayed() and element.is_enabled():
                self.driver.execute_script(
                    "arguments[0].scrollIntoView({block: 'center'})", element
                )
                element.click()
                return element

        return self.until(pressed, f"something to press: {what}")

    def shot(self, name, element):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)
        element.screenshot(str(SHOTS / f"{name}.png"))


def test_notebook_09_in_jupyterlab(lab, page):
    address, root = lab
    page.open_and_run(address, "09_gallery.ipynb")
    page.until(
        lambda: page.all(".fo-playground img") and "interval" in page.all(".jp-CodeCell")[-1].text,
        "the last cell",
    )
    assert not page.all("[data-mime-type='application/vnd.jupyter.stderr']")
    work_the_gallery(page, root / "out")
    scrub_the_player(page)
    try_the_playground(page)
    page.run("docmanager:save")
    saved = root / "09_gallery.ipynb"
    page.until(lambda: '"outputs": [\n    {' in saved.read_text(), "the saved notebook")
    # figures, but no widgets with all their images
    assert saved.stat().st_size < 2_000_000
    assert "widgets" not in json.loads(saved.read_text())["metadata"]


def test_a_training_is_watched_stopped_and_resumed(lab, page):
    address, root = lab
    page.open_and_run(address, "training.ipynb")
    page.until(lambda: page.all(".fo-monitor"), "the monitor")
    monitor, folder = page.one(".fo-monitor"), root / "training"

    def iterations():
        """How many iterations the curves have, by their alternative text."""
        found = (
            re.match(r"Curves of training: (\d+) of 100000", alt)
            for alt in page.read("img", monitor, "alt")
        )
        return next(int(match[1]) for match in found if match)

    def newest():
        """The samples before the training and of the last two probes."""
        labels = [text for text in page.read(".fo-row", monitor) if "iteration" in text]
        first, before, now = (int(text.removeprefix("iteration ")) for text in labels)
        images = 1 + 3 * 3 * 2  # curves; three probes of two prompts of each task
        return first == 0 < before == now - 2 and len(page.all("img", monitor)) == images

    def written():
        return len((folder / "metrics.jsonl").read_text().splitlines())

    def stop():
        page.press(page.button, "stop", monitor)
        page.until(
            lambda: (
                "stopped: training" in monitor.text and page.button("resume", monitor).is_enabled()
            ),
            "the stop",
        )

    page.until(lambda: iterations() >= 4, "curves that grow")
    page.until(newest, "the newest samples")
    stop()
    done = written()
    assert load_state(folder / "state.safetensors")["iteration"] == done
    assert not (folder / "adapter").exists()
    page.shot("monitor", monitor)
    page.press(page.button, "resume", monitor)
    page.until(lambda: written() > done, "more iterations")
    stop()
    assert not page.all(".fo-problem")


def work_the_gallery(page, out):
    gallery = page.all(".fo-gallery")[0]
    page.shot("gallery", gallery)

    def count():
        """Rows that the filter lets through, as the gallery writes."""
        note = next(text for text in page.read(".fo-note", gallery) if " samples" in text)
        return int(note.split(";")[1].split()[0])

    def labels():
        return [text for text in page.read(".fo-row", gallery) if "seed" in text]

    every = count()
    search = page.press(page.labelled, "search", "input", gallery)
    search.send_keys("sign")
    page.until(lambda: 0 < count() < every and all("sign" in t for t in labels()), "the search")
    search.send_keys(Keys.TAB)
    focused = page.driver.switch_to.active_element
    assert focused == page.labelled("task", "select", gallery), "Tab goes on to the next control"

    model = "base"
    for label, name in (("model", model), ("sort", "OCR")):
        Select(page.labelled(label, "select", gallery)).select_by_visible_text(name)
    table = pd.read_parquet(out / "samples.parquet")
    table = table[(table["model"] == model) & table["prompt"].str.contains("sign")]
    expected = sorted(table["OCR"], reverse=True)
    assert len(set(expected)) > 1

    def scores():
        """The scores of the model's images, by their alternative texts."""
        alts = page.read(".fo-tile img", gallery, "alt")
        own = [alt for alt in alts if alt.startswith(f"{model}, ")]
        return [float(re.search(r"OCR ([\d.]+)", alt)[1]) for alt in own]

    page.until(
        lambda: scores() == pytest.approx(expected[:4], abs=0.0051), "the highest scores first"
    )

    page.press(page.button, "enlarge", gallery)
    page.press(page.button, "ocr expert", gallery)
    page.until(
        lambda: page.read("img[width='320']", gallery, "alt")[0].startswith("ocr expert, "),
        "another model's sample enlarged",
    )
    code = page.one("textarea", gallery).get_attribute("value")
    assert "redraw(policy, samples" in code and compile(code, "cell", "exec")
    page.press(page.button, "pin", gallery)
    page.until(lambda: page.button("enlarge ★", gallery), "the pin")
    page.shot("gallery_enlarged", gallery)
    page.press(page.button, "CSV", gallery)
    page.until(lambda: "written" in gallery.text and (out / "gallery.csv").is_file(), "the CSV")


def scrub_the_player(page):
    player = page.one(".fo-player")
    scrubber = page.press(page.one, ".noUi-handle[aria-valuemax='10.0']", player)
    scrubber.send_keys(*[Keys.ARROW_RIGHT] * 5)
    page.until(lambda: "step 6 of 10" in page.read("img", player, "alt")[0], "the scrub")
    page.shot("player", player)
    before = page.read("img", player, "src")[0]
    page.press(page.button, "ODE", player)
    page.until(
        lambda: (
            "as if with the SDE" in player.text and page.read("img", player, "src")[0] != before
        ),
        "the ODE's trajectory",
    )


def try_the_playground(page):
    playground = page.one(".fo-playground")

    def alt():
        return page.read("img", playground, "alt")[0]

    text = page.press(page.labelled, "prompt", "input", playground)
    text.send_keys(Keys.CONTROL, "a")
    text.send_keys('a label saying "HRS"', Keys.ENTER)
    page.until(lambda: 'saying "HRS" (seed 0)' in alt(), "the prompt typed")
    for word in ("OCR", "PickScore", "DeQA", "read: ", "detected: "):
        assert word in alt()
    page.shot("playground", playground)
