"""Draws `docs/architecture.svg`: the stages as the plan knows them, and who imports whom.

    python docs/draw_architecture.py

Both are read from the code: the stages and their arrows from the plan of the sample's experiment with
`c_rho`, the dots from the import statements. A test holds that the picture is up to date.
"""

import ast
import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from clipcov_pipeline.experiment.config.load import load_config, preset_path
from clipcov_pipeline.experiment.plan import make_plan
from clipcov_pipeline.experiment.stages import STAGES
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.pool.listing import Shard

ROOT = Path(__file__).parent.parent
PICTURE = Path(__file__).with_name("architecture.svg")

# from the top floor to the ground: imports go down only
FLOORS = (
    "assets",
    "commands",
    "bench",
    "report",
    "experiment",
    "evaluation",
    "training",
    "subsets",
    "proxy",
    "selection",
    "pool",
    "errors",
    "files",
    "progress",
    "uuids",
    "redaction",
)
# modules beside the rooms: the command's entry, and an old name that registered models still ask for
BESIDE = {"cli": "commands", "classify": "evaluation"}

# the room that does a stage's work: its asset file has to reach it
ROOM_OF = {
    "raw_shards": "pool",
    "proxy_model": "training",
    "embeddings": "proxy",
    "early_similarities": "proxy",
    "pseudo_labels": "proxy",
    "sample_index": "pool",
    "rankings": "selection",
    "subsets": "subsets",
    "pool_map": "subsets",
    "subset_diagnostics": "subsets",
    "subset_galleries": "report",
    "checkpoints": "training",
    "scores": "evaluation",
    "leaderboard": "report",
    "checkpoint_galleries": "report",
    "report": "report",
}
COLUMN = {
    "sample_index": 1,
    "early_similarities": 1,
    "pool_map": 1,
    "subset_galleries": 2,
    "checkpoint_galleries": 1,
}
COLOURS = {
    "pool": "#cfe8d5",
    "selection": "#ffe08a",
    "proxy": "#cfe0f5",
    "subsets": "#f9d6c4",
    "training": "#e3d3f2",
    "evaluation": "#cdeeee",
    "report": "#f6d3e2",
}
PLAIN = "#eeeeee"

BOX, GAP, ROW = (142, 36), 26, 62  # a stage's box, between two columns, and from one row to the next
LEFT, TOP = 20, 56
DOTS, CELL = 630, 27  # where the table of imports begins, and its cells
WIDTH = DOTS + CELL * len(FLOORS) + 20


def stage_arrows() -> set[tuple[str, str]]:
    """Return (what is read, who reads it or waits for it) by stage, without what follows from the others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        text = preset_path("sample").read_text()
        path.write_text(text.replace("  methods:\n", "  methods:\n    c_rho: {}\n", 1))
        config = load_config(str(path))
        world = World((Shard("a", "a.tar", "1"),), dict.fromkeys(config.evaluate.sets, ()), {})
        plan = make_plan(config, world, Store(Path(folder) / "store"))
    nodes = [step.node for step in plan.steps]
    pairs = {(item.stage, node.stage) for node in nodes for item in (*node.inputs, *node.after)}
    return {(a, b) for a, b in pairs if not any(_leads(pairs, c, b) for x, c in pairs if x == a and c != b)}


def _leads(pairs: set[tuple[str, str]], start: str, end: str) -> bool:
    return start == end or any(_leads(pairs, b, end) for a, b in pairs if a == start)


def stage_rows(arrows: set[tuple[str, str]]) -> dict[str, int]:
    """Return the row of each stage: one below the lowest of what it reads."""
    rows: dict[str, int] = {}
    for stage in STAGES:  # in an order in which each comes after what it reads
        above = [rows[a] for a, b in arrows if b == stage and a in rows]
        rows[stage] = max(above, default=-1) + 1
    return rows


def module_imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of_module(name: str) -> str | None:
    """Return the floor on which a module of ours stands, by its dotted name."""
    package, *rest = name.split(".")
    if package == "assets":
        return "assets"
    room = rest[0] if package == "clipcov_pipeline" and rest else None
    return BESIDE.get(str(room), room)


def room_imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports.

    Raises ValueError for an import that goes up, and for a room that stands on no floor.
    """
    found: dict[str, set[str]] = {floor: set() for floor in FLOORS}
    for package in ("clipcov_pipeline", "assets"):
        for path in (ROOT / package).rglob("*.py"):
            room = room_of_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            if room == "__init__":
                continue
            if room not in found:
                raise ValueError(f"{path}: its room {room!r} stands on no floor, expected one of {FLOORS}")
            named = {room_of_module(name) for name in module_imports(path)} & found.keys()
            up = {other for other in named if FLOORS.index(str(other)) < FLOORS.index(room)}
            if up:
                raise ValueError(f"{path}: imports {sorted(map(str, up))}, which stands above {room}")
            found[room] |= {str(other) for other in named} - {room}
    return found


def check_rooms() -> None:
    """Raise ValueError where a stage's asset file does not reach the room that is said to do its work."""
    for stage in STAGES:
        seen, todo, rooms = set(), [ROOT / "assets" / f"{stage}.py"], set()
        while todo:
            for name in module_imports(todo.pop()):
                rooms.add(room_of_module(name))
                path = ROOT / f"{name.replace('.', '/')}.py"
                if name.startswith("assets.") and path.exists() and path not in seen:
                    seen.add(path)
                    todo.append(path)
        if ROOM_OF.get(stage) not in rooms:
            raise ValueError(f"assets/{stage}.py: found no import of {ROOM_OF.get(stage)}; see ROOM_OF")


def _text(x: float, y: float, text: str, **style: str | int) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(text)}</text>'


def _stages(arrows: set[tuple[str, str]]) -> Iterator[str]:
    rows = stage_rows(arrows)
    places = {s: (LEFT + COLUMN.get(s, 0) * (BOX[0] + GAP), TOP + rows[s] * ROW) for s in STAGES}
    if len(set(places.values())) < len(places):
        raise ValueError(f"two stages share a place: give one a column in COLUMN: {places}")
    for a, b in sorted(arrows):
        x, y = places[a][0] + BOX[0] / 2, places[a][1] + BOX[1]
        to_x, to_y = places[b][0] + BOX[0] / 2, places[b][1] - 3
        bend = to_y - (ROW - BOX[1]) / 2 if rows[b] - rows[a] > 1 else (y + to_y) / 2
        yield (
            f'<path d="M{x:g},{y:g} V{bend - 8:g} C{x:g},{bend + 6:g} {to_x:g},{bend - 10:g} {to_x:g},'
            f'{to_y:g}" fill="none" stroke="#777" marker-end="url(#head)"/>'
        )
    for stage, (x, y) in places.items():
        fill = COLOURS[ROOM_OF[stage]]
        yield f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="5" fill="{fill}" stroke="#555"/>'
        yield _text(x + BOX[0] / 2, y + 16, stage, text_anchor="middle", font_weight="bold")
        yield _text(x + BOX[0] / 2, y + 30, ROOM_OF[stage], text_anchor="middle", fill="#444")


def _imports(found: Mapping[str, set[str]]) -> Iterator[str]:
    head = TOP + 64
    for at, floor in enumerate(FLOORS):
        x, y = DOTS + at * CELL + CELL / 2, head + at * CELL
        turned = f"rotate(-60 {x:g} {head - 8})"
        yield _text(x, head - 8, floor, transform=turned)
        fill = COLOURS.get(floor, PLAIN)
        size = f'width="88" height="{CELL - 3}" rx="4"'
        yield f'<rect x="{DOTS - 92}" y="{y}" {size} fill="{fill}" stroke="#555"/>'
        yield _text(DOTS - 84, y + 16, floor)
        for place, other in enumerate(FLOORS):
            middle = f'cx="{DOTS + place * CELL + CELL / 2:g}" cy="{y + (CELL - 3) / 2:g}"'
            if other in found[floor]:
                yield f'<circle {middle} r="6" fill="#333"/>'
            elif place > at:
                yield f'<circle {middle} r="1.5" fill="#bbb"/>'
    notes = (
        "A dot: a module of the row's room imports one of the column's.",
        "There is none left of the diagonal: imports only go down.",
        "Arrows: what reads or waits for what (what follows from others is left out).",
        "A stage has the colour of the room that does its work.",
    )
    for line, note in enumerate(notes):
        yield _text(DOTS - 92, head + len(FLOORS) * CELL + 26 + 18 * line, note, fill="#444")


def draw() -> str:
    """Return the picture as SVG."""
    check_rooms()
    arrows = stage_arrows()
    height = TOP + (max(stage_rows(arrows).values()) + 1) * ROW
    parts = [
        _text(LEFT, 30, "The stages, from the shards to the report", font_size=16, font_weight="bold"),
        _text(DOTS - 92, 30, "The rooms, floor by floor", font_size=16, font_weight="bold"),
        *_stages(arrows),
        *_imports(room_imports()),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
            ' font-size="12">',
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">'
            '<path d="M0,0 L6,3 L0,6 z" fill="#777"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
