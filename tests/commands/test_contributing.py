"""The algorithm that CONTRIBUTING adds works: its class, its config, its regret."""

import re
import runpy
import sys

import pytest
from command_line import ROOT, run_here

BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The files of the example, where a user would have them."""
    for _, text in BLOCKS:
        path = tmp_path / re.search(r"^# (\S+\.(?:py|yaml))$", text, flags=re.M)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("median", None)


def test_the_example_runs_from_its_config(example, monkeypatch):
    monkeypatch.setattr("lit_rlhf.report.build_report", lambda folder: None)
    result = run_here(
        "train", "--config-dir", str(example / "conf"), "algorithm=median", "data.prompts=[A film,The plot]",
        "trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=1", "sampler.max_new_tokens=4", "logger=csv",
        "paths.output_dir=run", "trainer.limit_val_batches=0",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (example / "run/model/model.safetensors").is_file()


def test_the_example_comes_near_the_best_policy_there_is(example, capsys):
    runpy.run_path(str(example / "regret.py"))
    regret = float(re.search(r"regret (\S+)", capsys.readouterr().out)[1])
    assert 0 <= regret < 0.15
