"""``clipcov bench plan`` on a few shards, as a user calls it."""

import json

from click.testing import CliRunner

from clipcov_pipeline.cli import cli


def test_plans_of_a_pool_in_pretence_find_nothing_to_do(tmp_path):
    arguments = ["--shards", "3", "--repeat", "2", "--scratch-dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(cli, ["bench", "plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    # 2 entries a shard; proxy, labels, index, map, board, report; 5 rankings; 25 subsets, each with a
    # gallery and two diagnostics, and the full pool's; 52 arms, their scores and galleries
    assert found["steps"] == 2 * 3 + 6 + 5 + 25 * 4 + 1 + 52 * 3
    assert all(len(found[name]) == 2 and min(found[name]) > 0 for name in ("open", "first", "next"))
    assert list(tmp_path.iterdir()) == []
