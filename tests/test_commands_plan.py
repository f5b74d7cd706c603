"""`clipcov plan`: what it prints of a plan, as text and as JSON lines."""

import yaml

from clipcov_pipeline.commands.plan import as_json_lines, as_text
from simulation import set_key


def test_the_plan_as_text_and_as_json(built):
    built.edit(set_key("train.lr", 0.002))
    lines = as_text(built.plan()).splitlines()
    assert lines[0].split(maxsplit=2) == ["build", "checkpoints/full-f1-s0", "train.lr 0.001 -> 0.002"]
    assert lines[-1] == (
        "checkpoints: 10 build; scores: 20 wait; leaderboard: 1 wait; checkpoint_galleries: 10 wait;"
        " report: 1 wait"
    )
    steps = [yaml.safe_load(line) for line in as_json_lines(built.plan()).splitlines()]
    assert len(steps) == 42
    assert steps[0] == {
        "step": "checkpoints/full-f1-s0",
        "status": "build",
        "why": ["train.lr 0.001 -> 0.002"],
    }


def test_many_shards_with_one_reason_are_one_line(fresh):
    names = [f"{i:02d}" for i in range(25)]
    fresh.shards = {name: f"content of {name}" for name in names}
    fresh.times = dict.fromkeys([*names, "30", "31"], 1)
    first, _, third = as_text(fresh.plan()).splitlines()[:3]
    assert first.split(maxsplit=4) == ["build", "raw_shards:", "25", "entries", "not built yet (00 ... 24)"]
    assert third.split(maxsplit=4)[:4] == ["wait", "embeddings:", "25", "entries"]
    assert third.endswith(" waits for raw_shards/SHARD and 1 more (00 ... 24)")
    every = as_text(fresh.plan(), every_line=True).splitlines()
    assert [line.split()[1] for line in every[:25]] == [f"raw_shards/{name}" for name in names]
    assert every[-1] == as_text(fresh.plan()).splitlines()[-1]
    assert len(as_json_lines(fresh.plan()).splitlines()) == len(every) - 2
    # another reason is another line, and few shards keep theirs
    fresh.run()
    for name in names[:22]:
        fresh.times[name] = 2
    del fresh.shards["22"]
    fresh.shards |= {"30": "new", "31": "new"}
    told = [line.split(maxsplit=1)[1] for line in as_text(fresh.plan()).splitlines() if "raw_shards" in line]
    assert told[0].split(maxsplit=3)[:3] == ["raw_shards:", "22", "entries"]
    assert told[0].endswith("shard changed (00 ... 21)")
    assert [line.split(maxsplit=1) for line in told[1:3]] == [
        ["raw_shards/30", "not built yet"],
        ["raw_shards/31", "not built yet"],
    ]
