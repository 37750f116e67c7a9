import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import onetorch
from onetorch.runs import algorithm
from onetorch.runs.errors import CheckpointError, RunError, UsageError

IDEA = Path(__file__).parents[1] / "runs" / "idea.py"
idea = algorithm.read(IDEA).load()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    where = tmp_path_factory.mktemp("trained") / "r"
    with onetorch.Run(where, idea.Config(steps=3), quiet=True) as run:
        model = idea.train(run.config, run)
    return where, model


def test_the_weights_are_those_of_the_newest_checkpoint(trained: tuple[Path, Any], tmp_path: Path) -> None:
    where, model = trained
    loaded = onetorch.load(str(where))
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    shutil.copytree(where, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "00000003" / "state.safetensors").unlink()  # a model needs no optimizer
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), onetorch.load(tmp_path / "copy").state_dict().values(), strict=True))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda w: shutil.rmtree(w), UsageError, "there is no folder"),
        (lambda w: (w / "config.json").unlink(), UsageError, "holds no run"),
        (lambda w: (w / "source.py").unlink(), UsageError, "there is no file"),
        (lambda w: (w / "source.py").write_text("import os"), UsageError, "not code that you have trained"),
        (lambda w: change(w / "config.json", algorithm="os.path"), UsageError, "names the algorithm 'os.path'"),
        (lambda w: change(w / "config.json", algorithm=["x"]), UsageError, "names the algorithm"),
        (lambda w: change(w / "config.json", algorithm=None), UsageError, "stood in no file"),
        (lambda w: change(w / "config.json", format=9), RunError, "has format 9"),
        (lambda w: shutil.rmtree(w / "checkpoints"), RunError, "has no checkpoint yet; `onetorch resume"),
        (lambda w: os.truncate(w / "checkpoints" / "00000003" / "model.safetensors", 9), CheckpointError, "9 bytes where the manifest says"),
        (
            lambda w: change(w / "config.json", config={"seed": 0, "steps": 3, "lr": 0.05, "hidden": [9], "pause": 0.0, "break_at": 0}),
            CheckpointError,
            "changed since",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(trained: tuple[Path, Any], tmp_path: Path, damage: Any, error: type[Exception], said: str) -> None:
    where = tmp_path / "r"
    shutil.copytree(trained[0], where)
    damage(where)
    with pytest.raises(error) as caught:
        onetorch.load(where)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_its_model_is_named(trained: tuple[Path, Any], tmp_path: Path) -> None:
    where = tmp_path / "r"
    shutil.copytree(trained[0], where)
    source = where / "source.py"
    source.write_text(source.read_text().replace("widths = (4, *config.hidden, 1)", "widths = (4, 5, 1)"))
    with pytest.raises(CheckpointError, match=r"the weights are not those of build\(config\): 0.bias is \(8,\) float32, the model's is \(5,\)"):
        onetorch.load(where, trust_code=True)
