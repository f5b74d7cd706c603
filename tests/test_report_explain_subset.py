"""``clipcov explain --subset``: against the subset's own parquet and the arrays of the LanceDB table."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.vectors import vectors_of
from clipcov_pipeline.report.explain_subset import explain_subset
from clipcov_pipeline.report.search import Searcher
from lab import Lab

pytestmark = pytest.mark.slow

SUBSET = "clipcov-f0.5"


def ranking_of(lab: Lab, method: str = "clipcov") -> pl.DataFrame:
    project = lab.project()
    record = project.plan().by_name[f"rankings/{method}"].record
    assert record is not None
    return pl.read_parquet(project.store.folder(record) / "ranking.parquet")


def test_every_sample_has_the_place_and_the_score_of_the_ranking_that_stands(built_lab: Lab) -> None:
    project, ranking = built_lab.project(), ranking_of(built_lab)
    step = project.plan().by_name[f"subsets/{SUBSET}"]
    assert step.record is not None
    subset = set(pl.read_parquet(project.store.folder(step.record) / "subset.parquet")["uid"])
    table = Searcher.open(project).table().to_arrow()
    places = {uid: at for at, uid in enumerate(table.column("uid").to_pylist())}
    image, text = (vectors_of(table, f"{side}_embedding").astype(np.float64) for side in ("image", "text"))
    for at in (0, len(subset) - 1, len(subset), ranking.height - 1):
        uid = ranking["uid"][at]
        found = explain_subset(project, uid, SUBSET)
        assert (found.rank, found.chosen, found.budget) == (at + 1, uid in subset, len(subset))
        assert found.score == ranking["gain"][at]
        assert found.terms["self"] == pytest.approx(2 * image[places[uid]] @ text[places[uid]], abs=1e-3)
        if found.chosen:
            assert found.gain == pytest.approx(found.score, abs=1e-4)
        assert all(neighbour["uid"] in subset for neighbour in found.neighbours)


def test_the_command_and_what_it_refuses(built_lab: Lab) -> None:
    uid = ranking_of(built_lab)["uid"][0]
    command = ["explain", uid, "--subset", SUBSET, "--config", str(built_lab.yaml)]
    assert f"{uid} is in: rank 1 of the whole" in CliRunner().invoke(cli, command).output
    assert json.loads(CliRunner().invoke(cli, [*command, "--json"]).output)["rank"] == 1

    def refused(arguments: list[str]) -> str:
        return str(CliRunner().invoke(cli, arguments).exception)

    assert refused([*command, "--fraction", "0.1", "--mode", "strict"]) == (
        "explain: found fraction, mode beside --subset, expected none: the experiment settles them"
    )
    assert refused(["explain", uid]).startswith("explain: found neither SOURCE nor --subset, expected one")
    command[3] = "random-f0.5"
    assert refused(command) == (
        "explain: found the subset 'random-f0.5', expected one that ClipCov chose: clipcov-f0.5"
    )
    with pytest.raises(InputError, match="uid: found 'nobody', which is none of the"):
        explain_subset(built_lab.project(), "nobody", SUBSET)


def test_a_ranking_that_another_method_made_is_not_explained(lab: Lab) -> None:
    """The YAML has been edited, and not run since."""
    lab.edit(lambda s: s["select"]["methods"].update(mine={"method": "random"}))
    lab.run(("rankings",))
    uid = ranking_of(lab, "mine")["uid"][0]
    lab.edit(lambda s: s["select"]["methods"].update(mine={"method": "clipcov"}))
    with pytest.raises(InputError, match="rankings/mine is of the method random, expected clipcov"):
        explain_subset(lab.project(), uid, "mine-f0.5")


def test_filters_of_the_experiment(lab: Lab) -> None:
    sizes = {"min_words": 2, "min_characters": 3, "min_side": 40, "max_aspect": 2.0}
    filters = {"drop_duplicate_captions": True, "basic": sizes, "rejected": "last"}
    once = {"method": "clipcov", "class_balance": "global", "filters": filters}
    lab.edit(lambda s: s["select"]["methods"].update(once=once))
    with pytest.raises(InputError, match="rankings/once is not built yet"):
        explain_subset(lab.project(), "x", "once-f0.5")
    lab.run(("rankings",))
    uids, gains = ranking_of(lab, "once").select("uid", "gain").get_columns()
    first, last = (explain_subset(lab.project(), uids[at], "once-f0.5") for at in (0, -1))
    assert (first.rejected, last.rejected) == (False, True)
    assert (first.score, last.score) == (gains[0], gains[-1])
    assert first.gain == pytest.approx(gains[0], abs=1e-4)
    # at the cut nothing that the filters reject is in, so nothing is redundant yet
    assert (last.class_chosen, last.redundancy, last.cut) == (0, 0.0, None)
    assert last.gain == last.base
