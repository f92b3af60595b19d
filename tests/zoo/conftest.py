"""What the zoo's tests share: a handful of made-up photographs in the layout of the real ones."""

import io
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory) -> Path:
    """A data folder with 24 + 12 pictures of noise as `tiny_imagenet_64`, 200 class names."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    data = tmp_path_factory.mktemp("data")
    folder = data / "tiny_imagenet_64"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def row(label: int) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
        return {"image": {"bytes": buffer.getvalue(), "path": f"{label}.JPEG"}, "label": label}

    for split, number in (("train-0", 24), ("validation", 12)):
        rows = [row(int(rng.integers(200))) for _ in range(number)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(200)))
    return data
