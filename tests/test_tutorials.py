"""The tutorials: numbers in the prose come from the page itself, and the moving picture moves."""
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d{2,}(?!\w)(?!\.\d)")  # .85, 1.067: what reads like a result or a setting
LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)")


def cells(path: Path, kind: str) -> list[dict]:
    "Cells of one kind."
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    "The text of a tutorial, without code blocks."
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    return re.sub(r"```.*?```", "", text, flags=re.S)


def computed(path: Path) -> str:
    "Code and outputs of a tutorial: where its numbers come from."
    return "\n".join("".join(cell["source"]) + json.dumps(cell["outputs"]) for cell in cells(path, "code"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_numbers_in_the_prose_are_on_the_page(path):
    known = {float(number) for number in DECIMAL.findall(computed(path))}
    lost = [number for number in DECIMAL.findall(prose(path)) if float(number) not in known]
    assert not lost, f"{path.name}: the prose says {', '.join(lost)}, which stands in no cell and no output of the page"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_lead_to_pages_that_exist(path):
    lost = [link for link in LINK.findall(prose(path)) if not (FOLDER / link).is_file()]
    assert not lost, f"{path.name} links to {', '.join(lost)}: no such notebook"


def animation() -> dict:
    "The figure of the losses' tutorial that has a slider."
    outputs = [o for cell in cells(FOLDER / "04_losses_by_hand.ipynb", "code") for o in cell["outputs"]]
    figures = [o["data"]["application/vnd.plotly.v1+json"] for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    return next(figure for figure in figures if figure.get("frames"))


def test_each_step_of_the_slider_is_a_frame():
    figure = animation()
    steps = [step["args"][0][0] for step in figure["layout"]["sliders"][0]["steps"]]
    assert steps == [frame["name"] for frame in figure["frames"]] and len(steps) > 5


def test_frames_move_points_that_the_figure_has():
    figure = animation()
    first, last = figure["frames"][0], figure["frames"][-1]
    assert first["traces"] == last["traces"] and max(first["traces"]) < len(figure["data"])
    for trace, before, after in zip(first["traces"], first["data"], last["data"]):
        assert set(before) - {"type"} <= set(figure["data"][trace]), f"trace {trace} lacks what its frames change"
        assert before["y"] != after["y"], f"trace {trace} stands still"
