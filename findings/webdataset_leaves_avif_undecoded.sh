#!/usr/bin/env bash
# webdataset 0.2.86 with Pillow 13.0.0: `decode("pilrgb")` leaves an `.avif` member as bytes, without a word.
# Pillow decodes AVIF by itself since 11.3, and webdataset hands the bytes to Pillow, which looks at the content:
# the same bytes under `.png` come out as an image. What decides is a list of suffixes in webdataset's
# `autodecode`, which has `webp`, `jp2` and `blp`, but no `avif`.
# Seen on 2026-11-28:
#   .avif -> bytes
#   .png  -> Image (8, 8) RGB
# Exits 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==0.2.86 pillow==13.0.0 'numpy<2.4'
"$folder/venv/bin/python" - "$folder" <<'PY'
import io
import sys
import tarfile

import webdataset
from PIL import Image, features

assert features.check("avif"), "this Pillow cannot read AVIF"
picture = io.BytesIO()
Image.new("RGB", (8, 8), (200, 30, 30)).save(picture, "AVIF")
found = {}
for suffix in ("avif", "png"):
    path = f"{sys.argv[1]}/{suffix}.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(f"0.{suffix}")
        member.size = len(picture.getvalue())
        tar.addfile(member, io.BytesIO(picture.getvalue()))
    (sample,) = webdataset.WebDataset(path, shardshuffle=False).decode("pilrgb")
    value = sample[suffix]
    found[suffix] = "bytes" if isinstance(value, bytes) else f"Image {value.size} {value.mode}"
    print(f".{suffix:5}-> {found[suffix]}")
sys.exit(found != {"avif": "bytes", "png": "Image (8, 8) RGB"})
PY
