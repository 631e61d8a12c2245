"""Notebook 09 and a training in JupyterLab in headless Chromium, operated by mouse and keys.

Screenshots and measurements are left in build/browser; `make test-browser` installs Chromium first.
A wait ends when the page shows what is expected, when it shows an error, or when nothing happens
any more.
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
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1700",
    "--force-device-scale-factor=1",
)
CAP = 3600  # seconds, for what never ends; a slow machine needs far less
PATIENCE = 240  # polls, a quarter of a second apart, in which nothing happens
# Errors, the kernel's status, what the page shows. On the page an error of a cell looks like a
# warning, so errors are read from the notebook.
STATE = r"""
const shown = window.jupyterapp?.shell.currentWidget;
const kernel = shown?.sessionContext?.session?.kernel;
const outputs = [...shown?.content?.model?.cells ?? []].flatMap(c => c.outputs?.toJSON() ?? []);
const errors = outputs.filter(o => o.output_type == "error").map(o => o.traceback.join("\n"));
const alerts = [...document.querySelectorAll(".fo-problem, .jp-Dialog")].map(a => a.innerText);
const images = [...document.images].map(image => image.src.length);
return [[...errors, ...alerts].join("\n").replace(/\x1b\[[\d;]*m/g, ""),
        kernel ? kernel.status : "", document.body.innerText + images];
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
    folder). There is no run in the folder, so notebook 09 samples here, of two splits and two seeds
    each."""
    place = tmp_path_factory.mktemp("lab")
    root = place / "root"
    root.mkdir()
    text = (NOTEBOOKS / "09_gallery.ipynb").read_text()
    replaced = {
        'out_dir: Folder = \\"\\"': f'out_dir: Folder = \\"{root / "out"}\\"',
        'RUNS / \\"reference\\"': f'\\"{root}\\"',
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
    # Selenium's own limits, Chromium's start among them, know nothing of how busy the machine is.
    options.timeouts = {"script": CAP * 1000, "pageLoad": CAP * 1000}
    options.add_experimental_option("browserStartupTimeout", CAP * 1000)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = 2 * CAP
    # A window without a screen may have no focus, which JupyterLab needs to know its notebook.
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield Page(driver)
    driver.quit()


def processor_seconds():
    """Seconds of processor time that all kernels have used; an idle one needs minutes for one.

    The kernel's status does not do: it is idle as soon as a widget's message has been answered,
    even while a cell or a training in a thread runs.
    """
    used = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ended meanwhile
            if "ipykernel_launcher" in process.cmdline():
                used += sum(process.cpu_times()[:2])
    return int(used)


class Page:
    """What a reader does: find a control by its label, press it, read the page."""

    def __init__(self, driver):
        self.driver = driver

    def until(self, condition, what):
        """Wait as long as something happens: the page changes or a kernel computes. An error of a
        cell or a widget ends the wait at once, and so does a dead kernel."""
        end, before, quiet = time.monotonic() + CAP, None, 0
        while True:
            problem, kernel, shown = self.driver.execute_script(STATE)
            if problem or kernel in ("restarting", "autorestarting", "terminating", "dead"):
                break
            try:
                if result := condition():
                    return result
            except (WebDriverException, LookupError, StopIteration, ValueError):
                pass  # it is not there yet, or is just being replaced
            now = shown, processor_seconds()
            before, quiet = now, quiet + 1 if now == before else 0
            # without a kernel, JupyterLab itself is still being loaded
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
        problem = self.driver.execute_async_script(
            f"""jupyterapp.commands.execute('{command}', {arguments})
            .then(() => arguments[0](), e => arguments[0](String(e)))"""
        )
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

    def handle(self, label, within, number=0):
        slider = within.find_element(By.XPATH, f".//label[normalize-space()='{label}']/..")
        return self.all(".noUi-handle", slider)[number]

    def button(self, text, within, number=0):
        return within.find_elements(By.XPATH, f".//button[contains(normalize-space(), '{text}')]")[
            number
        ]

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
    """Rows that the filter lets through, as the gallery writes."""
    note = next(text for text in page.read(".fo-note", gallery) if " samples" in text)
    return int(note.split(";")[1].split()[0])


def test_notebook_09_in_jupyterlab(lab, page):
    address, root = lab
    measured, start = {}, time.time()
    page.open_and_run(address, "09_gallery.ipynb")
    page.until(lambda: page.all(".fo-gallery img"), "the gallery")
    measured["seconds to the first gallery"] = round(time.time() - start, 1)
    page.until(
        lambda: page.all(".fo-playground img") and "interval" in page.all(".jp-CodeCell")[-1].text,
        "the last cell",
    )
    measured["seconds to the last cell"] = round(time.time() - start, 1)
    kinds = ("stderr", "error")
    wrong = [f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in kinds]
    assert not page.all(", ".join([".fo-problem", *wrong]))
    work_the_gallery(page, root / "out")
    scrub_the_player(page)
    try_the_playground(page)
    switch_to_the_dark_theme(page)
    page.run("docmanager:save")
    saved = root / "09_gallery.ipynb"
    page.until(lambda: '"outputs": [\n    {' in saved.read_text(), "the saved notebook")
    measured["bytes of the notebook with outputs"] = size = saved.stat().st_size
    # figures, but no widgets with all their images
    assert size < 2_000_000 and "widgets" not in json.loads(saved.read_text())["metadata"]
    (SHOTS / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(measured)


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
        first, before, now = (
            int(text.removeprefix("iteration ")) for text in page.read(".fo-head", monitor)
        )
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
    prompts = page.one(".widget-select select", gallery)
    assert page.driver.switch_to.active_element == prompts, "Tab goes on to the prompts"
    listed = page.read(".widget-select option", gallery)
    assert any(text.startswith("— ocr, ood:") for text in listed)
    assert any('"' in text for text in listed)

    both = count(page, gallery)
    seeds = Select(page.labelled("seeds", "select", gallery))
    seeds.select_by_visible_text("sample 2 of each prompt")
    page.until(
        lambda: count(page, gallery) == both // 2 and rows() and not set(rows()) & set(labels),
        "another seed of the same prompts",
    )
    seeds.select_by_visible_text("every seed")
    page.until(lambda: count(page, gallery) == both, "every seed")

    model = "ocr expert"
    Select(page.labelled("scores of", "select", gallery)).select_by_visible_text(model)
    Select(page.labelled("sort by", "select", gallery)).select_by_visible_text("OCR")
    table = pd.read_parquet(out / "samples.parquet")
    low = table["OCR"].min()
    table = table[(table["model"] == model) & table["prompt"].str.contains("sign")]
    expected = sorted(table["OCR"], reverse=True)
    assert len(set(expected)) > 1

    def scores():
        """Of the model's images, by their alternative texts."""
        alts = page.read(".fo-tile img", gallery, "alt")
        own = [alt for alt in alts if alt.startswith(f"{model}, ")]
        return [float(re.search(r"OCR ([\d.]+)", alt)[1]) for alt in own]

    def close(values):
        return scores() == pytest.approx(values, abs=0.0051)

    page.until(lambda: close(expected[:4]), "the highest scores first")
    page.press(page.button, "lowest first", gallery)
    page.until(lambda: close(expected[:-5:-1]), "the lowest scores first")

    Select(page.labelled("range of", "select", gallery)).select_by_visible_text("OCR")
    handle = page.press(page.one, ".noUi-handle", gallery)
    # the slider's steps are 0.01: past the lowest score
    presses = int((expected[-1] - low) / 0.01) + 2
    handle.send_keys(*[Keys.PAGE_UP] * (presses // 5), *[Keys.ARROW_RIGHT] * (presses % 5))
    page.until(
        lambda: 0 < count(page, gallery) < both and min(scores()) > expected[-1], "the range"
    )

    page.press(page.button, "enlarge", gallery)
    page.until(lambda: len(page.all(".fo-swipe img", gallery)) == 2, "the enlarged sample")
    swipe = page.press(page.handle, "A | B", gallery)
    swipe.send_keys(*[Keys.PAGE_UP] * 4)

    def clip():
        return page.all(".fo-swipe img", gallery)[1].value_of_css_property("clip-path")

    page.until(lambda: "inset(0px 100% 0px 0px)" not in clip(), "the swipe")
    page.press(page.button, "pin", gallery)
    page.until(lambda: page.button("enlarge ★", gallery), "the pin")
    page.shot("gallery_enlarged", gallery)
    page.press(gallery.find_element, By.XPATH, ".//label[contains(., 'pinned only')]//input")
    page.until(lambda: count(page, gallery) == 1, "the pinned row alone")

    for kind, name in (("CSV", "gallery.csv"), ("contact sheet", "gallery.png")):
        (out / name).unlink(missing_ok=True)
        page.press(page.button, kind, gallery)
        page.until(lambda: name in gallery.text and (out / name).is_file(), kind)
    exported = pd.read_csv(out / "gallery.csv")
    assert set(exported["task"]) == {"ocr"} and exported["row"].nunique() == 1
    assert exported["OCR"].between(0, 1).all() and "OCR - base" in exported
    with Image.open(out / "gallery.png") as sheet:
        assert sheet.width > 300 and len(sheet.convert("RGB").getcolors(1 << 20)) > 100

    def code():
        return page.one("textarea", gallery).get_attribute("value")

    page.press(page.button, "code of", gallery)
    page.until(lambda: "redraw(policy, samples" in code(), "the code")
    compile(code(), "cell", "exec")


def scrub_the_player(page):
    player = page.one(".fo-player")
    assert "step 1 of 10" in player.text

    def current():
        """The row of the step that is shown, in the table of KLs."""
        return next(r for r in page.read(".fo-table tbody tr", player, "innerText") if "▶" in r)

    scrubber = page.press(page.handle, "step", player)
    scrubber.send_keys(*[Keys.ARROW_RIGHT] * 5)
    page.until(lambda: "step 6 of 10" in player.text and current().startswith("▶ 6"), "the scrub")
    assert "step 6 of 10" in page.read("img", player, "alt")[0]
    page.shot("player", player)
    before = page.read("img", player, "src")[0]
    page.press(page.button, "ODE", player)
    page.until(
        lambda: (
            "as if with the SDE" in player.text and page.read("img", player, "src")[0] != before
        ),
        "the ODE's trajectory",
    )
    first = current()
    noise = page.press(page.handle, "noise level", player)
    noise.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.until(lambda: current() != first, "the KL at another noise level")


def try_the_playground(page):
    playground = page.one(".fo-playground")

    def alt():
        return page.read("img", playground, "alt")[0]

    text = page.press(page.labelled, "prompt", "input", playground)
    text.send_keys(Keys.CONTROL, "a")
    text.send_keys('a label saying "HRS"', Keys.ENTER)
    page.until(
        lambda: "Scored as ocr prompt by" in playground.text and 'saying "HRS"' in alt(),
        "the prompt typed",
    )
    shown = alt()
    for word in ("seed 0", "OCR", "PickScore", "DeQA", "read: ", "detected: "):
        assert word in shown
    page.press(page.button, "another seed", playground)
    page.until(lambda: "seed 1:" in alt(), "another seed")
    page.shot("playground", playground)


def switch_to_the_dark_theme(page):
    texts = (".fo-note", ".fo-row", ".fo-badge > span", ".fo-head", ".fo-table td", ".fo-dim")

    def lowest():
        """The lowest contrast of a text on the page."""
        shown = [e for css in texts for e in page.all(css)[:3] if e.is_displayed()]
        return min(page.contrast(e) for e in shown)

    # the player may still be writing its last trajectory
    page.until(lambda: lowest() >= 4.5, "a light page that can be read")
    page.run("apputils:change-theme", "{theme: 'JupyterLab Dark'}")

    def dark():
        return page.one("body").get_attribute("data-jp-theme-light") == "false"

    page.until(lambda: dark() and lowest() >= 4.5, "a dark page that can be read")
    for name in ("gallery", "player", "playground"):
        page.shot(f"{name}_dark", page.all(f".fo-{name}")[0])
