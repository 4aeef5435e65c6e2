"""Files from the test sets of other projects, many of them odd: read well enough, or refused with the reason."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

from tests.benchmarks.formats import read_all

DATA = Path(__file__).parents[3] / "shared" / "data"
LEAST_RECALL = {"pdf": 0.97, "docx": 0.86, "pptx": 0.88, "xlsx": 0.77, "csv": 0.99, "html": 0.95, "md": 0.99}
REFUSED = {
    "MEDRPT-2024-PAT-3847_medical_report_scan.pdf": "no text layer",
    "imagemagick-ASCII85Decode.pdf": "no text layer",
    "imagemagick-CCITTFaxDecode.pdf": "no text layer",
    "imagemagick-lzw.pdf": "no text layer",
    "grayscale-image.pdf": "no text layer",
    "cmyk-image.pdf": "no text layer",
    "libreoffice-writer-password.pdf": "encrypted",
    "test_mskanji.csv": "save it as UTF-8",
    "test_outlook_msg.msg": "old format",
    "test_files.zip": "no type that is read",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_real_files_are_read_or_refused_with_the_reason() -> None:
    if not (DATA / "docs_docling").is_dir():
        pytest.skip(f"the real files are not here: no {DATA / 'docs_docling'}")
    readings = await read_all(DATA)
    refused = {reading.path.name: reading.refused for reading in readings if reading.refused}
    assert refused.keys() == REFUSED.keys()
    assert [name for name, reason in REFUSED.items() if reason not in str(refused[name])] == []
    recalls = defaultdict(list)
    for reading in readings:
        if reading.recall is not None:
            recalls[reading.kind].append(reading.recall)
    assert {kind: mean(values) for kind, values in recalls.items() if mean(values) < LEAST_RECALL[kind]} == {}
