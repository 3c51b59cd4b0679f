"""The notebooks run, at a small scale, and compute what is known; what is stored of them is clean."""

import base64
import json
import math
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.notebooks import METADATA, NOTEBOOKS, PICTURE, ROOT, clean, pictures, read, tags, with_parameters

NAMES = [path.stem for path in NOTEBOOKS]
#: Gold in the made-up sweep: alpha and beta of each form, by comparisons.
KNOWN = {100: {"rl": (1.0, 0.5), "best_of_n": (0.8, 0.3)}, 1000: {"rl": (1.5, 0.25), "best_of_n": (1.2, 0.1)}}


def write_sweep(folder: Path) -> None:
    """A multirun of over-optimisation whose gold scores follow the two forms."""
    for job, (comparisons, coef) in enumerate((c, k) for c in KNOWN for k in (0.0, 0.1)):
        known, ppo = KNOWN[comparisons], folder / str(job) / "ppo"
        configs = {"proxy": {"data": {"pairs_per_epoch": comparisons}}, "ppo": {"kl": {"coef": coef}, "seed": 0}}
        for stage, config in configs.items():
            (folder / str(job) / stage).mkdir(parents=True)
            (folder / str(job) / stage / "config.yaml").write_text(yaml.safe_dump(config))
        lines = ["iteration,objective/kl,reward/model,gold/model"]
        for i in range(1, 13):
            d = (3 if coef == 0 else 2) * (i - 1) / 11
            alpha, beta = known["rl"]
            lines.append(f"{i},{d**2},{2 * d},{d * (alpha - beta * math.log(d or 1))}")
        (ppo / "metrics.csv").write_text("\n".join(lines) + "\n")
        if coef == 0:
            write_best_of_n(folder / str(job) / "best_of_n")


def write_best_of_n(folder: Path, count: int = 16, prompts: int = 3) -> None:
    """Completions of which the proxy and gold like the same ones: the best of 1 has a gold score of 0 on average."""
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"samples_per_prompt": count}))
    rows = [
        {"policy": "policy", "prompt": f"p{j}", "components": {"model": i + 0.0}, "gold": {"model": (i - 7.5) / 8}}
        for i in range(count) for j in range(prompts)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SMALL = {
    "00_dataflow": {"ITERATIONS": 2, "BATCH": 16, "MINIBATCH": 8},
    "01_your_prompts_your_reward": {"ITERATIONS": 10, "SEEDS": 2, "BATCH": 32},
    "02_kl_reward_frontier": {"COEFS": [0.2, 1.6], "TARGETS": [1.0], "SEEDS": 2, "ITERATIONS": 6, "BATCH": 128},
    "03_overoptimisation": {"FOLDER": "sweep"},
    "04_algorithms_against_the_optimum": {"SEEDS": 2, "ITERATIONS": 8, "BATCH": 64, "BOUND": 0.9},
    "05_reading_a_sweep": {"COEFS": [0.05, 0.2], "SEEDS": 2, "ITERATIONS": 1},
}
#: Cells behind the last one, for what a notebook cannot know of itself.
CHECKS = {
    "03_overoptimisation": f"""
for comparisons, forms in {({c: f["rl"] for c, f in KNOWN.items()})}.items():
    found = fits["rl"][comparisons]
    assert np.allclose([found.alpha.value, found.beta.value], forms, rtol=1e-3), found
    assert np.isclose(found.r_squared, 1)
assert (Path("sweep") / FILES["ppo"]).exists() and (Path("sweep") / FILES["best_of_n"]).exists()
""",
}


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: importing torch takes longer than most of them at this scale."""
    client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
    client.create_kernel_manager()
    client.start_new_kernel()
    yield client.km
    client._cleanup_kernel()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_and_shows_pictures(path, kernel, tmp_path):
    write_sweep(tmp_path / "sweep")
    notebook = with_parameters(read(path), **SMALL[path.stem])
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    start = f"%reset -f\n%cd -q {tmp_path}\nimport tempfile\ntempfile.tempdir = {str(tmp_path)!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
    if path.stem in CHECKS:
        notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.stem]))
    NotebookClient(notebook, km=kernel, timeout=600).execute()  # an error of a cell is raised here
    assert len(pictures(notebook)) >= 1
    assert {path.name for path in (ROOT / "notebooks").iterdir()} == BEFORE


BEFORE = {path.name for path in (ROOT / "notebooks").iterdir()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_stored_notebook_holds_nothing_but_cells_and_pictures(path):
    stored = read(path)
    assert pictures(stored), "run python -m tests.notebooks"
    nbformat.validate(stored)
    assert stored.metadata == METADATA
    text = path.read_text()
    assert text == nbformat.writes(clean(read(path))) + "\n"  # no counts, no other outputs, no other metadata
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            assert set(output.data) == {PICTURE}
            assert base64.b64decode(output.data[PICTURE]).startswith(b"\x89PNG")
    for cell in stored.cells:
        assert not re.search(r"/home/|/root/|/work/|/tmp/|/Users/|[A-Z]:\\\\", cell.source)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_has_its_scale_in_one_cell_and_a_picture_to_keep(path):
    cells = read(path).cells
    assert sum("parameters" in tags(cell) for cell in cells) == 1
    assert any("keep" in tags(cell) for cell in cells)
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    with pytest.raises(ValueError, match="the parameters have no NOT_THERE"):
        with_parameters(read(path), NOT_THERE=1)


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(\d\d_\w+)` \|", readme, flags=re.M)) == set(NAMES)
