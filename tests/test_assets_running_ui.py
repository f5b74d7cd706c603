"""What a user sees and clicks: the Dagster UI and MLflow in a headless Chromium, served by ``clipcov ui``."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import psutil
import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By

from assets.mlflow_runs.tracking import Tracking, metric_name, mlflow_run_url, mlflow_runs_url
from clipcov_pipeline.experiment.stages import STAGES
from lab import Lab, free_ports

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ui,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1200",
)
PATIENCE = 60.0  # seconds for a page or a server, on a machine that has other things to do
BACKFILL_PATIENCE = 180.0


def wait_for(what: str, probe: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Call ``probe`` until it gives something that is true; return that."""
    end = time.monotonic() + patience
    while not (found := probe()):
        assert time.monotonic() < end, f"waited {patience:.0f} s for {what}"
        time.sleep(0.2)
    return found


@dataclass(frozen=True)
class Served:
    """A copy of the built experiment with its two user interfaces."""

    lab: Lab
    dagster: str
    mlflow: str

    def query(self, text: str) -> dict[str, Any]:
        """Ask Dagster's GraphQL."""
        body = json.dumps({"query": text}).encode()
        request = Request(f"{self.dagster}/graphql", body, {"content-type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["data"]

    def outcomes(self) -> dict[tuple[str, str | None], str]:
        """Return what Dagster shows as the outcome of the latest materialization, by asset and partition."""
        fields = "partition metadataEntries { label ... on TextMetadataEntry { text } }"
        nodes = self.query(
            "{ assetNodes { assetKey { path } partitionKeys"
            f" latestMaterializationByPartition {{ {fields} }}"
            f" assetMaterializations(limit: 1) {{ {fields} }} }} }}"
        )["assetNodes"]
        found = {}
        for node in nodes:
            events = node[
                "latestMaterializationByPartition" if node["partitionKeys"] else "assetMaterializations"
            ]
            for event in events:
                texts = {
                    entry["text"] for entry in event["metadataEntries"] if entry["label"].endswith("outcome")
                }
                found[node["assetKey"]["path"][-1], event["partition"]] = " ".join(sorted(texts))
        return found

    def materialized(self, since: float) -> Counter[tuple[str, str | None]]:
        """Return how often each asset and partition was materialized since a time, seconds of the epoch."""
        events = "assetMaterializations(limit: 1000) { partition timestamp }"  # in milliseconds
        nodes = self.query(f"{{ assetNodes {{ assetKey {{ path }} {events} }} }}")["assetNodes"]
        return Counter(
            (node["assetKey"]["path"][-1], event["partition"])
            for node in nodes
            for event in node["assetMaterializations"]
            if int(event["timestamp"]) >= 1000 * since
        )


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def served(built_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    lab = built_lab.copy(tmp_path_factory.mktemp("served") / "lab")
    dagster, mlflow = free_ports(2)
    lab.edit(lambda s: s.update(ui={"dagster_port": dagster, "mlflow_port": mlflow}))
    names = ("CLIPCOV_CONFIG", "CLIPCOV_WORK_DIR", "DAGSTER_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    log = lab.folder / "ui.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "assets.running.ui", "--config", str(lab.yaml)],
            cwd=Path(__file__).parent.parent, env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        served = Served(lab, f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{mlflow}")
        for url in (f"{served.dagster}/server_info", f"{served.mlflow}/health"):
            wait_for(url, lambda url=url: process.poll() is not None or answers(url))
            assert process.poll() is None, log.read_text()[-3000:]
        yield served
    finally:
        # each server leads a process group of its own
        running = process.poll() is None
        groups = [child.pid for child in psutil.Process(process.pid).children()] if running else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        deadline = time.monotonic() + 10  # what was killed is gone when the system has noticed
        while time.monotonic() < deadline and not all(map(group_is_gone, groups)):
            time.sleep(0.1)
        left = [group for group in groups if not group_is_gone(group)]
        for group in left:
            os.killpg(group, signal.SIGKILL)
    assert len(groups) == 3
    assert not left, f"{len(left)} servers outlived `clipcov ui`"
    assert process.returncode == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def page_text(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.textContent"))


def shows(browser: webdriver.Chrome, *texts: str) -> None:
    """Wait until the page shows all of these texts."""
    wait_for(f"{texts} on {browser.current_url}", lambda: all(text in page_text(browser) for text in texts))


def click(browser: webdriver.Chrome, text: str) -> None:
    """Wait for a button whose whole text is ``text`` and click it; the page may redraw it in between."""

    def clicked() -> bool:
        try:
            for one in browser.find_elements(By.XPATH, f"//button[normalize-space(.)='{text}']"):
                if one.is_displayed() and one.is_enabled():
                    one.click()
                    return True
        except (StaleElementReferenceException, ElementClickInterceptedException):
            pass
        return False

    wait_for(f"the button {text!r} on {browser.current_url}", clicked)


# ---------------------------------------------------------------- Dagster


def test_asset_graph_shows_every_asset(served: Served, browser: webdriver.Chrome) -> None:
    groups = ",".join(f"global%40global%3A{group}" for group in ("pool", "selection", "training"))
    size = browser.get_window_size()
    browser.set_window_size(4000, 2400)  # assets outside the window have no text
    browser.get(f"{served.dagster}/asset-groups?expanded={groups}")
    shows(browser, *STAGES)
    browser.set_window_size(size["width"], size["height"])


def test_an_asset_materialized_by_clicking_is_cached(served: Served, browser: webdriver.Chrome) -> None:
    browser.get(f"{served.dagster}/assets/leaderboard")
    shows(browser, "built in")
    click(browser, "Materialize")

    def finished() -> str | None:
        runs = served.query(
            "{ runsOrError(limit: 1) { ... on Runs { results { status assetSelection { path } } } } }"
        )
        [run] = runs["runsOrError"]["results"]
        mine = run["assetSelection"] == [{"path": ["leaderboard"]}]
        return run["status"] if mine and run["status"] in ("SUCCESS", "FAILURE") else None

    # the runs of the first build are there already: only a run that comes after the click says "cached"
    wait_for("the run", lambda: served.outcomes()["leaderboard", None] == "cached")
    assert wait_for("the end of the run", finished) == "SUCCESS"
    shows(browser, "cached")


def test_materialize_all_with_nothing_changed(served: Served, browser: webdriver.Chrome) -> None:
    browser.get(f"{served.dagster}/asset-groups")
    click(browser, "Materialize all…")
    click(browser, "All")
    started, clicked = time.monotonic(), time.time()
    click(browser, "Launch backfill")
    text = (
        "{ partitionBackfillsOrError(limit: 1) { ... on PartitionBackfills"
        " { results { status runs(limit: 50) { status assetSelection { path } } } } } }"
    )

    def ended() -> dict[str, Any] | None:
        found = served.query(text)["partitionBackfillsOrError"]["results"]
        return found[0] if found and found[0]["status"] != "REQUESTED" else None

    backfill = wait_for("the end of the backfill", ended, BACKFILL_PATIENCE)
    print(f"materialize all: {time.monotonic() - started:.1f} s")
    assert backfill["status"] == "COMPLETED_SUCCESS"
    plan = served.lab.plan()
    planned = {step.node.stage for step in plan.steps}  # all but early similarities, which only c_rho needs
    assert {key["path"][0] for run in backfill["runs"] for key in run["assetSelection"]} == planned
    partitions = {(step.node.stage, None if step.key == "_" else step.key) for step in plan.steps}
    assert served.materialized(clicked) == dict.fromkeys(partitions, 1)
    # partitions of a stage share runs; the daemon may look between two of them, and begin the next stage's
    assert len(backfill["runs"]) < len(partitions)
    assert served.outcomes() == dict.fromkeys(partitions, "cached")


@pytest.mark.parametrize(
    "asset", ["raw_shards", "embeddings", "pseudo_labels", "rankings", "subsets", "scores", "leaderboard"]
)
def test_a_table_shows_its_columns_and_rows(served: Served, browser: webdriver.Chrome, asset: str) -> None:
    browser.get(f"{served.dagster}/assets/{asset}")
    shows(browser, "Column name", "Row count", {"scores": "value", "leaderboard": "mean"}.get(asset, "uid"))


# ---------------------------------------------------------------- MLflow


def test_mlflow_run_page_shows_parameters_scores_and_artifacts(
    served: Served, browser: webdriver.Chrome
) -> None:
    record = served.lab.plan().by_name["checkpoints/clipcov-f0.5-s0"].record
    assert record is not None
    page = f"{served.mlflow}/#/experiments/1/runs/{record.stats['mlflow_run_id']}"
    browser.get(page)
    shows(browser, "clipcov-f0.5-s0", "train.batch_size", "vendor/text_retrieval_recall_at_5")
    browser.get(f"{page}/artifacts")
    shows(browser, "config", "scores", "subset", "training.json")


def test_mlflow_sorts_runs_by_the_primary_metric_compares_them_and_names_the_champion(
    served: Served, browser: webdriver.Chrome
) -> None:
    project = served.lab.project()
    tracking = Tracking(project.config)
    primary = metric_name(project.config.evaluate.primary_metric)
    arms = [run for run in tracking.client().search_runs(["1"]) if "clipcov.recipe" in run.data.tags]
    best = sorted(arms, key=lambda run: -run.data.metrics[primary])
    browser.get(mlflow_runs_url(project.config))
    shows(browser, *(run.info.run_name for run in arms), primary)
    page = browser.find_element(By.TAG_NAME, "body").text
    names = [run.info.run_name for run in arms]
    listed = sorted(names, key=page.index)
    values = {run.info.run_name: run.data.metrics[primary] for run in best}
    assert [values[name] for name in listed] == [values[run.info.run_name] for run in best]
    chosen = urlencode({"runs": json.dumps([run.info.run_id for run in arms]), "experiments": '["1"]'})
    browser.get(f"{served.mlflow}/#/compare-runs?{chosen}")
    shows(browser, "Comparing 3 Runs from 1 Experiment", "select.weights.self", "train.batch_size", *names)
    browser.get(f"{served.mlflow}/#/models/lab")
    shows(browser, "champion", "Version 3", *names)
    browser.get(mlflow_run_url(project.config, tracking.parent()))
    shows(browser, "lab", *names)  # below it, the arms
