"""What the two gallery stages write, and what Dagster shows of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.display.preview import image
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import GALLERY
from clipcov_pipeline.report.drawing import PAGE, SHEET, write_page, write_sheet
from clipcov_pipeline.report.gallery import Gallery, write_gallery


def gallery_done(task: Task, gallery: Gallery, **stats: Any) -> None:
    """Write a gallery, its page and its contact sheet; set the entry's digest and statistics."""
    folder = task.entry.folder
    write_gallery(gallery, folder / GALLERY)
    write_page(gallery, folder / PAGE)
    write_sheet(gallery, folder / SHEET)
    task.done({"gallery": digest_of_file(folder / GALLERY)}, **stats, pictures_missing=gallery.missing)


def show_gallery(folder: Path) -> Mapping[str, Any]:
    """Return the contact sheet, and where the page is."""
    return {"gallery": image(folder / SHEET), "page": dg.MetadataValue.path(str(folder / PAGE))}
