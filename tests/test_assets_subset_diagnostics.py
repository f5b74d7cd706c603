"""The stages pool_map and subset_diagnostics on real data: tables, plots, overlap, what runs again."""

import dagster as dg
import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.proxy.vectors import vectors_of
from clipcov_pipeline.subsets.tables import SCHEMA
from lab import Lab

pytestmark = pytest.mark.slow

PLOTS = {"covariance.png", "classes.png", "similarities.png", "terms.png", "map.png"}


def folder(lab: Lab, name: str):
    return lab.project().store.folder(lab.plan().by_name[name].record)


def covariance_of(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The centred cross-covariance as it is defined, in fp64 throughout."""
    return (image - image.mean(axis=0)).T @ (text - text.mean(axis=0)) / len(image)


def test_the_alignment_is_the_cosine_of_the_stored_embeddings_covariances(built_lab: Lab) -> None:
    labels = pl.read_parquet(folder(built_lab, "pseudo_labels") / "labels.parquet")
    record = built_lab.plan().by_name["pseudo_labels"].record
    assert record is not None
    rows = built_lab.project().vectors.open(record.stats["table"], record.stats["version"]).to_arrow()
    names = zip(rows.column("shard").to_pylist(), rows.column("uid").to_pylist(), strict=True)
    places = {name: place for place, name in enumerate(names)}
    pool = [places[name] for name in labels.select("shard", "uid").iter_rows()]  # without the held-out ones
    columns = ("image_embedding", "text_embedding")
    image, text = (vectors_of(rows, column).astype(np.float64)[pool] for column in columns)
    reference = covariance_of(image, text)
    for name in ("clipcov-f0.5", "random-f0.5"):
        subset = pl.read_parquet(folder(built_lab, f"subsets/{name}") / "subset.parquet")
        chosen = labels["uid"].is_in(subset["uid"].implode()).to_numpy()
        assert chosen.sum() == subset.height
        own = covariance_of(image[chosen], text[chosen])
        expected = (own * reference).sum() / np.linalg.norm(own) / np.linalg.norm(reference)
        table = pl.read_parquet(folder(built_lab, f"subset_diagnostics/{name}") / "table.parquet")
        [found] = table.filter(scope="overall", quantity="alignment")["value"]
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_subset_has_its_table_and_its_plots(built_lab: Lab) -> None:
    place = folder(built_lab, "subset_diagnostics/clipcov-f0.5")
    assert {path.name for path in place.iterdir()} >= PLOTS
    table = pl.read_parquet(place / "table.parquet")
    assert dict(table.schema) == SCHEMA
    values = dict(table.filter(scope="overall").select("quantity", "value").iter_rows())
    assert values["selection_seconds"] > 0
    assert values["selection_cpu_seconds"] > 0
    labels = pl.read_parquet(folder(built_lab, "pseudo_labels") / "labels.parquet")
    subset = pl.read_parquet(folder(built_lab, "subsets/clipcov-f0.5") / "subset.parquet")
    kept = labels.filter(pl.col("uid").is_in(subset["uid"].implode()))
    repeats = 1 - kept["image_sha256"].n_unique() / kept.height
    assert values["duplicate_images"] == pytest.approx(repeats, abs=1e-9)


def test_the_overlap_is_that_of_the_uids(built_lab: Lab) -> None:
    one, other = (
        set(pl.read_parquet(folder(built_lab, f"subsets/{method}-f0.5") / "subset.parquet")["uid"])
        for method in ("clipcov", "random")
    )
    place = folder(built_lab, "subset_diagnostics/clipcov-f0.5@overlap")
    assert (place / "overlap.png").is_file()
    (row,) = pl.read_parquet(place / "overlap.parquet").filter(method="clipcov").iter_rows(named=True)
    assert row["other"] == "random"
    assert row["jaccard"] == pytest.approx(len(one & other) / len(one | other))


def test_the_map_has_a_place_for_every_sample(built_lab: Lab) -> None:
    frame = pl.read_parquet(folder(built_lab, "pool_map") / "map.parquet")
    labels = pl.read_parquet(folder(built_lab, "pseudo_labels") / "labels.parquet")
    assert frame.height == labels.height
    assert frame["uid"].to_list() == labels["uid"].to_list()
    assert np.isfinite(frame["x"].to_numpy()).all()


def test_dagster_shows_plots_and_numbers_of_both_parts(built_lab: Lab) -> None:
    with built_lab.instance() as instance:
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey("subset_diagnostics"), asset_partitions=["random-f0.5"]),
            limit=5,
        ).records
    assert len(found) == 1
    assert found[0].asset_materialization is not None
    metadata = found[0].asset_materialization.metadata
    plots = {"covariance", "classes", "similarities", "terms", "map"}
    assert plots | {"overall", "overlap/matrix"} <= set(metadata)
    assert "data:image/png;base64," in str(metadata["covariance"].value)
    table = pl.read_parquet(folder(built_lab, "subset_diagnostics/random-f0.5") / "table.parquet")
    [alignment] = table.filter(scope="overall", quantity="alignment")["value"]
    assert metadata["alignment"].value == pytest.approx(alignment, rel=1e-5)  # six digits are shown


def test_a_map_of_fewer_samples_selects_and_trains_nothing_again(lab: Lab) -> None:
    lab.edit(lambda s: s["diagnostics"].update(tsne_samples=50))
    assert dict(lab.run()) == {"pool_map": 1, "subset_diagnostics": 2}
    lab.edit(lambda s: s["diagnostics"].update(random_draws=2))
    assert {step.status for step in lab.plan().of("checkpoints")} == {Status.CURRENT}
    assert dict(lab.run()) == {"subset_diagnostics": 2, "report": 1}
