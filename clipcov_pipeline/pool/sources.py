"""What a pool may be given as: tars, parquet files with image bytes, folders of images with metadata."""

from dataclasses import replace

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.pool.image_folder import METADATA, Files, folder_shards
from clipcov_pipeline.pool.listing import NoShardsError, Shard, list_files, scan, settled
from clipcov_pipeline.pool.parquet_rows import ParquetRows, check_columns
from clipcov_pipeline.pool.rows import Names
from clipcov_pipeline.redaction import without_query

PARQUET = ".parquet"


def find_shards(
    source: str,
    storage_options: dict | None = None,
    *,
    settle_seconds: float = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: CaptionRule = TXT,
) -> list[Shard]:
    """Return the shards of a pool, sorted by name; those that are no tar have ``rows``.

    A folder with a tar in it is a folder of tars: img2dataset puts a parquet file with metadata beside each.

    Args:
        source: as `scan` takes; also one parquet file or a pattern of them (with braces, `*` or `?`), a
            folder of them, a folder of images with `metadata.csv` or `metadata.jsonl`, or one such file.
        storage_options: fsspec's.
        settle_seconds: as `scan`; of a folder of images, the metadata file's time counts.
        image_column, caption_column: of parquet and metadata; None: by name and type.
        captions: where captions are; without ``txt`` no column of captions is looked for, and all but the
            images are the sample's json.

    Raises:
        InputError: as `scan`; columns that are not there or ambiguous; parquet and metadata in one folder.
    """
    columns = Names(image_column, caption_column, txt="txt" in captions.members)
    if without_query(source).endswith(PARQUET):
        return _parquet(source, storage_options, settle_seconds, columns)
    folder, _, file = source.rpartition("/")
    if file in METADATA:
        files = list_files(folder or ".", storage_options)
        files = {path: found for path, found in files.items() if path == file or not _is_table(path)}
        return _folder(source, files, storage_options, settle_seconds, columns)
    try:
        shards = scan(source, storage_options, settle_seconds=settle_seconds)
    except NoShardsError as none:
        return _rows_in(source, storage_options, settle_seconds, columns, none)
    if given := [name for name in (image_column, caption_column) if name is not None]:
        raise InputError(
            f"shards: found the column {given[0]!r}, but {source} holds tars, which have none: leave it out"
        )
    return shards


def unread_parquet(source: str, shards: list[Shard]) -> int:
    """Return how many parquet files of a local folder of tars are nobody's metadata, and are not read."""
    if "://" in source or any(shard.rows for shard in shards) or source.endswith(".tar"):
        return 0
    files = list_files(source)
    return sum(path.endswith(PARQUET) and f"{path.removesuffix(PARQUET)}.tar" not in files for path in files)


def _rows_in(
    source: str,
    storage_options: dict | None,
    settle_seconds: float,
    columns: Names,
    none: NoShardsError,
) -> list[Shard]:
    """The shards of a folder without tars."""
    files = list_files(source, storage_options)
    parquet = [path for path in files if path.endswith(PARQUET)]
    tables = [path for path in files if _is_table(path)]
    if parquet and tables:
        below = source.rstrip("/")
        raise InputError(
            f"data source {source}: found {len(parquet)} parquet files and {tables[0]}, expected one kind:"
            f" give {below}/*.parquet (or the folder that they are in), or {below}/{tables[0]}"
        )
    if parquet:
        return _parquet(source, storage_options, settle_seconds, columns)
    if tables:
        return _folder(source, files, storage_options, settle_seconds, columns)
    raise InputError(f"{none}, parquet files with image bytes, or images with metadata.csv or metadata.jsonl")


def _is_table(path: str) -> bool:
    return path.rpartition("/")[2] in METADATA


def _folder(
    source: str,
    files: Files,
    storage_options: dict | None,
    settle_seconds: float,
    columns: Names,
) -> list[Shard]:
    """The shards of a folder of images, but for those whose metadata may still be being written."""
    shards = folder_shards(source, files, storage_options, columns)
    if not shards:
        raise InputError(
            f"data source {source}: no such file, or nothing in it; expected a line for each image"
        )
    return [shard for shard in shards if settled(shard.url, settle_seconds)]


def _parquet(source: str, storage_options: dict | None, settle_seconds: float, columns: Names) -> list[Shard]:
    found = scan(source, storage_options, settle_seconds=settle_seconds, suffix=PARQUET)
    for shard in found:  # the first that can be read says whether the columns are named right
        if check_columns(shard.url, shard.version, storage_options, columns):
            break
    return [replace(shard, rows=ParquetRows(shard.name, shard.url, columns)) for shard in found]
