"""What the service exports is what training reads."""

from pathlib import Path

from finetune.dataset import read_dataset
from tests.dataset_world import open_world
from tests.migrated import migrated


async def test_an_export_of_the_service_is_read_and_verified(tmp_path: Path) -> None:
    words = ("paying", "sending", "opening", "a parcel", "my pin", "a code", "the app", "money")
    questions = [f"{word} went wrong with my order {n * 7919}, what of it?" for n, word in enumerate(words)]
    asked = [(question, ("card", "refund")[n % 2]) for n, question in enumerate(questions)]
    async with open_world(f"sqlite:///{migrated(tmp_path / 'hallmark.db')}") as world:
        made = await world.classified(*asked)
        await world.build(split={"heldout": 0.3})
        folder = tmp_path / "export"
        folder.mkdir()
        for name in ("manifest.json", "train.jsonl", "heldout.jsonl"):
            (folder / name).write_bytes(await world.file("data", name))
    dataset = read_dataset(folder)
    rows = [row for split in dataset.splits.values() for row in split]
    assert {row.prediction_id for row in rows} == {each.id for each in made}
    assert all(row.label == row.target and row.session and row.question for row in rows)
    assert (dataset.manifest.task, dataset.manifest.purpose) == ("classify", "training")
